"""Norms whose unit balls have sparse extreme points, and the balls."""

from pliant.norms.ball import NormBall as NormBall
from pliant.norms.lifts import Blocks as Blocks
from pliant.norms.lifts import Channels as Channels
from pliant.norms.lifts import KSparse as KSparse
from pliant.norms.lifts import KSupport as KSupport
from pliant.norms.lifts import Lp as Lp
from pliant.norms.lifts import Norm as Norm
from pliant.norms.lifts import Rows as Rows
from pliant.norms.lifts import Spectral as Spectral
from pliant.norms.lifts import VectorNorm as VectorNorm
