"""Records: the measurements of a compressed network, one line of JSON each.

A sweep appends a :class:`Record` for each run, compressor and ratio to a JSON Lines file; reports and comparisons
read such files and nothing else. This module needs only the standard library, so records can be read on any machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from pliant.compressor_names import CALIBRATION as CALIBRATION
from pliant.compressor_names import factorises as factorises
from pliant.errors import BadInput, shown
from pliant.jsonl import append_line, read_lines

Key = tuple[str | float, ...]

RECORDS = "records.jsonl"
"""The file of records in the folder of a comparison."""


class LayerCount(TypedDict):
    """The kept parts of one layer; ``kind`` is the unit of ``kept`` and ``total``, for example ``"filters"``."""

    name: str
    kind: str
    kept: int
    total: int
    params: int
    params_dense: int


class Cost(TypedDict):
    """The cost of the training, compared with SGD on the same machine.

    The run took ``seconds``, a step ``step_s`` seconds (``step_s_sgd``: a step of SGD, timed in turns). ``memory`` is
    the number of bytes of the weights, their gradients and the optimizer's state (``memory_sgd``: for SGD). ``equal``
    names the resource that the run and SGD have equally much of: ``"epochs"`` or ``"time"``.
    """

    equal: str
    seconds: float
    step_s: float
    step_s_sgd: float
    memory: int
    memory_sgd: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement of one compressed network; construction checks types and ranges.

    Accuracies and ratios are fractions in [0, 1]. Accuracies come in three kinds: of the network as it was cut ("raw"),
    after the BatchNorm statistics were re-estimated, which changes nothing in a network without BatchNorm, and the
    final one, after the refit if there is one. Names that end in ``_dense`` belong to the trained network before
    compression.

    Raises:
        BadInput: a value has the wrong type, is not finite or lies out of range; the message names the field.
    """

    run: str
    """Name of the training run."""
    method: str
    """How the network was trained, for example ``"sfw-rank"`` or ``"sgd"``."""
    model: str
    """Name of the architecture."""
    data: str
    """Name of the data set."""
    seed: int
    """Seed of the training run."""
    compressor: str
    """Family of the compressor (``filters``, ``heads``, ``rank``, ``weights``, ``nm``, or a chain of them such as
    ``filters+rank``), then any variant after dashes: ``filters-loss-refit``, see
    ``record_name`` in ``compressor_names``."""
    ratio: float
    """Requested share of the compressible parameters to remove; 0 is the dense network."""
    top1: float
    """Test accuracy of the network as it is delivered, refitted or with re-estimated BatchNorm statistics only."""
    top1_raw: float
    """Test accuracy as compressed."""
    top1_dense: float
    """Test accuracy of the dense network, statistics untouched."""
    val_top1: float
    """Validation accuracy of the same network."""
    params: int
    """Parameters that the compressed network stores, zeros included."""
    params_dense: int
    nonzero: int
    """Parameters of the compressed network that are not zero."""
    macs: int
    """Multiply-accumulates of a forward pass of one image; zeros count, because dense kernels multiply them."""
    macs_dense: int
    bytes: int
    """Size of the file that holds the weights."""
    bytes_dense: int
    latency_s: float
    """Seconds per forward pass of ``latency_batch`` images."""
    latency_dense_s: float
    versions: dict[str, str]
    """Versions of the packages that measured, by name."""

    allocation: str = ""
    """How the ratio was spread over the layers, for example ``"uniform"``; empty if there is no choice."""
    pattern: str = ""
    """Pattern such as ``"2:4"``; empty for compressors that take a ratio."""
    ratio_removed: float | None = None
    """Share of the compressible parameters that was actually removed; None if it was not recorded."""
    val_top1_raw: float | None = None
    """Validation accuracy as compressed; None if it was not recorded."""
    top1_reestimated: float | None = None
    """Test accuracy after re-estimating the BatchNorm statistics, before the refit; None in records without it, where
    ``top1`` is that accuracy."""
    val_top1_reestimated: float | None = None
    """Validation accuracy of the same network."""
    refit: dict[str, Any] | None = None
    """What the refit decided on calibration images that were held out, with its ``result`` ("refitted", "reestimated"
    or "cut"), the ``errors`` of the outputs for each of these, the number of ``samples``, and the ``seconds`` of
    choosing what goes, once for all sizes, and of refitting; None without a refit."""
    nonzero_dense: int | None = None
    """None if it was not recorded."""
    latency_batch: int = 1
    chance: float | None = None
    """Accuracy of guessing; None if it was not recorded."""
    cost: Cost | None = None
    """The cost of the training; None if it was not measured."""
    layers: list[LayerCount] = field(default_factory=list)
    """The kept parts of every compressed layer."""
    refused: list[list[str]] = field(default_factory=list)
    """Pairs [name, reason] of the parts that could not be compressed safely."""
    weights: str = ""
    """SHA-256 (hexadecimal) of the run's ``model.safetensors``; empty if unknown."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the training run, such as k, radius, rescale and epochs."""
    created: str = ""
    """Time of the measurement, ISO 8601."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of the file that this version does not know; they are written back unchanged."""

    def __post_init__(self) -> None:
        for name in ("run", "method", "model", "data", "compressor"):
            _check_text(name, getattr(self, name), may_be_empty=False)
        for name in ("allocation", "pattern", "weights", "created"):
            _check_text(name, getattr(self, name), may_be_empty=True)
        for name in ("ratio", "top1", "top1_raw", "top1_dense", "val_top1"):
            self._set(name, _fraction(name, getattr(self, name)))
        for name in ("ratio_removed", "val_top1_raw", "top1_reestimated", "val_top1_reestimated", "chance"):
            if getattr(self, name) is not None:
                self._set(name, _fraction(name, getattr(self, name)))
        for name in ("seed", "params", "nonzero", "macs", "bytes"):
            _check_count(name, getattr(self, name), least=0)
        # All shares are relative to the dense sizes, so none of these may be zero.
        for name in ("params_dense", "macs_dense", "bytes_dense", "latency_batch"):
            _check_count(name, getattr(self, name), least=1)
        if self.nonzero_dense is not None:
            _check_count("nonzero_dense", self.nonzero_dense, least=1)
        if self.nonzero > self.params:
            raise BadInput(f"nonzero must be at most params={self.params}, got {self.nonzero}")
        for name in ("latency_s", "latency_dense_s"):
            self._set(name, _seconds(name, getattr(self, name)))
        if self.cost is not None:
            self._set("cost", _plain("cost", self.cost, dict))
            _check_cost(self.cost)
        if self.refit is not None:
            self._set("refit", _plain("refit", self.refit, dict))
        for name in ("versions", "config", "extra"):
            self._set(name, _plain(name, getattr(self, name), dict))
        for name in ("layers", "refused"):
            self._set(name, _plain(name, getattr(self, name), list))
        for name, version in self.versions.items():
            _check_text(f"versions[{name!r}]", version, may_be_empty=True)
        for index, layer in enumerate(self.layers):
            _check_layer(f"layers[{index}]", layer)
        for index, pair in enumerate(self.refused):
            if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
                raise BadInput(f"refused[{index}] must be a pair [name, reason] of strings, got {shown(pair)}")
        if self.created:
            try:
                datetime.datetime.fromisoformat(self.created)
            except ValueError:
                raise BadInput(f"created must be an ISO 8601 time, got {shown(self.created)}") from None
        if clash := sorted(set(self.extra) & _FIELDS):
            raise BadInput(f"extra must not hold fields of a Record, got {', '.join(clash)}")

    def key(self) -> Key:
        """Return the key that identifies the measurement: a sweep skips records whose key its file already has."""
        return record_key(
            run=self.run,
            weights=self.weights,
            compressor=self.compressor,
            allocation=self.allocation,
            ratio=self.ratio,
            pattern=self.pattern,
            config=self.config,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON, with the ``extra`` fields among the others.

        What only a refit gives is left out where it is None, as in records of earlier versions.
        """
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "extra"}
        return {
            name: value for name, value in values.items() if name not in _OF_REFIT or value is not None
        } | self.extra

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Return the record that :meth:`to_dict` described; unknown fields go to ``extra``.

        Raises:
            BadInput: required fields are missing, or a value is not valid.
        """
        if missing := [name for name in _REQUIRED if name not in values]:
            raise BadInput(f"a record needs the field{'s' * (len(missing) > 1)} {', '.join(missing)}")
        known = {name: value for name, value in values.items() if name in _FIELDS}
        return cls(**known, extra={name: value for name, value in values.items() if name not in _FIELDS})

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; only __post_init__ calls this


def record_key(
    *, run: str, weights: str, compressor: str, allocation: str, ratio: float, pattern: str, config: Mapping[str, Any]
) -> Key:
    """Return the :meth:`Record.key` of a record with these fields."""
    # Rounded, so that 0.1 + 0.2 and 0.3 are the same ratio.
    size = pattern or round(ratio, 6)
    measured = tuple(json.dumps(config.get(name)) for name in ("calibration", "evaluation_precision", "controls"))
    return run, weights, compressor, allocation, size, *measured


_FIELDS = frozenset(item.name for item in dataclasses.fields(Record) if item.name != "extra")
_OF_REFIT = ("top1_reestimated", "val_top1_reestimated", "refit")
_REQUIRED = tuple(
    item.name
    for item in dataclasses.fields(Record)
    if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
)


def append_record(path: str | Path, record: Record) -> None:
    """Append ``record`` to the JSON Lines file at ``path`` and wait until it is on disk.

    A file whose name ends in ``.gz`` is packed with gzip, and remains packed.

    Raises:
        DamagedFile: the file is not a JSON Lines file.
        OSError: the disk is full, or the file cannot be written; it keeps its former lines.
    """
    append_line(path, record.to_dict())


def read_records(path: str | Path) -> list[Record]:
    """Return the records of the JSON Lines file at ``path``, plain or packed with gzip, in their order.

    An empty file holds none.

    Raises:
        DamagedFile: there is no such file, it cannot be unpacked, or a line is not a record; the message names file
            and line. (A cut last line is ignored.)
    """
    return read_lines(path, Record.from_dict, "records")


def records_file(folder: Path) -> Path:
    """Return the file of records in a folder, which need not exist: ``records.jsonl.gz`` if it was packed.

    Raises:
        BadInput: both files exist, so that it is not clear which one counts.
    """
    plain, packed = folder / RECORDS, folder / f"{RECORDS}.gz"
    if plain.exists() and packed.exists():
        raise BadInput(f"{folder} holds {plain.name} and {packed.name}: keep one of them, with the records of both")
    return packed if packed.exists() else plain


def _check_text(name: str, value: object, *, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise BadInput(f"{name} must be a string, got {shown(value)}")
    if not value and not may_be_empty:
        raise BadInput(f"{name} must not be empty")
    try:
        value.encode()  # half of a surrogate pair fits into a string but into no file
    except UnicodeEncodeError as error:
        raise BadInput(f"{name} must be valid Unicode, got {shown(value)} ({error.reason})") from None


def _check_count(name: str, value: object, *, least: int) -> None:
    if type(value) is not int or value < least:  # not isinstance: True is no count
        raise BadInput(f"{name} must be an integer of at least {least}, got {shown(value)}")


def _real(name: str, value: object) -> float:
    # Compare with the largest float, because an integer may exceed it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise BadInput(f"{name} must be a finite number, got {shown(value)}")
    return float(value)


def _fraction(name: str, value: object) -> float:
    number = _real(name, value)
    if not 0 <= number <= 1:
        raise BadInput(f"{name} must be a fraction between 0 and 1, got {number}")
    return number


def _seconds(name: str, value: object) -> float:
    number = _real(name, value)
    if number <= 0:
        raise BadInput(f"{name} must be a positive number of seconds, got {number}")
    return number


def _plain(name: str, value: object, kind: type) -> Any:
    """Return a copy of ``value`` as JSON restores it (tuples as lists), so that a record equals its line."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name} must be plain JSON data: {error}") from None
    if not isinstance(copy, kind):
        raise BadInput(f"{name} must be a {kind.__name__}, got {shown(value)}")
    return copy


def _check_cost(cost: object) -> None:
    if not isinstance(cost, dict) or Cost.__required_keys__ - cost.keys():
        raise BadInput(f"cost must be a dict with {', '.join(Cost.__annotations__)}, got {shown(cost)}")
    if cost["equal"] not in ("epochs", "time"):
        raise BadInput(f"cost.equal must be 'epochs' or 'time', got {shown(cost['equal'])}")
    for entry in ("seconds", "step_s", "step_s_sgd"):
        _seconds(f"cost.{entry}", cost[entry])
    for entry in ("memory", "memory_sgd"):
        _check_count(f"cost.{entry}", cost[entry], least=1)


def _check_layer(name: str, layer: object) -> None:
    if not isinstance(layer, dict) or LayerCount.__required_keys__ - layer.keys():
        needed = ", ".join(LayerCount.__annotations__)
        raise BadInput(f"{name} must be a dict with {needed}, got {shown(layer)}")
    _check_text(f"{name}.name", layer["name"], may_be_empty=False)
    _check_text(f"{name}.kind", layer["kind"], may_be_empty=False)
    for entry in ("kept", "params"):
        _check_count(f"{name}.{entry}", layer[entry], least=0)
    for entry in ("total", "params_dense"):
        _check_count(f"{name}.{entry}", layer[entry], least=1)
    if layer["kept"] > layer["total"]:
        raise BadInput(f"{name}.kept must be at most total={layer['total']}, got {layer['kept']}")
