"""Coupled channels: found where they are, verified, and refused by name where they are not safe."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import BadInput
from pliant.experiments.models import MODELS, build_model
from pliant.structure import ChannelGroup, Proof, Slot, coupled_channels
from pliant.structure.layers import complement, keep_channels, zero_channels
from pliant.structure.proof import _randomise
from pliant.structure.soundness import largest_sound
from tests.structure.cutting import half_fault

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shipped(name: str) -> tuple[nn.Module, Tensor]:
    side = 32 if name == "vgg16" else 8
    torch.manual_seed(0)
    return build_model(name, num_classes=5, image_shape=(3, side, side), width=0.125), torch.randn(2, 3, side, side)


def without(model: nn.Module, group: ChannelGroup, channels: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return (masked twin, compact network), written for one group, apart from the code under test."""
    twin, compact = copy.deepcopy(model), copy.deepcopy(model)
    for slot in group.consumers:
        zero_channels(twin.get_submodule(slot.module), "inputs", slot.indices[channels].flatten())
    for slot in (*group.producers, *group.consumers):
        module = compact.get_submodule(slot.module)
        keep_channels(module, slot.axis, complement(module, slot.axis, slot.indices[channels].flatten()))
    return twin, compact


# --- the shipped networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_group_of_a_shipped_network_can_be_removed_alone(name: str) -> None:
    model, x = shipped(name)
    groups = coupled_channels(model, x).groups
    _randomise(model.eval())
    assert groups
    for group in groups[:: max(1, len(groups) // 6)]:
        channels = torch.arange(0, group.channels, 2) if group.channels > 1 else torch.tensor([0])
        twin, compact = without(model, group, channels)
        with torch.no_grad():
            dense, expected, got = model(x.double()), twin(x.double()), compact(x.double())
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert (dense - expected).abs().max() > 1e-6, f"{group.name} does not matter: the test is blind"


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_removable_or_refused_with_a_reason(name: str) -> None:
    model, x = shipped(name)
    structure = coupled_channels(model, x)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    removable = {s.module for g in structure.groups for s in g.producers} & layers
    refused = dict(structure.refused)
    assert removable | set(refused) == layers
    assert not removable & set(refused)
    classifier = list(layers & {"fc", "fc3", "classifier", "head"})
    assert all(refused[c] == "its channels are outputs of the model" for c in classifier)
    if name == "vit_tiny":
        neurons = {n for n in layers if n.endswith(".fc1")}
        assert neurons
        assert neurons <= removable
    else:
        assert {refused[n] for n in set(refused) - set(classifier)} <= {"has a single channel"}


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "wrn28_10"])
def test_residual_streams_are_one_group_and_block_interiors_another(name: str) -> None:
    model, x = shipped(name)
    groups = coupled_channels(model, x).groups
    streams = [g for g in groups if sum("conv2" in s.module for s in g.producers) >= 1]
    interiors = [g for g in groups if any("conv1" in s.module and "." in s.module for s in g.producers)]
    assert any(len(g.consumers) > 1 for g in streams)
    assert all(len(g.consumers) == 1 for g in interiors)
    blocks = sum(name.endswith("conv2") for name, _ in model.named_modules())
    assert len(interiors) == blocks


def test_a_flattened_image_gives_each_channel_its_columns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    (group,) = coupled_channels(model, IMAGES).groups
    (columns,) = group.consumers
    assert columns.tensors == (("3.weight", 1),)
    assert torch.equal(columns.indices, torch.arange(6 * 36).view(6, 36))


def test_slots_name_their_tensors_and_the_batchnorm_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3), nn.Flatten())
    (group,) = coupled_channels(model, IMAGES).groups
    filters, norm = group.producers
    assert group.name == "0"
    assert filters.tensors == (("0.weight", 0), ("0.bias", 0))
    assert filters.norm == "1"
    assert [t for t, _ in norm.tensors] == ["1.weight", "1.bias", "1.running_mean", "1.running_var"]


# --- networks made to be nasty ------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers by keyword and a forward by function."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def conv(c_in: int, c_out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def pooled(x: Tensor) -> Tensor:
    return x.relu().mean((2, 3))


