"""The methods that pliant is compared with, each as small as it can be, one file each.

Most are :class:`MatrixSGD`: SGD that changes gradients before a step, or weights after it. A baseline knows neither
norms nor balls nor SFW, so that a mistake there cannot help or harm both sides of a comparison; and, as SFW, it knows
nothing of the compressors.
"""

from pliant.baselines.base import MatrixSGD
from pliant.baselines.cat import CAT
from pliant.baselines.condlr import Conditioned, CondLR
from pliant.baselines.cram import CrAM
from pliant.baselines.glt import GLT
from pliant.baselines.lorita import Composition
from pliant.baselines.muon import Muon
from pliant.baselines.nuc import NUC
from pliant.baselines.numuon import KAnnealing, NuMuon
from pliant.baselines.pat import pat_optimizer
from pliant.baselines.products import Product, factorise, merged
from pliant.baselines.q3r import Q3R
from pliant.baselines.retraining import cycles, rates, retrain
from pliant.baselines.scion import Scion
from pliant.baselines.spectral_decay import SpectralDecay
from pliant.baselines.ssl import SSL
from pliant.baselines.trp import TRP

__all__ = [
    "CAT",
    "GLT",
    "NUC",
    "Q3R",
    "SSL",
    "TRP",
    "Composition",
    "CondLR",
    "Conditioned",
    "CrAM",
    "KAnnealing",
    "MatrixSGD",
    "Muon",
    "NuMuon",
    "Product",
    "Scion",
    "SpectralDecay",
    "cycles",
    "factorise",
    "merged",
    "pat_optimizer",
    "rates",
    "retrain",
]
