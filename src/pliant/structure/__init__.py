"""Parts that can be removed from a network, with a numerical proof.

attention         which layers produce the heads of an attention module, and how many heads there are
thin_attention    ``nn.MultiheadAttention`` with fewer heads
layers            facts about single layers: where their channels lie, whether the weight may be changed
channel_groups    groups of channels that leave a network together, as plain data
labels            labels of numbers: to which channel each belongs, and which channels are coupled
flow              the labels of everything that a forward computes
channels          candidates: coupled channels, from these labels
fused             PyTorch's transformer layers, which call their layers or read their weights
heads             candidates: the heads of attention modules
draws             conditions under which networks of different widths are compared: random numbers, types
proof             ``Proof``: whether a network without some channels equals its masked twin, in float64
free_tensors      candidates: tensors of other modules along the channels
counts            how many channels of a group may stay
verification      ``coupled_channels``: which candidates can be removed
reasons           what to do about each reason why a layer is left alone
soundness         the largest part of a list that is sound together, by bisection
"""

from pliant.structure.attention import Projections as Projections
from pliant.structure.attention import is_conv1d as is_conv1d
from pliant.structure.attention import linear_width as linear_width
from pliant.structure.attention import projections as projections
from pliant.structure.channel_groups import ChannelGroup as ChannelGroup
from pliant.structure.channel_groups import Slot as Slot
from pliant.structure.channel_groups import Structure as Structure
from pliant.structure.counts import kept_fault as kept_fault
from pliant.structure.counts import larger_counts as larger_counts
from pliant.structure.counts import positions as positions
from pliant.structure.fused import call_layers as call_layers
from pliant.structure.fused import can_be_thin as can_be_thin
from pliant.structure.heads import packed_obstacle as packed_obstacle
from pliant.structure.heads import projection_layers as projection_layers
from pliant.structure.layers import AxisName as AxisName
from pliant.structure.layers import axes as axes
from pliant.structure.layers import axis_length as axis_length
from pliant.structure.layers import axis_of as axis_of
from pliant.structure.layers import complement as complement
from pliant.structure.layers import keep_channels as keep_channels
from pliant.structure.layers import named_layers as named_layers
from pliant.structure.layers import obstacle as obstacle
from pliant.structure.layers import other_matrices as other_matrices
from pliant.structure.layers import own_forward as own_forward
from pliant.structure.layers import tensors_along as tensors_along
from pliant.structure.layers import tied_parameters as tied_parameters
from pliant.structure.layers import untransposed as untransposed
from pliant.structure.layers import weighted_layers as weighted_layers
from pliant.structure.layers import zero_channels as zero_channels
from pliant.structure.proof import Proof as Proof
from pliant.structure.reasons import ADVICE as ADVICE
from pliant.structure.reasons import advice as advice
from pliant.structure.reasons import advised as advised
from pliant.structure.soundness import largest_sound as largest_sound
from pliant.structure.thin_attention import ThinAttention as ThinAttention
from pliant.structure.thin_attention import thin as thin
from pliant.structure.verification import coupled_channels as coupled_channels
