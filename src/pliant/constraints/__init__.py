"""The choice of a ball for each parameter, before training.

presets            balls in relative terms: filters, rank, weights, N:M patterns, L2
parameter_groups   from rules for parameters to the parameter groups of the optimizer
radius             the norm of weights at initialisation, the unit of radii
coverage           which weights carry which ball, and what has none
transformer_rules  rules for the parts of transformers
"""

from pliant.constraints.coverage import Coverage as Coverage
from pliant.constraints.coverage import coverage as coverage
from pliant.constraints.parameter_groups import CoupledChannels as CoupledChannels
from pliant.constraints.parameter_groups import Rule as Rule
from pliant.constraints.parameter_groups import constrain as constrain
from pliant.constraints.parameter_groups import layout_of as layout_of
from pliant.constraints.presets import Layout as Layout
from pliant.constraints.presets import Preset as Preset
from pliant.constraints.presets import Vertices as Vertices
from pliant.constraints.presets import check_k as check_k
from pliant.constraints.presets import filters as filters
from pliant.constraints.presets import l2 as l2
from pliant.constraints.presets import rank as rank
from pliant.constraints.presets import resolve_k as resolve_k
from pliant.constraints.presets import semi_structured as semi_structured
from pliant.constraints.presets import weights as weights
from pliant.constraints.radius import initial_norm as initial_norm
from pliant.constraints.transformer_rules import transformer_rules as transformer_rules
