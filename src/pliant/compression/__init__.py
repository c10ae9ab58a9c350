"""Compression after training, without retraining: the same code for every network, however it was trained.

A compressor returns a :class:`Plan` (plain data, no side effect) and applies it to a copy::

    small = compress(model, LowRank(ratio=0.7), example_inputs)

base          the compressor: analyse once, plan for any ratio, apply to a copy
plan          the plan, as plain data
fields        plain data from files, field by field
applying      ``compress``, and the same from a stored plan
by_name       compressors by their names in the shell and in plans, including those of other packages
controls      what users ask of filters, heads and rank: multiples, floors, ceilings, layers to keep, ratios of layers
allocation    how a ratio is shared out among the layers
calibration   batches of data, checked and split
rows          inputs and outputs of a layer at some of its positions
observing     the linear maps of a network, and their inputs and outputs while it runs
moments       second moments of the inputs
inputs        moments of all layers within bounded memory, and weights as matrices that match them
compensation  zeroing and rounding weights while others make up for it
choosing      loss curves of groups of channels
ranking       what channels are worth by their weights
elimination   which channels the others can make up for
removals      in which order channels leave
filters       removes coupled channels
heads         removes attention heads
rank          factorises layers
entries       zeroes single weights
quantised     stores weights in eight bits
chain         several compressors in a row
budgets       ``compress_to``: as little compression as a limit on size, time or accuracy allows
costs         how often each weight is applied
whitening     second moments of the layers' outputs on data
factored      two thin layers that replace one
rewiring      replacing modules of a model by others
batchnorm     re-estimation of BatchNorm statistics
fitting       least squares for one layer
refit         the weights that are left make up for what has gone
path          all sizes of one network as plain data
elastic       a network in every size: small corrections of its dense weights
ladder        makes a network elastic
corrections   differences of weights in a few bits
"""

from pliant.compression.applying import compress as compress
from pliant.compression.applying import replay as replay
from pliant.compression.applying import skeleton as skeleton
from pliant.compression.base import Analysis as Analysis
from pliant.compression.base import Compressor as Compressor
from pliant.compression.base import check_ratio as check_ratio
from pliant.compression.base import parameter_shapes as parameter_shapes
from pliant.compression.batchnorm import reestimate_batchnorm as reestimate_batchnorm
from pliant.compression.budgets import compress_to as compress_to
from pliant.compression.chain import Chain as Chain
from pliant.compression.compensation import largest as largest
from pliant.compression.controls import Controlled as Controlled
from pliant.compression.entries import Magnitude as Magnitude
from pliant.compression.entries import SemiStructured as SemiStructured
from pliant.compression.entries import Weights as Weights
from pliant.compression.entries import Zeroing as Zeroing
from pliant.compression.entries import weight_plan as weight_plan
from pliant.compression.filters import FilterPruning as FilterPruning
from pliant.compression.filters import masked_twin as masked_twin
from pliant.compression.heads import HeadPruning as HeadPruning
from pliant.compression.plan import LayerPlan as LayerPlan
from pliant.compression.plan import Plan as Plan
from pliant.compression.plan import weight_shape as weight_shape
from pliant.compression.quantised import Int8 as Int8
from pliant.compression.rank import LowRank as LowRank
