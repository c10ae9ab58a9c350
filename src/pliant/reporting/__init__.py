"""Records as tables and as a page, without torch.

page        ``pliant report``: records to a page
curves      comparable records, sorted into sections, views, curves and panels
grouping    which records belong together
ranking     how the curves of a panel compare, the best first
area        the area under a curve
intervals   its confidence interval over the seeds
tables      the comparison for the terminal and as Markdown
formats     numbers as text
figures     the data of the page's figures
cells       the data of the page's table
templates/  the page itself
"""

from pliant.reporting.curves import Curve as Curve
from pliant.reporting.curves import Panel as Panel
from pliant.reporting.curves import Section as Section
from pliant.reporting.curves import panels_of as panels_of
from pliant.reporting.curves import sections_of as sections_of
from pliant.reporting.intervals import Estimate as Estimate
from pliant.reporting.page import render as render
from pliant.reporting.page import report as report
from pliant.reporting.ranking import Standing as Standing
from pliant.reporting.ranking import standings as standings
from pliant.reporting.tables import comparison_markdown as comparison_markdown
from pliant.reporting.tables import comparison_table as comparison_table
from pliant.reporting.tables import summary_table as summary_table
