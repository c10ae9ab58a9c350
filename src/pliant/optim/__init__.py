"""The optimizer SFW, and the schedules that accompany its steps.

sfw               the optimizer: options, groups, state, ``step``, ``gap``, ``set_ball``, ``bring_inside``
checks            the inputs it refuses
loading           the states it refuses, and what it keeps of those it loads
balls             the balls of parameter groups
feasibility       which tensors are in their balls
moves             what a step does to tensors with a ball and without
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
annealing         k as it changes over the steps, kept in the groups
thresholding      proximal steps between the optimizer's, kept in the groups
k_schedule        the schedule that starts an annealing
soft_threshold    the same for thresholds
wrapped           the optimizer inside the wrappers of training libraries
"""

from pliant.optim.checks import RESCALES as RESCALES
from pliant.optim.checks import Rescale as Rescale
from pliant.optim.k_schedule import KSchedule as KSchedule
from pliant.optim.sfw import SFW as SFW
from pliant.optim.soft_threshold import SoftThreshold as SoftThreshold
