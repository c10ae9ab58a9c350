"""Second moments of inputs: against sums over all that a layer reads, as kernels of a single one see it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import moments
from pliant.compression.calibration import Calibration
from pliant.compression.choosing import loss_curves
from pliant.compression.moments import LEAST_ROWS, Moment, gram, input_moments, rows_per_piece
from pliant.errors import BadInput
from pliant.structure import coupled_channels
from tests.compression.test_rows import CASES, columns

pytestmark = pytest.mark.filterwarnings("ignore:few calibration", "ignore:Using padding='same' with even kernel")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def measured(model: nn.Module, data: Sequence[object], names: Sequence[str] = ("0",)) -> dict[str, Moment]:
    first = data[0][0] if isinstance(data[0], tuple) else data[0]
    calibration = Calibration(data, model, first)  # type: ignore[arg-type]
    return input_moments(copy.deepcopy(model).eval(), names, calibration)


def assert_moment(moment: Moment, x: Tensor) -> None:
    """Compare with x (groups, columns, rows)."""
    assert moment.rows == x.shape[2]
    torch.testing.assert_close(moment.second, x @ x.mT / x.shape[2], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(moment.mean, x.mean(2), rtol=1e-11, atol=1e-11)


UNBATCHED = {"one vector", "one image", "one signal", "one volume"}


@pytest.mark.parametrize("case", CASES)
def test_moments_of_every_kind_of_layer(case: str) -> None:
    build, value = CASES[case]
    layer = build()
    if case in UNBATCHED:  # so many batches are not cut along the first dim
        batches = [((value + i,), None) for i in range(9)]
        x = torch.cat([columns(layer, value + i) for i in range(9)], 2)
    else:
        batches = [((value,), None), ((value.flip(0) + 1,), None)]
        x = torch.cat([columns(layer, value), columns(layer, value.flip(0) + 1)], 2)
    moment = measured(nn.Sequential(layer), batches)["0"]
    assert not moment.by_channel
    assert moment.absorbed == (layer.bias is not None)
    assert_moment(moment, x)


def test_conv1d_of_transformers() -> None:
    library = pytest.importorskip("transformers.pytorch_utils")
    value = drawn(6, 4, 5)
    model = nn.Sequential(library.Conv1D(3, 5)).double()
    assert_moment(measured(model, [value])["0"], value.reshape(-1, 5).T.unsqueeze(0))


def test_a_layer_that_is_called_twice_reads_the_inputs_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=self.a(x).relu())

    model, value = Twice(), drawn(9, 5)
    both = torch.cat([value, model.a(value).relu().detach()]).T.unsqueeze(0)
    assert_moment(measured(model, [value], ["a"])["a"], both)


def test_layers_that_are_not_called_are_left_out() -> None:
    class First(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = First(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    assert set(measured(model, [drawn(9, 5)], ["0", "1"])) == {"0"}


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_measured_by_channel(groups: int) -> None:
    for value in (drawn(5, 4, 6, 3), drawn(5, 4, 6, 3).contiguous(memory_format=torch.channels_last)):
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)).double()
        moment = measured(model, [value])["0"]
        assert moment.by_channel
        assert_moment(moment, value.transpose(0, 1).flatten(1).unflatten(0, (groups, -1)))


def test_wide_convolutions_are_measured_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    value = drawn(5, 4, 6, 7)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 2, 1)).double()
    monkeypatch.setitem(moments.MAX_COLUMNS, "convolution", 35)
    wide = measured(model, [value], ["0", "1"])
    assert (wide["0"].by_channel, wide["1"].by_channel) == (True, False)
    assert_moment(wide["0"], value.transpose(0, 1).flatten(1).unsqueeze(0))
    monkeypatch.setitem(moments.MAX_COLUMNS, "convolution", 36)
    assert not measured(model, [value])["0"].by_channel


def test_layers_that_are_too_wide_are_not_measured_and_count_as_if_inputs_were_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    monkeypatch.setitem(moments.MAX_COLUMNS, "linear", 5)
    value = drawn(50, 5)
    assert set(measured(model, [value], ["0", "2"])) == {"0"}
    groups = coupled_channels(model, value[:2]).groups
    (curve,) = loss_curves(model, groups, Calibration([value], model, value[:2]))
    norms = model[2].weight.detach().square().sum(0)
    assert torch.equal(curve.order, norms.argsort())
    torch.testing.assert_close(curve.losses[1:], norms.sort().values.cumsum(0) / norms.sum())
    monkeypatch.setitem(moments.MAX_COLUMNS, "linear", 4)
    assert measured(nn.Sequential(nn.ConvTranspose2d(5, 2, 3)).double(), [drawn(4, 5, 3, 3)]) == {}


# --- attention ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, cross: bool = False, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.cross = nn.MultiheadAttention(8, 2, **options), cross  # type: ignore[arg-type]
        if self.core.in_proj_weight is not None:
            nn.init.normal_(self.core.in_proj_weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x, x.flip(0), x.flip(0))[0] if self.cross else self.core(x, x, x)[0]


def attended(core: nn.MultiheadAttention, q: Tensor, k: Tensor) -> Tensor:
    """Return what the output projection reads, for sequences (batch, tokens, channels) of q, and of k and v."""
    weights, biases = core.in_proj_weight.chunk(3), core.in_proj_bias.chunk(3)
    heads = [
        (x @ w.T + b).unflatten(-1, (2, 4)).transpose(1, 2) for x, w, b in zip((q, k, k), weights, biases, strict=True)
    ]
    shares = (heads[0] @ heads[1].mT / 2).softmax(-1)
    return (shares @ heads[2]).transpose(1, 2).flatten(2).detach()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention(cross: bool, batch_first: bool) -> None:
    model, value = Attention(cross, batch_first=batch_first), drawn(9, 5, 8)
    batches = [((value + i,), None) for i in range(8)]  # eight batches are not split
    found = measured(model, batches, ["core", "core.out_proj"])
    q = torch.cat([x if batch_first else x.transpose(0, 1) for ((x,), _) in batches])
    other = [x.flip(0) if cross else x for ((x,), _) in batches]
    k = torch.cat([x if batch_first else x.transpose(0, 1) for x in other])
    assert_moment(found["core.out_proj"], attended(model.core, q, k).reshape(-1, 8).T.unsqueeze(0))
    assert ("core" in found) == (not cross)
    if not cross:
        assert_moment(found["core"], q.reshape(-1, 8).T.unsqueeze(0))
    assert type(model.core) is nn.MultiheadAttention


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 7}])
def test_attention_of_other_kinds_runs_as_it_is_and_is_not_measured(options: dict[str, object]) -> None:
    class Rows(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.core(x, x, x[..., : self.core.vdim])[0])

    model, value = Rows(**options), drawn(9, 5, 8)
    model.after = nn.Linear(8, 3).double()
    found = measured(model, [((value,), None)] * 8, ["core", "core.out_proj", "after"])
    assert set(found) == {"after"}
    read = model.core(value, value, value[..., : model.core.vdim])[0].detach()
    torch.testing.assert_close(found["after"].mean[0], read.mean((0, 1)))


def test_an_own_forward_of_attention_is_not_replaced() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **options: object) -> tuple[Tensor, None]:
            return args[0] * 2, None

    model = Attention(batch_first=True)
    model.core = Own(8, 2).double()
    assert measured(model, [drawn(9, 5, 8)], ["core", "core.out_proj"]) == {}


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_whose_fused_kernel_calls_no_layer(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first).double().eval()
    value = drawn(9, 5, 8)
    enabled = torch.backends.mha.get_fastpath_enabled()
    found = measured(layer, [value], ["self_attn", "self_attn.out_proj", "linear1", "linear2"])
    assert len(found) == 4
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    x = layer.norm1(value) if norm_first else value
    assert_moment(found["self_attn"], x.detach().reshape(-1, 8).T.unsqueeze(0))
    heads = attended(layer.self_attn, x, x)
    assert_moment(found["self_attn.out_proj"], heads.reshape(-1, 8).T.unsqueeze(0))
    after = value + layer.self_attn.out_proj(heads)
    x = layer.norm2(after) if norm_first else layer.norm1(after)
    assert_moment(found["linear1"], x.detach().reshape(-1, 8).T.unsqueeze(0))
    assert_moment(found["linear2"], layer.linear1(x).relu().detach().reshape(-1, 12).T.unsqueeze(0))


# --- what a BatchNorm absorbs -------------------------------------------------------------------------------


class Path(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.kind == "twice":
            return self.a(self.n(y))
        if self.kind == "relu":
            y = y.relu_()  # the same object, but another value
        if self.kind == "elsewhere":
            y = self.b(y)
        if self.kind == "added":
            y = y + x
        return y if self.kind == "none" else self.n(y)


@pytest.mark.parametrize(
    ("kind", "absorbed"),
    [("plain", True), ("none", False), ("relu", False), ("elsewhere", False), ("added", False), ("twice", False)],
)
def test_constants_are_absorbed_only_if_a_batchnorm_reads_the_output_as_it_is(kind: str, absorbed: bool) -> None:
    found = measured(Path(kind).double(), [drawn(9, 5)], ["a", "b"])
    assert found["a"].absorbed == absorbed
    if kind == "elsewhere":
        assert found["b"].absorbed


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_covariances_are_exact_where_means_are_large(mean: float) -> None:
    x = drawn(2, 500, 6).float() + mean
    y = x[..., :4] * 3 - 7
    total, sum_x, sum_y = gram(x, y)
    wide, other = x.double(), y.double()
    torch.testing.assert_close(sum_x, wide.sum(1), rtol=1e-14, atol=1e-9)
    torch.testing.assert_close(sum_y, other.sum(1), rtol=1e-14, atol=1e-9)
    covariance = total / 500 - (sum_x / 500).unsqueeze(2) * (sum_y / 500).unsqueeze(1)
    centred = (wide - wide.mean(1, keepdim=True)).mT @ (other - other.mean(1, keepdim=True)) / 500
    tolerance = 1e-5 + 1e-15 * mean**2
    torch.testing.assert_close(covariance, centred, rtol=tolerance, atol=tolerance)
    own, _, _ = gram(x, x)
    torch.testing.assert_close(own, wide.mT @ wide, rtol=1e-12, atol=1e-3 + 1e-12 * mean**2)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("rows", [3, 20, 10**6])
def test_shrinkage_is_that_of_the_paper(absorbed: bool, rows: int) -> None:
    x = drawn(8, 5) + 0.3
    moment = Moment(torch.stack([x.T @ x / 8] * 2), torch.stack([x.mean(0)] * 2), rows, False, absorbed)
    s = (x.T @ x / 8 - (x.mean(0).outer(x.mean(0)) if absorbed else 0)).numpy()
    p, t, t2 = 5, float(s.trace()), float((s @ s).trace())
    rho = min(1.0, ((1 - 2 / p) * t2 + t * t) / ((rows + 1 - 2 / p) * (t2 - t * t / p)))
    expected = (1 - rho) * torch.tensor(s) + (rho + 1e-3) * t / p * torch.eye(5, dtype=torch.float64)
    assert (rho == 1) == (rows == 3)
    torch.testing.assert_close(moment.regularised(), torch.stack([expected] * 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x", [torch.zeros(1, 9, 4), torch.ones(1, 9, 4), torch.ones(1, 9, 1) * 1e-30])
def test_moments_of_constants_can_be_factorised(x: Tensor) -> None:
    second, total, _ = gram(x, x)
    for absorbed in (False, True):
        regular = Moment(second / 9, total / 9, 9, False, absorbed).regularised()
        assert torch.linalg.cholesky(regular).isfinite().all()


def test_few_samples_warn_once_and_say_how_many_would_do() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    data = Calibration([drawn(12, 30)], model, drawn(2, 30))
    with pytest.warns(UserWarning, match=r"'2' has 40 columns and sees 12 vectors.* about 160 samples in place of 12"):
        input_moments(model, ["0", "2"], data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_moments(model, ["0", "2"], data)
        input_moments(model, ["0", "2"], Calibration([drawn(160, 30)], model, drawn(2, 30)))


def test_rows_of_all_pieces_together_are_enough() -> None:
    for columns_, pieces, each in ((9, 8, 8), (576, 8, 8), (1152, 7, 8), (2304, 100, 4), (4096, 3, 4)):
        enough = max(LEAST_ROWS, each * columns_)
        assert enough <= rows_per_piece(columns_, pieces) * pieces < enough + pieces


def test_large_images_give_a_random_part_of_their_rows() -> None:
    images = drawn(16, 2, 40, 40) + 1
    layer = nn.Conv2d(2, 3, 3).double()
    moment = measured(nn.Sequential(layer), [images])["0"]
    assert moment.rows == 8 * math.ceil(4096 / 8)
    x = columns(layer, images)
    whole = x @ x.mT / x.shape[2]
    assert (moment.second - whole).abs().max() < 0.15  # standard error 1/√4096 times |x|² of 5
    assert not torch.equal(moment.second, whole)


def test_layers_that_read_infinity_are_not_measured() -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x) / 0)

    found = measured(Broken(nn.Linear(5, 5), nn.Linear(5, 5)).double(), [drawn(9, 5)], ["0", "1"])
    assert set(found) == {"0"}


def test_a_model_that_cannot_be_called_is_bad_input_with_the_batch() -> None:
    model = nn.Sequential(nn.Linear(5, 5)).double()
    with pytest.raises(BadInput, match="cannot be called on calibration batch 1: mat1"):
        measured(model, [drawn(9, 5), drawn(9, 4)])
