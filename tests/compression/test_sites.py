"""Which maps of a small network are fitted, in which unknowns, and on how much of the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, Magnitude, calibration, choosing, moments, reference, refit, sites
from pliant.compression.calibration import Calibration
from pliant.compression.fitting import DAMPINGS
from pliant.compression.moments import moment_bytes
from pliant.compression.reference import Reference, maps_of, rows_of
from pliant.compression.refit import parts_of, sum_bytes
from pliant.compression.sites import Frame, Site
from tests.compression.test_refit import drawn, error, refitted


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (2, 9, 1, 1), (7, 6, 3)])
def test_a_frame_is_the_weight_in_other_coordinates(shape: tuple[int, ...]) -> None:
    weight, left = drawn(*shape), [0, 2, 3] if shape[1] > 3 else [0]
    frame = Frame(weight, None)
    whole = frame.weights(frame.root.unsqueeze(0), weight.shape)
    torch.testing.assert_close(whole, weight)
    cut = weight[:, left]
    torch.testing.assert_close(frame.estimate(cut), frame.root[:, left].unsqueeze(0))
    torch.testing.assert_close(frame.weights(frame.estimate(cut), cut.shape), cut)
    means = drawn(1, shape[1], seed=1)
    torch.testing.assert_close(frame.outputs(means @ frame.root), weight.flatten(2).sum(2) @ means[0])


def wide(bias: bool, norm: bool) -> nn.Sequential:
    """Return a linear network of convolutions; the second one reads eight channels of a space of three dimensions."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 1, bias=False)
    return nn.Sequential(first, nn.Conv2d(8, 6, 3, bias=bias), *[nn.BatchNorm2d(6)] * norm).double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_a_wide_convolution_recovers_channels_that_others_determine(
    bias: bool, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "WIDE", 10)
    monkeypatch.setattr("pliant.compression.reference.WIDE", 10)
    model = wide(bias, norm)
    x = drawn(60, 3, 6, 6) + 1.0
    compressor = FilterPruning(0.4, "uniform", importance="loss")
    cut, small, plan = refitted(model, compressor, x[:2], [x[:20], x[20:40]])
    assert cut[0].out_channels < 8  # type: ignore[index]
    assert error(model, cut, x[40:]) > 1e-2
    assert plan.refit is not None
    assert {fit.name for fit in plan.refit.layers} >= {"1"}
    assert error(model, small, x[40:]) < 1e-5


def test_wide_layers_that_are_masked_stay_as_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "WIDE", 10)
    monkeypatch.setitem(moments.MAX_COLUMNS, "convolution", 20)
    x = drawn(40, 3, 6, 6)
    _, _, plan = refitted(wide(True, False), Magnitude(0.5, importance="magnitude"), x[:2], [x[:20], x[20:]])
    assert plan.refit is not None
    assert plan.refit.unfitted == (("1", "has 72 columns, more than 20"),)


# --- how much of the data ---------------------------------------------------------------------------------------------


def images(count: int, side: int) -> Tensor:
    return drawn(count, 3, side, side).float()


def convolutions(columns: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, columns)
    ).eval()


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHEAP", 1.0)


@pytest.mark.usefixtures("costly")
def test_layers_of_many_positions_need_a_part_of_the_samples() -> None:
    model, x = convolutions(5), images(128, 16)
    dense = Reference(model, x[:2], Calibration([x], model, x[:2]))
    assert dense.share == pytest.approx(moments.LEAST_ROWS / (128 * 16 * 16))
    assert {len(piece[0]) for _, piece in dense.pieces()} == {2}  # of 16


@pytest.mark.usefixtures("costly")
def test_a_layer_of_one_position_gets_a_row_for_each_column() -> None:
    model, x = nn.Sequential(convolutions(40), nn.Linear(40, 3)).eval(), images(128, 16)
    assert Reference(model, x[:2], Calibration([x], model, x[:2])).share == 40 / 2 / 128


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize("few", [True, False])
def test_all_of_the_data_is_read_where_it_is_needed(few: bool) -> None:
    model = convolutions(5) if few else nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).eval()
    x = images(64, 4 if few else 3)
    dense = Reference(model, x[:2], Calibration([x], model, x[:2]))
    assert dense.share == 1.0
    assert sum(len(piece[0]) for _, piece in dense.pieces()) == 64


def test_all_of_the_data_is_read_where_it_costs_little() -> None:
    model, x = convolutions(5), images(128, 16)
    assert Reference(model, x[:2], Calibration([x], model, x[:2])).share == 1.0


def test_pieces_give_their_first_samples_whatever_they_are_made_of() -> None:
    x, y = images(40, 4), torch.arange(40)
    data = Calibration([{"x": x, "y": y}], nn.Identity(), {"x": x[:1], "y": y[:1]})
    parts, whole = list(data.inputs(0.5)), list(data.inputs())
    assert len(parts) == len(whole) == calibration.PIECES
    for part, full in zip(parts, whole, strict=True):
        assert isinstance(part, dict)
        assert isinstance(full, dict)
        assert torch.equal(part["x"], full["x"][:3])
        assert torch.equal(part["y"], full["y"][:3])
    ragged = Calibration([((x[:6], y[:5]), y[:6])], nn.Identity(), (x[:6], y[:5]))
    assert all(len(piece[0]) == 6 for piece in ragged.inputs(0.5))  # type: ignore[arg-type]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_transformer_of_a_hundred_million_parameters_takes_less_than_four_gibibytes() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
        model = nn.Sequential(nn.Embedding(30_000, 768), nn.TransformerEncoder(layer, 12, enable_nested_tensor=False))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters > 1e8
    maps = maps_of(model)
    outputs = sum(4 * rows_of(found.layer, found.weight, sites.WIDE) * len(found.weight) for found in maps.values())
    parts = parts_of(model, [Site(name, name, None) for name in maps])
    sums = max(sum(sum_bytes(maps[site.name], site) for site in part) for part in parts)
    assert len(parts) > 1
    assert sums <= refit.MEMORY
    columns = max(found.weight.shape[1] for found in maps.values())
    solving = 8 * (4 * columns**2 + (len(DAMPINGS) + 2) * max(found.weight.numel() for found in maps.values()))
    networks = 3 * 4 * parameters  # the best one, the one of the last sweep, and the one that is being fitted
    assert outputs + sums + solving + networks < 4 * 2**30
    assert choosing.MEMORY + max(moment_bytes(found.layer, found.weight) for found in maps.values()) < 2 * 2**30
