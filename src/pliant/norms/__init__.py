"""Norms whose unit balls have sparse extreme points, and the balls.

base         the interface of a norm, and the methods that each kind of norm implements
vector       norms of the entries: ``Lp(p)``, ``KSparse(k)``, ``KSupport(k)``
lifts        a vector norm applied to rows, channels, singular values or blocks
ball         a norm and a radius: the set that weights live in
projections  the nearest points of k-norm balls
shapes       how a tensor is read as a matrix, and how it is scaled

The pieces combine: ``Rows(KSupport(8))`` is the ball for "few filters", ``Spectral(KSupport(8))`` the one for "low
rank", and ``Blocks(KSupport(2), 4)`` the one for 2:4 patterns.
"""

from pliant.norms.ball import NormBall as NormBall
from pliant.norms.base import Norm as Norm
from pliant.norms.base import is_norm as is_norm
from pliant.norms.lifts import Blocks as Blocks
from pliant.norms.lifts import Channels as Channels
from pliant.norms.lifts import Lift as Lift
from pliant.norms.lifts import Rows as Rows
from pliant.norms.lifts import Spectral as Spectral
from pliant.norms.shapes import Rebuild as Rebuild
from pliant.norms.shapes import Shape as Shape
from pliant.norms.shapes import Tensors as Tensors
from pliant.norms.vector import KNorm as KNorm
from pliant.norms.vector import KSparse as KSparse
from pliant.norms.vector import KSupport as KSupport
from pliant.norms.vector import Lp as Lp
from pliant.norms.vector import VectorNorm as VectorNorm
