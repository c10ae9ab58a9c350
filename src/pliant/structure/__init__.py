"""What can be taken out of a network: layers, coupled channels, heads, and the proof."""

from pliant.structure.channel_groups import ChannelGroup as ChannelGroup
from pliant.structure.channel_groups import Slot as Slot
from pliant.structure.channel_groups import Structure as Structure
from pliant.structure.verification import coupled_channels as coupled_channels
from pliant.structure.verification import positions as positions
