"""How Sphinx builds these pages: `make docs`. Nothing is fetched from the network."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import pliant

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "pliant"
author = "The pliant developers"
version = release = pliant.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "verbs"]
exclude_patterns = ["pictures", "_extensions"]
root_doc = "index"

# Pages are plain Markdown, so that a code host shows them too: headings are link targets under the names that it gives.
myst_heading_anchors = 3
# Links to Markdown outside of this folder lead to copies of the files.
OUTSIDE = re.compile(r"\]\((\.\./[^)#\s]+\.md)(?:#[^)]*)?\)")

nitpicky = True
# Packages whose pages are not fetched; what signatures name but nobody calls.
nitpick_ignore_regex = [
    (r"py:.*", r"Tensor|Path|(torch|collections|typing|pathlib|abc)\..*"),
    (
        r"py:.*",
        r"pliant\.(.*\.)?(compression\.base\.A|Layout|CoupledChannels|Proof|Slot|Stored)",
    ),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False

# The page shows the overloads in place of forty settings, whose defaults autodoc would look for in the source.
vars(pliant.train).pop("__signature__")

html_theme = "furo"
html_title = "pliant"
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []


def link_to_copies(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write links to Markdown outside of this folder as MyST wants links to files."""
    source[0] = OUTSIDE.sub(r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Register what is not an extension of its own."""
    app.connect("source-read", link_to_copies)
