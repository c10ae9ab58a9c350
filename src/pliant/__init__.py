"""Train once, deploy at any size: compression-aware training with Stochastic Frank-Wolfe.

The names below are the public ones. They are loaded when first used, so that ``import pliant`` is quick and
``pliant.report`` works where torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from pliant.compression import Chain as Chain
    from pliant.compression import FilterPruning as FilterPruning
    from pliant.compression import HeadPruning as HeadPruning
    from pliant.compression import Int8 as Int8
    from pliant.compression import LowRank as LowRank
    from pliant.compression import Magnitude as Magnitude
    from pliant.compression import Plan as Plan
    from pliant.compression import SemiStructured as SemiStructured
    from pliant.compression import compress as compress
    from pliant.compression import reestimate_batchnorm as reestimate_batchnorm
    from pliant.compression import replay as replay
    from pliant.compression.budgets import compress_to as compress_to
    from pliant.constraints.parameter_groups import KSchedule as KSchedule
    from pliant.constraints.parameter_groups import constrain as constrain
    from pliant.constraints.parameter_groups import filters as filters
    from pliant.constraints.parameter_groups import l2 as l2
    from pliant.constraints.parameter_groups import rank as rank
    from pliant.constraints.parameter_groups import semi_structured as semi_structured
    from pliant.constraints.parameter_groups import weights as weights
    from pliant.constraints.transformer_rules import transformer_rules as transformer_rules
    from pliant.errors import BadInput as BadInput
    from pliant.errors import Busy as Busy
    from pliant.errors import DamagedFile as DamagedFile
    from pliant.errors import Diverged as Diverged
    from pliant.errors import PliantError as PliantError
    from pliant.errors import Refused as Refused
    from pliant.experiments.compare import compare as compare
    from pliant.experiments.data import Loader as Loader
    from pliant.experiments.data import load_data as load_data
    from pliant.experiments.demo import demo as demo
    from pliant.experiments.models import build_model as build_model
    from pliant.experiments.run_folder import load as load
    from pliant.experiments.run_folder import rebuild as rebuild
    from pliant.experiments.sweep import sweep as sweep
    from pliant.experiments.train import train as train
    from pliant.exporting.folder import export as export
    from pliant.norms.ball import NormBall as NormBall
    from pliant.norms.lifts import Blocks as Blocks
    from pliant.norms.lifts import Channels as Channels
    from pliant.norms.lifts import KSparse as KSparse
    from pliant.norms.lifts import KSupport as KSupport
    from pliant.norms.lifts import Lp as Lp
    from pliant.norms.lifts import Norm as Norm
    from pliant.norms.lifts import Rows as Rows
    from pliant.norms.lifts import Spectral as Spectral
    from pliant.optim.sfw import SFW as SFW
    from pliant.optim.soft_threshold import SoftThreshold as SoftThreshold
    from pliant.records import Record as Record
    from pliant.records import append_record as append_record
    from pliant.records import read_records as read_records
    from pliant.reporting.page import report as report
    from pliant.structure.verification import coupled_channels as coupled_channels

_HOMES = {
    "norms.ball": ["NormBall"],
    "constraints.transformer_rules": ["transformer_rules"],
    "compression.budgets": ["compress_to"],
    "experiments.compare": ["compare"],
    "compression": [
        "Chain",
        "FilterPruning",
        "HeadPruning",
        "Int8",
        "LowRank",
        "Magnitude",
        "Plan",
        "SemiStructured",
        "compress",
        "reestimate_batchnorm",
        "replay",
    ],
    "constraints.parameter_groups": ["KSchedule", "constrain", "filters", "l2", "rank", "semi_structured", "weights"],
    "experiments.data": ["Loader", "load_data"],
    "experiments.demo": ["demo"],
    "errors": ["BadInput", "Busy", "DamagedFile", "Diverged", "PliantError", "Refused"],
    "exporting.folder": ["export"],
    "experiments.models": ["build_model"],
    "norms.lifts": ["Blocks", "Channels", "KSparse", "KSupport", "Lp", "Norm", "Rows", "Spectral"],
    "records": ["Record", "append_record", "read_records"],
    "reporting.page": ["report"],
    "experiments.run_folder": ["load", "rebuild"],
    "optim.sfw": ["SFW"],
    "structure.verification": ["coupled_channels"],
    "experiments.sweep": ["sweep"],
    "optim.soft_threshold": ["SoftThreshold"],
    "experiments.train": ["train"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pliant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pliant.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
