"""The methods that pliant is compared with, each as small as possible, one file each.

Most are :class:`MatrixSGD`: SGD that changes gradients before a step, or weights after it. Baselines use neither norms
nor balls nor SFW, so that a mistake there cannot affect both sides of a comparison; and like SFW, they do not depend on
the compressors.

base                             SGD with two hooks
matrices, products               weights as matrices; trained as products of factors
ssl, glt, pat, cram              towards few filters (pat and cram also towards low rank, cram towards few weights)
nuc, cat, trp, lorita, condlr    towards low rank
spectral_decay, q3r, numuon      towards low rank
muon, scion                      steps of equal lengths along singular directions
retraining                       prune, then train again
"""

from pliant.experiments.baselines.base import MatrixSGD as MatrixSGD
from pliant.experiments.baselines.cat import CAT as CAT
from pliant.experiments.baselines.condlr import Conditioned as Conditioned
from pliant.experiments.baselines.condlr import CondLR as CondLR
from pliant.experiments.baselines.cram import CrAM as CrAM
from pliant.experiments.baselines.glt import GLT as GLT
from pliant.experiments.baselines.lorita import Composition as Composition
from pliant.experiments.baselines.muon import Muon as Muon
from pliant.experiments.baselines.nuc import NUC as NUC
from pliant.experiments.baselines.numuon import NuMuon as NuMuon
from pliant.experiments.baselines.pat import pat_optimizer as pat_optimizer
from pliant.experiments.baselines.products import Product as Product
from pliant.experiments.baselines.products import factorise as factorise
from pliant.experiments.baselines.products import merged as merged
from pliant.experiments.baselines.q3r import Q3R as Q3R
from pliant.experiments.baselines.retraining import cycles as cycles
from pliant.experiments.baselines.retraining import rates as rates
from pliant.experiments.baselines.retraining import retrain as retrain
from pliant.experiments.baselines.scion import Scion as Scion
from pliant.experiments.baselines.spectral_decay import SpectralDecay as SpectralDecay
from pliant.experiments.baselines.ssl import SSL as SSL
from pliant.experiments.baselines.trp import TRP as TRP
