"""The optimizer SFW, and the schedules that accompany its steps.

sfw               the optimizer: options, groups, state, ``step``, ``gap``, ``set_ball``
checks            the inputs it refuses
balls             the balls of parameter groups
momentum          the directions of a step
update            the move towards a vertex
scratch           reused memory
oracle            the interface between a step and its tensors
local             the same for whole tensors
sharded           the same for DTensors
pieces            how DTensors lie on processes
sharded_spectral  singular directions of DTensors
vertices          exact vertices
kept_directions   low-rank vertices that reuse the last step's directions
k_schedule        annealing of k
soft_threshold    proximal steps between the optimizer's
"""

from pliant.optim.checks import RESCALES as RESCALES
from pliant.optim.checks import Rescale as Rescale
from pliant.optim.k_schedule import KSchedule as KSchedule
from pliant.optim.sfw import SFW as SFW
from pliant.optim.soft_threshold import SoftThreshold as SoftThreshold
