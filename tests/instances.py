"""The norms that every property is checked on: all vector norms under all lifts, on shapes that each can hold."""

import math

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral

VECTOR_NORMS = [Lp(1), Lp(1.5), Lp(2), Lp(3), Lp(math.inf), KSparse(1), KSparse(3), KSupport(1), KSupport(3)]

INSTANCES: list[tuple[Norm, tuple[int, ...]]] = []
for inner in VECTOR_NORMS:
    INSTANCES += [(inner, (7,)), (inner, (1, 5)), (inner, (5, 1)), (inner, (4, 3, 2, 2))]
    INSTANCES += [(Rows(inner), (5,)), (Rows(inner), (6, 1)), (Rows(inner), (4, 3, 2, 2)), (Rows(inner, dim=1), (2, 4))]
    INSTANCES += [(Spectral(inner), (4, 6)), (Spectral(inner), (5, 3, 2, 2)), (Spectral(inner, dim=1), (3, 4, 2, 2))]
    INSTANCES += [(Spectral(inner, groups=2), (8, 3, 2, 1))]
    INSTANCES += [(Blocks(inner, 4), (3, 8)), (Blocks(inner, 4), (2, 4, 3, 1)), (Blocks(inner, 4, dim=0), (8, 3))]
INSTANCES += [(Rows(Lp(2)), (1, 4)), (Spectral(KSupport(1)), (1, 6)), (Spectral(KSparse(1)), (6, 1))]