def tail() -> dict[str, nn.Module]:
    return {"last": conv(8, 6), "fc": nn.Linear(6, 5)}


def ends(net: Net, x: Tensor) -> Tensor:
    return net.fc(pooled(net.last(x.relu())))


def tied() -> Net:
    net = Net(lambda n, x: ends(n, n.b(n.a(x).relu())), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), **tail())
    net.c.weight = net.b.weight
    return net


def parametrised() -> Net:
    net = Net(lambda n, x: ends(n, n.b(n.a(x).relu())), a=conv(3, 8), b=conv(8, 8), **tail())
    nn.utils.parametrizations.weight_norm(net.b)
    return net


def free_parameter() -> Net:
    net = Net(lambda n, x: ends(n, n.a(x) * n.gamma), a=conv(3, 8), **tail())
    net.gamma = nn.Parameter(torch.ones(8, 1, 1))
    return net


def free_kernel() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        return F.conv2d(y + net.back(net.last(y).relu()), net.kernel)

    net = Net(forward, a=conv(3, 8), last=conv(8, 6), back=conv(6, 8))
    net.kernel = nn.Parameter(torch.randn(1, 8, 3, 3))
    return net


def group_norm(groups: int) -> Net:
    return Net(lambda n, x: ends(n, n.n(n.a(x))), a=conv(3, 8), n=nn.GroupNorm(groups, 8), **tail())


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return self._conv_forward(x, weight, self.bias)


NASTY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied weights": (tied, "'b' shares a parameter"),
    "parametrised": (parametrised, "'b' is parametrised"),
    "own forward": (
        lambda: Net(lambda n, x: ends(n, n.b(n.a(x))), a=conv(3, 8), b=OwnForward(8, 8, 3), **tail()),
        "masked twin",
    ),
    "free parameter before the outputs": (free_kernel, "free parameter 'kernel'"),
    "group norm of all channels": (lambda: group_norm(1), "'n'"),
    "functional group norm": (
        lambda: Net(lambda n, x: ends(n, F.group_norm(n.a(x), 2)), a=conv(3, 8), **tail()),
        "masked twin",
    ),
    "grouped convolution of the input": (
        lambda: Net(lambda n, x: ends(n, n.a(x)), a=conv(3, 9, groups=3), last=conv(9, 6), fc=nn.Linear(6, 5)),
        "grouped convolution",
    ),
    "added to the input": (
        lambda: Net(lambda n, x: ends(n, n.b(x + n.a(x))), a=conv(3, 3), b=conv(3, 8), **tail()),
        "cannot run",
    ),
    "no tensor on the way": (
        lambda: Net(lambda n, x: ends(n, torch.tensor(n.a(x).tolist(), dtype=x.dtype)), a=conv(3, 8), **tail()),
        "NumPy",
    ),
}


@pytest.mark.parametrize("case", NASTY)
def test_unsafe_layer_is_refused_by_name_and_the_rest_is_not(case: str) -> None:
    build, reason = NASTY[case]
    structure = coupled_channels(build(), IMAGES)
    assert reason in dict(structure.refused)["a"]
    assert "last" in [group.name for group in structure.groups]


class LSTMNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Linear(4, 8), nn.LSTM(8, 6, batch_first=True)
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.lstm(self.a(x))[0][:, -1]).relu())


def test_linear_before_an_lstm_is_refused() -> None:
    structure = coupled_channels(LSTMNet(), torch.randn(2, 3, 4))
    assert "LSTM 'lstm'" in dict(structure.refused)["a"]
    assert [group.name for group in structure.groups] == ["hidden"]


def test_groups_say_of_what_kind_they_are() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    structure = coupled_channels(block, torch.randn(2, 3, 8))
    assert [(g.name, g.kind) for g in structure.groups] == [("linear1", "neurons"), ("self_attn", "heads")]
    assert set(dict(structure.refused)) == {"self_attn.out_proj", "linear2"}
    assert {group.kind for group in coupled_channels(separable(), IMAGES).groups} == {"channels"}


