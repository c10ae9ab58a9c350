import copy
import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pliant.errors import BadInput
from pliant.experiments.models import MODELS, build_model
from pliant.experiments.networks import BasicBlock, Bottleneck, PreActBlock
from pliant.experiments.training.onednn import sound_convolutions

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
ANY_SIZE = sorted(set(MODELS) - {"vit_tiny"})
LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)

every_model = pytest.mark.parametrize("name", MODELS)


def small(name: str, image_shape: tuple[int, int, int] = (1, 8, 8)) -> nn.Module:
    return build_model(name, num_classes=10, image_shape=image_shape, width=0.1)


def on_meta(name: str, *, num_classes: int = 10, image_shape=(3, 32, 32), width: float = 1.0) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes=num_classes, image_shape=image_shape, width=width)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet_count(depth: int) -> int:
    """CIFAR ResNet of He et al. (2015), option B, from the table: convolutions, BatchNorms, linear layer."""

    def conv(c_in: int, c_out: int, side: int) -> int:
        return c_in * c_out * side**2 + 2 * c_out

    n = (depth - 2) // 6
    same = sum((2 * n - 1) * conv(c, c, 3) for c in (16, 32, 64))
    first = conv(16, 16, 3) + conv(16, 32, 3) + conv(32, 64, 3)
    projections = conv(16, 32, 1) + conv(32, 64, 1)
    return conv(3, 16, 3) + same + first + projections + 64 * 10 + 10


@pytest.mark.parametrize(("name", "depth"), [("resnet8", 8), ("resnet20", 20), ("resnet56", 56)])
def test_cifar_resnets_have_the_parameters_of_the_paper(name, depth):
    assert count(on_meta(name)) == resnet_count(depth)


@pytest.mark.parametrize(
    ("name", "image_shape", "parameters"),
    [
        ("mlp", (1, 28, 28), 266_610),  # LeNet-300-100
        # 61,706 is the classic LeNet-5; the 5×5 padding costs (49 − 25)·16·120, BatchNorm 2·22 for 22 biases.
        ("lenet5", (1, 28, 28), 61_706 + 24 * 16 * 120 + 22),
        ("resnet20", (3, 32, 32), 272_474),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("wrn28_10", (3, 32, 32), 36_479_194),
        ("resnet50", (3, 224, 224), 25_557_032),
        # 14,728,266 with biases on the convolutions, which BatchNorm makes idle.
        ("vgg16", (3, 32, 32), 14_728_266 - 4_224),
        # DeiT-Ti has 5,717,416; less the class token and its position.
        ("vit_tiny", (3, 224, 224), 5_717_416 - 2 * 192),
    ],
)
def test_parameter_counts_of_the_literature(name, image_shape, parameters):
    num_classes = 1000 if image_shape[1] == 224 else 10
    assert count(on_meta(name, num_classes=num_classes, image_shape=image_shape)) == parameters


