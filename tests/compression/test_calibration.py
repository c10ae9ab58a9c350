"""Calibration data: whatever loaders give, checked once, the same in every pass; or one clear line."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pliant.compression import FilterPruning, calibration, compress
from pliant.compression.calibration import Calibration, calibration_of
from pliant.errors import BadInput

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40)
OTHER = random.Random(0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Two(nn.Module):
    """Takes two inputs, by place or by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b((self.a(x) * scale).relu())


def seen(data: Calibration) -> Tensor:
    return torch.cat([inputs["x"] if isinstance(inputs, dict) else inputs[0] for inputs in data.inputs()])


class Drawn:
    """A collection of batches that a function makes anew in every pass."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        yield from self.make()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All data is too large to be kept."""
    monkeypatch.setattr(calibration, "MEMORY", 0)


# --- what a batch may be ------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "bare tensor": X,
    "one tensor": [X],
    "tensors": list(X.split(7)),
    "tuples": [(x, y) for x, y in zip(X.split(10), Y.split(10), strict=True)],
    "lists": [[x, y] for x, y in zip(X.split(10), Y.split(10), strict=True)],
    "lists of one": [[x] for x in X.split(10)],
    "nested": [((x,), y) for x, y in zip(X.split(10), Y.split(10), strict=True)],
    "a tuple of batches": tuple(X.split(20)),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=16),
    "last batch smaller": DataLoader(TensorDataset(X), batch_size=13),
    "batches of one": DataLoader(TensorDataset(X), batch_size=1),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_every_form_gives_the_same_samples_in_order(name: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MEMORY", memory)
    data = Calibration(FORMS[name], network(), X[:2])
    assert data.samples == 40
    for _ in range(2):
        assert torch.equal(seen(data), X)
    assert len(list(data.inputs())) == len(list(data)) == len(data) == len(data.batch_of) >= calibration.PIECES - 2
    assert all(isinstance(batch, tuple) and len(batch) == 1 for batch in data)
    again = Calibration(data, network(), X[:2])  # what it yields is data, too
    assert torch.equal(seen(again), X)
    assert calibration_of(data, network(), X[:2]) is data


NAMED: dict[str, Any] = {
    "dicts": [{"x": x, "scale": torch.ones(len(x), 1), "labels": x[:, 0]} for x in X.split(10)],
    "one dict": {"x": X, "scale": torch.ones(40, 1), "labels": Y},
    "dicts and labels": [({"x": x, "scale": torch.ones(len(x), 1)}, 3) for x in X.split(10)],
    "of a class like dict": [UserDict(x=x, scale=torch.ones(len(x), 1), ids=["a"]) for x in X.split(10)],
}


@pytest.mark.parametrize("name", NAMED)
def test_dicts_give_the_arguments_that_the_example_names(name: str) -> None:
    example = {"x": X[:2], "scale": torch.ones(2, 1)}
    data = Calibration(NAMED[name], Two(), example)
    assert torch.equal(seen(data), X)
    assert all(set(inputs) == {"x", "scale"} for inputs in data.inputs())
    assert all(isinstance(batch[0], dict) for batch in data)
    small = compress(Two(), FilterPruning(0.5), example, NAMED[name])
    assert small(**example).isfinite().all()


def test_several_inputs_by_place() -> None:
    batches = [((x, torch.ones(len(x), 1)), y) for x, y in zip(X.split(10), Y.split(10), strict=True)]
    data = Calibration(batches, Two(), (X[:2], torch.ones(2, 1)))
    assert torch.equal(seen(data), X)
    assert all(len(inputs) == 2 and len(inputs[0]) == len(inputs[1]) for inputs in data.inputs())
    assert all(len(batch[0]) == 2 for batch in data)
    assert compress(Two(), FilterPruning(0.5), (X[:2], torch.ones(2, 1)), batches)(X, X[:, :1]).isfinite().all()


# --- pieces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([40], 8),
        ([16], 8),
        ([8], 4),
        ([5], 2),
        ([3], 2),
        ([2], 2),
        ([1], 1),
        ([20, 20], 8),
        ([7, 1, 9], 7),
        ([4] * 9, 9),
    ],
)
def test_few_batches_are_split_into_pieces_of_two_samples_at_least(sizes: list[int], pieces: int) -> None:
    batches = [torch.randn(size, 6) for size in sizes]
    data = Calibration(batches, network(), X[:2])
    assert data.pieces == pieces
    assert torch.equal(seen(data), torch.cat(batches))
    lengths = [len(inputs[0]) for inputs in data.inputs()]
    assert min(lengths) >= (2 if min(sizes) > 3 else 1)
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    assert [data.batch_of[piece] for piece, n in enumerate(lengths) for _ in range(n)] == numbers