def swiglu() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        return n.fc(n.down(F.silu(n.gate(x)) * n.up(x)))

    layers = {"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6, bias=False), "down": nn.Linear(6, 4)}
    return Net(forward, **layers, fc=nn.Linear(4, 3))


def test_neurons_of_a_gated_mlp_leave_gate_and_up_together() -> None:
    groups = coupled_channels(swiglu(), torch.randn(2, 4)).groups
    assert [[slot.module for slot in group.producers] for group in groups] == [["gate", "up"], ["down"]]
    assert all(group.kind == "neurons" for group in groups)


def test_parts_of_one_layer_that_are_mixed_with_each_other_leave_together() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        a, b = n.a(x).chunk(2, -1)
        return n.fc(n.b(a * b.sigmoid() + b))

    model = Net(forward, a=nn.Linear(4, 12), b=nn.Linear(6, 6), fc=nn.Linear(6, 3))
    structure = coupled_channels(model, torch.randn(2, 4))
    assert [group.name for group in structure.groups] == ["a", "b"]
    assert structure.groups[0].producers[0].indices.tolist() == [[i, i + 6] for i in range(6)]


class Named(nn.Module):
    """Takes its inputs by keyword and returns nested outputs, one of whole numbers."""

    def __init__(self, classes: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.classes = nn.Linear(4, 8), nn.Linear(8, 3), classes

    def forward(self, *, x: Tensor, scale: Tensor, deep: bool = False) -> dict[str, object]:
        hidden = self.a(x * scale).relu()
        logits = self.b(hidden)
        outputs: dict[str, object] = {"logits": logits, "more": [(hidden.argmax(-1) if self.classes else x,)]}
        return {**outputs, "hidden": hidden} if deep else outputs


def test_inputs_by_keyword_and_every_tensor_of_nested_outputs_count() -> None:
    inputs = {"x": torch.randn(3, 4), "scale": torch.tensor(2.0)}
    assert [group.name for group in coupled_channels(Named(), inputs).groups] == ["a"]
    assert (
        dict(coupled_channels(Named(), {**inputs, "deep": True}).refused)["a"]
        == "its channels are outputs of the model"
    )
    assert "whole numbers" in dict(coupled_channels(Named(classes=True), inputs).refused)["a"]


@pytest.mark.parametrize("example", [{}, {"x": None}, {1: torch.randn(2, 4)}])
def test_keyword_inputs_that_are_none_are_bad_input(example: dict[object, object]) -> None:
    with pytest.raises(BadInput, match="argument names"):
        coupled_channels(Named(), example)  # type: ignore[arg-type]


def densenet() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.a(x)
        x = torch.cat([x, n.b(n.n1(x).relu())], 1)
        return n.fc(F.avg_pool2d(n.n2(x).relu(), 2).flatten(1))

    layers = {"a": conv(3, 8), "n1": nn.BatchNorm2d(8), "b": conv(8, 4), "n2": nn.BatchNorm2d(12)}
    return Net(forward, **layers, fc=nn.Linear(12 * 16, 5))


def gated() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.act(n.a(x))
        gate = n.up(n.down(x.mean((2, 3))).relu()).sigmoid()
        return ends(n, x * gate[:, :, None, None])

    return Net(forward, a=conv(3, 8), act=nn.PReLU(8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), **tail())


def separable() -> Net:
    layers = {"a": conv(3, 8), "n": nn.BatchNorm2d(8), "d": conv(8, 8, groups=8), "m": nn.BatchNorm2d(8)}
    return Net(lambda n, x: ends(n, n.m(n.d(n.n(n.a(x)).relu()))), **layers, **tail())


def transposed() -> Net:
    layers = {"a": nn.ConvTranspose2d(3, 8, 3, stride=2), "n": nn.InstanceNorm2d(8, affine=True)}
    return Net(lambda n, x: ends(n, n.n(n.a(x))), **layers, **tail())


def frozen() -> Net:
    return separable().requires_grad_(False)


@pytest.mark.parametrize("build", [densenet, gated, separable, transposed, frozen])
def test_unusual_but_sound_coupling_is_found(build: Callable[[], Net]) -> None:
    model = build()
    structure = coupled_channels(model, IMAGES)
    assert [name for name, _ in structure.refused] == ["fc"]
    _randomise(model.eval())
    for group in structure.groups:
        twin, compact = without(model, group, torch.tensor([0, 3]))
        with torch.no_grad():
            torch.testing.assert_close(compact(IMAGES.double()), twin(IMAGES.double()), rtol=1e-9, atol=1e-9)


def test_untraceable_model_refuses_all_layers() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        assert not torch.overrides._get_current_function_mode_stack()
        return ends(n, n.a(x))

    structure = coupled_channels(Net(forward, a=conv(3, 8), **tail()), IMAGES)
    assert structure.groups == ()
    assert {name for name, _ in structure.refused} == {"a", "last", "fc"}


def test_model_that_insists_on_float32_cannot_be_verified() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32, "an image"
        return ends(n, n.a(x))

    model = Net(forward, a=conv(3, 8), **tail())
    reasons = dict(coupled_channels(model, IMAGES).refused)
    assert "does not run in float64" in reasons["a"]


# --- the verification itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet56", "wrn28_10", "vgg16", "vit_tiny"])
def test_verification_sees_a_wrong_group_among_right_ones(name: str) -> None:
    model, x = shipped(name)
    groups = list(coupled_channels(model, x).groups)
    proof = Proof(model, (x,))
    assert half_fault(proof, groups) is None
    for i, group in enumerate(groups[:3]):
        first, *others = group.consumers
        rolled = dataclasses.replace(first, indices=first.indices.roll(1, 0))
        missing = dataclasses.replace(group, consumers=tuple(others))
        for wrong in (dataclasses.replace(group, consumers=(rolled, *others)), missing):
            assert half_fault(proof, [*groups[:i], wrong, *groups[i + 1 :]]) is not None


def test_verification_does_not_trust_zero_weights() -> None:
    model = Net(lambda n, x: ends(n, F.group_norm(n.a(x), 2)), a=conv(3, 8), **tail())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert "a" in dict(coupled_channels(model, IMAGES).refused)


@pytest.mark.parametrize("bad", [set(), {3}, {0, 7}, set(range(8))])
def test_largest_sound_isolates_the_bad_items(bad: set[int]) -> None:
    calls = 0

    def fault(items: list[int]) -> str | None:
        nonlocal calls
        calls += 1
        return f"{sorted(bad & set(items))}" if bad & set(items) else None

    sound, failed = largest_sound(range(8), fault)
    assert sound == [i for i in range(8) if i not in bad]
    assert failed == [(i, f"[{i}]") for i in sorted(bad)]
    assert calls == 1 or bad


# --- manners ----------------------------------------------------------------------------------------------


def test_model_gradients_modes_and_random_state_are_untouched(capsys: pytest.CaptureFixture[str]) -> None:
    model = separable().train()
    model.n.eval()
    model.a.weight.requires_grad_(False)
    model(IMAGES).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradient, flags = model.fc.weight.grad.clone(), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    coupled_channels(model, IMAGES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.fc.weight.grad, gradient)
    assert [m.training for m in model.modules()] == flags
    assert not model.a.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not m._forward_hooks for m in model.modules())
    assert capsys.readouterr() == ("", "")


def test_works_under_no_grad_and_on_token_indices() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        structure = coupled_channels(model, torch.randint(0, 10, (2, 4)))
    assert [group.name for group in structure.groups] == ["1"]


@pytest.mark.parametrize("example", [torch.randn(2, 4, 8, 8), "images", (), [1.0]])
def test_example_that_does_not_fit_is_bad_input(example: object) -> None:
    with pytest.raises(BadInput, match=r"example"):
        coupled_channels(separable(), example)  # type: ignore[arg-type]


def test_bad_example_names_its_shape_and_the_model_error() -> None:
    with pytest.raises(BadInput, match=r"\(2, 4, 8, 8\).*3 channels"):
        coupled_channels(separable(), torch.randn(2, 4, 8, 8))


def test_slots_are_plain_data() -> None:
    (group, *_) = coupled_channels(separable(), IMAGES).groups
    assert all(isinstance(slot, Slot) and isinstance(slot.module, str) for slot in group.producers)