@pytest.mark.parametrize(
    ("name", "macs"),  # of one 32×32 image, as published, in millions; they fix the strides
    [("resnet20", 40.8), ("resnet56", 125.7), ("resnet18", 555), ("vgg16", 313), ("wrn28_10", 5243)],
)
def test_multiply_adds_of_the_literature(name, macs):
    with FlopCounterMode(display=False) as counter:
        on_meta(name)(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() / 2e6 == pytest.approx(macs, rel=2e-3)


def test_multiply_adds_of_resnet50_on_large_images():
    # 4.09e9 of convolutions and the classifier, with the stride in the 3×3 convolutions.
    with FlopCounterMode(display=False) as counter:
        on_meta("resnet50", num_classes=1000)(torch.empty(1, 3, 32, 32, device="meta"))
        small_images = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        large = on_meta("resnet50", num_classes=1000, image_shape=(3, 224, 224))
        large(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(4.09, rel=2e-3)
    assert small_images / 2e6 == pytest.approx(1300, rel=0.02)  # the published count for 32×32 images


def test_residual_blocks_equal_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    basic = BasicBlock(3, 5, stride=2)
    residual = basic.bn2(basic.conv2(basic.bn1(basic.conv1(x)).relu()))
    torch.testing.assert_close(basic(x), (residual + basic.downsample(x)).relu())
    deep = Bottleneck(3, 5, stride=2)
    residual = deep.bn1(deep.conv1(x)).relu()
    residual = deep.bn3(deep.conv3(deep.bn2(deep.conv2(residual)).relu()))
    torch.testing.assert_close(deep(x), (residual + deep.downsample(x)).relu())
    wide = PreActBlock(3, 5, stride=2)
    active = wide.bn1(x).relu()
    residual = wide.conv2(wide.bn2(wide.conv1(active)).relu())
    torch.testing.assert_close(wide(x), residual + wide.downsample(active))
    same = PreActBlock(3, 3)
    residual = same.conv2(same.bn2(same.conv1(same.bn1(x).relu())).relu())
    torch.testing.assert_close(same(x), residual + x)


@pytest.mark.parametrize("image_shape", SHAPES)
@every_model
def test_maps_images_to_logits(name, image_shape):
    model = build_model(name, num_classes=7, image_shape=image_shape, width=0.1)
    images = torch.randn(2, *image_shape).to(memory_format=torch.channels_last)
    assert model.training
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_takes_odd_and_oblong_images_of_any_channel_count(name):
    assert small(name, (5, 9, 13))(torch.randn(2, 5, 9, 13)).shape == (2, 10)


@pytest.mark.parametrize(
    ("image_shape", "patch"), [((1, 8, 8), 2), ((1, 28, 28), 4), ((3, 32, 32), 4), ((3, 64, 32), 8)]
)
def test_vit_chooses_the_patch_from_the_image(image_shape, patch):
    model = small("vit_tiny", image_shape)
    assert model.get_submodule("patch_embed").kernel_size == (patch, patch)


def test_vit_attention_equals_its_formula():
    attention = small("vit_tiny").get_submodule("blocks.0.attn").double()
    attention.num_heads, attention.scale = 2, 0.3  # two heads of 32 channels
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    heads = []
    for head in range(2):
        rows = [slice(part * 64 + head * 32, part * 64 + head * 32 + 32) for part in range(3)]
        q, k, v = (x @ attention.qkv.weight[r].T + attention.qkv.bias[r] for r in rows)
        heads.append(torch.softmax(0.3 * q @ k.mT, dim=-1) @ v)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_vit_knows_where_a_patch_is():
    model = small("vit_tiny").eval()
    image = torch.randn(1, 1, 8, 8)
    swapped = image.roll(2, dims=-1)  # by one patch
    assert not torch.allclose(model(image), model(swapped), atol=1e-5)
    nn.init.zeros_(model.get_submodule("pos_embed").table)
    torch.testing.assert_close(model(image), model(swapped))


@every_model
def test_width_scales_every_hidden_layer(name):
    narrow = 2 / 3 if name == "vit_tiny" else 1 / 2
    outputs = [
        [layer.weight.shape[0] for layer in on_meta(name, width=width).modules() if isinstance(layer, LAYERS)]
        for width in (1.0, narrow)
    ]
    (*full, logits), (*scaled, scaled_logits) = outputs
    assert logits == scaled_logits == 10
    assert scaled == [round(narrow * channels) for channels in full]


@every_model
def test_builds_on_the_meta_device(name):
    model = on_meta(name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@every_model
def test_a_tiny_width_leaves_at_least_one_channel_or_head(name):
    model = build_model(name, num_classes=2, image_shape=(1, 8, 8), width=1e-6)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 2)


@every_model
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = small(name)
    with sound_convolutions(model):
        model(torch.randn(8, 1, 8, 8)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@every_model
def test_start_is_the_layers_own_reset_parameters_and_nothing_else(name):
    torch.manual_seed(0)
    model = small(name)
    again = copy.deepcopy(model)
    torch.manual_seed(0)
    for module in again.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()
    for (key, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


@every_model
def test_same_seed_same_network(name):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(small(name).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(m.values() for m in models), strict=True))


@every_model
def test_every_module_with_weights_runs_exactly_once_and_on_unchanged_inputs(name):
    model = small(name)
    calls: dict[str, int] = {}
    seen: list[tuple[Tensor, Tensor]] = []
    for key, module in model.named_modules():
        if next(module.children(), None) is None:
            calls[key] = 0

            def hook(_module, args, _output, key=key):
                calls[key] += 1
                seen.append((args[0], args[0].clone()))

            module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8))
    assert set(calls.values()) == {1}
    assert all(torch.equal(now, then) for now, then in seen)


@every_model
def test_convolutions_before_batchnorm_have_no_bias(name):
    layers = [m for m in small(name).modules() if isinstance(m, (*LAYERS, nn.ReLU))]
    pairs = [a for a, b in itertools.pairwise(layers) if isinstance(b, nn.BatchNorm2d)]
    assert all(a.bias is None for a in pairs if isinstance(a, nn.Conv2d))


@every_model
def test_fx_traces_the_forward_pass(name):
    model = small(name).eval()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


@every_model
def test_exports_with_a_free_batch_size(name):
    model = small(name).eval()
    images = torch.randn(3, 1, 8, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images[:2]), model(images[:2]))


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet21", {}, "did you mean 'resnet20'"),
        ("mlp", {"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ("mlp", {"width": 0.0}, "width must be a positive factor, got 0"),
        ("mlp", {"width": float("nan")}, "width must be a positive factor, got nan"),
        ("mlp", {"width": float("inf")}, "width must be a positive factor, got inf"),
        ("mlp", {"image_shape": (0, 8, 8)}, r"image_shape must be \(channels, height, width\)"),
        ("mlp", {"image_shape": (8, 8)}, r"image_shape must be \(channels, height, width\)"),
        ("vgg16", {"image_shape": (3, 32, 7)}, "at least 8×8 pixels, got 32×7"),
        ("vit_tiny", {"image_shape": (3, 30, 32)}, "multiples of 4"),
    ],
)
def test_bad_arguments(name, changes, message):
    arguments = {"num_classes": 10, "image_shape": (1, 8, 8), "width": 1.0} | changes
    with pytest.raises(BadInput, match=message) as caught:
        build_model(name, **arguments)
    assert "\n" not in str(caught.value)


