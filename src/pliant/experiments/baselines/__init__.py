"""The methods that pliant is compared with, each as small as it can be, one file each.

Most are :class:`MatrixSGD`: SGD that changes gradients before a step, or weights after it. A baseline knows neither
norms nor balls nor SFW, so that a mistake there cannot help or harm both sides of a comparison; and, as SFW, it knows
nothing of the compressors.
"""

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.cat import CAT
from pliant.experiments.baselines.condlr import Conditioned, CondLR
from pliant.experiments.baselines.cram import CrAM
from pliant.experiments.baselines.glt import GLT
from pliant.experiments.baselines.lorita import Composition
from pliant.experiments.baselines.muon import Muon
from pliant.experiments.baselines.nuc import NUC
from pliant.experiments.baselines.numuon import NuMuon
from pliant.experiments.baselines.pat import pat_optimizer
from pliant.experiments.baselines.products import Product, factorise, merged
from pliant.experiments.baselines.q3r import Q3R
from pliant.experiments.baselines.retraining import cycles, rates, retrain
from pliant.experiments.baselines.scion import Scion
from pliant.experiments.baselines.spectral_decay import SpectralDecay
from pliant.experiments.baselines.ssl import SSL
from pliant.experiments.baselines.trp import TRP

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