def test_a_batch_whose_tensors_differ_in_length_is_not_split() -> None:
    batches = [((x, torch.ones(1, 1)), None) for x in X.split(20)]
    data = Calibration(batches, Two(), (X[:2], torch.ones(1, 1)))
    assert (data.samples, data.pieces, data.batch_of) == (40, 2, [0, 1])


@pytest.mark.parametrize("pieces", range(1, 30))
def test_of_two_pieces_or_more_some_are_held_out_and_some_are_not(pieces: int) -> None:
    data = Calibration([torch.randn(1, 6) for _ in range(pieces)], network(), X[:2])
    held = [data.held_out(piece) for piece in range(data.pieces)]
    assert len(held) == pieces
    assert any(held) == (pieces > 1)
    assert not all(held)
    assert sum(held) <= max(1, pieces // 2)


# --- every pass is the same ---------------------------------------------------------------------------------


def shuffled() -> Iterator[Any]:
    order = OTHER.sample(range(40), 40)  # not of PyTorch's generator, whose state is restored
    yield from ((X[order[i : i + 8]], None) for i in range(0, 40, 8))


def test_small_data_of_a_loader_that_shuffles_is_kept_from_the_first_pass() -> None:
    loader = DataLoader(TensorDataset(X), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    for data in (Calibration(Drawn(shuffled), network(), X[:2]), Calibration(loader, network(), X[:2])):
        first = seen(data)
        assert torch.equal(first.sort(0).values, X.sort(0).values)
        assert not torch.equal(first, X)
        assert torch.equal(seen(data), first)


def test_a_loader_may_use_the_memory_of_a_batch_again() -> None:
    def buffered() -> Iterator[Tensor]:
        buffer = torch.empty(8, 6)
        for x in X.split(8):
            yield buffer.copy_(x)

    assert torch.equal(seen(Calibration(Drawn(buffered), network(), X[:2])), X)


@pytest.mark.usefixtures("large")
def test_large_data_that_changes_is_bad_input() -> None:
    data = Calibration(Drawn(shuffled), network(), X[:2])
    with pytest.raises(BadInput, match="changes from pass to pass, at first in batch 0: use shuffle=False"):
        seen(data)
    own = DataLoader(TensorDataset(X), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    with pytest.raises(BadInput, match="changes from pass to pass"):
        compress(network(), FilterPruning(0.5), X[:2], own)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("then", [X[:32], X[:33], torch.cat([X, X[:1]]), X[:0]])
def test_large_data_that_grows_or_shrinks_is_bad_input(then: Tensor) -> None:
    passes = iter([X, then])
    data = Calibration(Drawn(lambda: next(passes).split(8)), network(), X[:2])
    with pytest.raises(BadInput, match="changes from pass to pass"):
        seen(data)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("size", [3, 200])
def test_any_number_that_changes_everywhere_is_noticed(size: int) -> None:
    images = torch.randn(4, 3, size, size)
    for change in (lambda x: x.flip(0), lambda x: x.flip(3), lambda x: x * (1 + 1e-6), lambda x: x.roll(1, 0)):
        passes = iter([images, change(images)])
        data = Calibration(Drawn(lambda passes=passes: [next(passes)]), network(), X[:2])
        with pytest.raises(BadInput, match="changes from pass to pass, at first in batch 0"):
            list(data.inputs())


class Noisy(Dataset[Tensor]):
    """Augments with PyTorch's generator."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Tensor:
        return X[index] + torch.randn(6)


@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_passes_start_from_one_random_state_and_the_state_outside_stays(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MEMORY", memory)
    model = network()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    data = Calibration(DataLoader(Noisy(), 8, shuffle=True), model, X[:2])
    assert torch.equal(torch.get_rng_state(), before)
    first = seen(data)
    assert not torch.equal(first, X)
    for inputs in data.inputs():
        assert inputs
        assert torch.equal(torch.get_rng_state(), before)
    drawn = []
    for _ in data.inputs():
        drawn.append(torch.randn(()))  # draws of the consumer do not mix with those of the loader
    assert len(set(map(float, drawn))) == data.pieces
    assert torch.equal(seen(data), first)


# --- bad input ----------------------------------------------------------------------------------------------

NAN, INFINITE = X.clone(), X.clone()
NAN[37, 2], INFINITE[0, 0] = float("nan"), float("-inf")
BAD: dict[str, tuple[Any, str]] = {
    "empty list": ([], "the calibration data is empty"),
    "empty loader": (DataLoader(TensorDataset(X[:0]), 8), "the calibration data is empty"),
    "batch without samples": ([X[:0]], "the calibration data is empty"),
    "iterator": (iter([X]), "give a list or a loader, not an iterator"),
    "generator": ((x for x in X.split(8)), "give a list or a loader, not an iterator"),
    "str": ("images", "must be a list of batches or a loader, not str"),
    "bytes": (b"images", "must be a list of batches or a loader, not bytes"),
    "number": (3, "must be a list of batches or a loader, not int"),
    "data set": (Noisy(), "must be a list of batches or a loader, not Noisy"),
    "strings": (["a"], "batch 0: the inputs must be a tensor.* not str"),
    "None": ([X, None], "batch 1: the inputs must be a tensor.* not NoneType"),
    "numbers": ([X, (3, 4)], "batch 1: the inputs must be a tensor.* not int"),
    "empty batch": ([[]], "batch 0"),
    "NaN": (list(NAN.split(8)), "batch 4 holds NaN or infinity"),
    "infinity": (INFINITE, "batch 0 holds NaN or infinity"),
    "constant": (torch.ones(10, 6), "all 10 samples of the calibration data are equal: give samples that differ"),
    "one sample again and again": ([(X[:1], i) for i in range(9)], "all 9 samples of the calibration data are equal"),
    "wrong shape": ([X[:10], X[:10], X[:10, :5]], "cannot be called on calibration batch 2: "),
    "dict for a network of tensors": ([{"a": X}], "cannot be called on calibration batch 0: "),
    "single sample": ([X[:1]], "is a single sample.* give at least two batches, or refit=False"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_clear_line(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(BadInput, match=message) as raised:
        compress(network(), FilterPruning(0.5), X[:2], data)
    assert "\n" not in str(raised.value)


def test_dicts_without_the_arguments_are_bad_input() -> None:
    with pytest.raises(BadInput, match="batch 0 has none of the arguments scale, x: image, label"):
        Calibration([{"image": X, "label": Y}], Two(), {"x": X, "scale": X[:, :1]})


@pytest.mark.parametrize("batch_size", [20, 40])  # split, and as it is
def test_errors_name_the_batch_and_not_the_piece(batch_size: int) -> None:
    data = [*X.split(batch_size), torch.randn(16, 5)]
    with pytest.raises(BadInput, match=f"cannot be called on calibration batch {len(data) - 1}"):
        compress(network(), FilterPruning(0.5), X[:2], data)


def test_whole_numbers_are_data() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    ids = torch.arange(36).view(12, 3) % 9
    assert compress(model, FilterPruning(0.5), ids[:2], [ids])(ids).shape == (12, 3, 3)
    with pytest.raises(BadInput, match="are equal"):
        compress(model, FilterPruning(0.5), ids[:2], [ids[:1].repeat(4, 1)])