OWN_NETS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, *, width=1.0):
        import beside  # late, and only found in the current directory
        hidden = beside.scaled(width)
        super().__init__(nn.Flatten(), nn.Linear(64, hidden), nn.Linear(hidden, num_classes))

def everything(**given):
    net = nn.Linear(1, 1)
    net.given = given
    return net

def fixed():
    return nn.Linear(64, 10)

def broken(num_classes):
    raise RuntimeError("two\\nlines")

def needs_depth(depth, num_classes):
    return nn.Linear(64, depth)

def not_a_network():
    return "resnet"

number = 3
"""


@pytest.fixture
def own_nets(tmp_path, monkeypatch):
    """A package of networks in the current directory, forgotten afterwards."""
    package = tmp_path / "own_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text(OWN_NETS)
    (package / "half.py").write_text("import surely_not_installed\n")
    (tmp_path / "beside.py").write_text("def scaled(width):\n    return int(8 * width)\n")
    monkeypatch.chdir(tmp_path)
    yield
    for module in [m for m in sys.modules if m == "beside" or m.partition(".")[0] == "own_nets"]:
        del sys.modules[module]


@pytest.mark.usefixtures("own_nets")
def test_a_network_of_ones_own_gets_what_its_signature_accepts():
    before = list(sys.path)
    net = build_model("own_nets.small:Net", num_classes=5, image_shape=(1, 8, 8), width=2.0)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    assert net[1].out_features == 16
    everything = build_model("own_nets.small:everything", num_classes=5, image_shape=(1, 8, 8), width=2.0)
    assert everything.given == {"num_classes": 5, "image_shape": (1, 8, 8), "width": 2.0}
    assert isinstance(build_model("own_nets.small:fixed", num_classes=5, image_shape=(1, 8, 8)), nn.Linear)
    assert sys.path == before


@pytest.mark.usefixtures("own_nets")
@pytest.mark.parametrize(
    ("name", "message", "cause"),
    [
        (":Net", "expected package.module:callable", None),
        ("own_nets.small:", "expected package.module:callable", None),
        ("own_nets/small.py:Net", "expected package.module:callable", None),
        ("own_nets:small:Net", "expected package.module:callable", None),
        ("own_nets.smal:Net", "import failed with ModuleNotFoundError: .*own_nets.smal", ModuleNotFoundError),
        ("own_nets.half:Net", "No module named 'surely_not_installed'", ModuleNotFoundError),
        ("own_nets.small:Nett", "has no callable named 'Nett'", None),
        ("own_nets.small:number", "has no callable named 'number'", None),
        ("own_nets.small:broken", "broken raised RuntimeError: two lines", RuntimeError),
        ("own_nets.small:needs_depth", "needs_depth raised TypeError: .*'depth'", TypeError),
        ("own_nets.small:not_a_network", "expected a torch.nn.Module from it, got a str", None),
        ("builtins:dict", "no signature", ValueError),
    ],
)
def test_bad_networks_of_ones_own(name, message, cause):
    with pytest.raises(BadInput, match=message) as caught:
        build_model(name, num_classes=10, image_shape=(1, 8, 8))
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__) is (cause or type(None))


@pytest.mark.usefixtures("own_nets")
def test_a_width_that_would_have_no_effect_is_refused():
    with pytest.raises(BadInput, match=r"takes no argument 'width', got width 0\.5: leave it at 1"):
        build_model("own_nets.small:fixed", num_classes=10, image_shape=(1, 8, 8), width=0.5)
