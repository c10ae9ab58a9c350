"""Which ball for which parameter."""

from pliant.constraints.parameter_groups import CoupledChannels as CoupledChannels
from pliant.constraints.parameter_groups import KSchedule as KSchedule
from pliant.constraints.parameter_groups import Layout as Layout
from pliant.constraints.parameter_groups import Preset as Preset
from pliant.constraints.parameter_groups import constrain as constrain
from pliant.constraints.parameter_groups import filters as filters
from pliant.constraints.parameter_groups import initial_norm as initial_norm
from pliant.constraints.parameter_groups import l2 as l2
from pliant.constraints.parameter_groups import rank as rank
from pliant.constraints.parameter_groups import semi_structured as semi_structured
from pliant.constraints.parameter_groups import weights as weights
from pliant.constraints.transformer_rules import transformer_rules as transformer_rules
