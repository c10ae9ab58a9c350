"""The optimizer SFW, and what goes along with its steps.

* ``sfw``: the optimizer: options, groups, state, ``step``, ``gap``, ``set_ball``;
* ``checks``: what it refuses; ``balls``: those of groups, as plain data and as objects;
* ``momentum``: the directions; ``update``: towards a vertex; ``scratch``: memory;
* ``oracle``: what a step asks of tensors, answered by ``local`` for whole ones and ``sharded`` for DTensors;
* ``vertices``, ``kept_directions``: exact vertices, and those of low rank from the last step's;
* ``pieces``, ``sharded_spectral``: how DTensors lie on processes, and their singular directions;
* ``k_schedule``: k from many to few; ``soft_threshold``: what vertices do not agree on, taken off.
"""

from pliant.optim.checks import RESCALES as RESCALES
from pliant.optim.checks import Rescale as Rescale
from pliant.optim.k_schedule import KSchedule as KSchedule
from pliant.optim.sfw import SFW as SFW
from pliant.optim.soft_threshold import SoftThreshold as SoftThreshold
