"""Bad input: every flag of every verb, of the wrong type, out of range, without a value, or contradicting another.

Each gets exit code 2 and one line that names the flag and says what was expected; nothing is written. A wrong type
(from a file of settings) and a missing value look alike for all flags; the rest is in :data:`TABLE`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pliant.cli import VERBS, main, make_parser
from pliant.experiments.train import train
from pliant.records import Record, append_record
from tests.test_records import REQUIRED

# Flags and what the line must say beside the name of the flag. "base" is a finished run, "small" a compressed network,
# "exported" an export, "full" a folder with a file in it, "half.yaml" a file of settings.
TABLE: dict[str, list[tuple[str, str, str]]] = {
    "train": [
        ("data", "--data cifar1", "did you mean 'cifar10'?"),
        ("data", "--data ''", "known are"),
        ("data", "--data hub:nowhere", "hub:OWNER/NAME"),
        ("data_dir", "--data cifar10 --data_dir nowhere", "nowhere is not a folder"),
        ("data_dir", "--data_dir full", "leave data_dir out"),
        ("data_dir", "--data parquet", "needs --data_dir"),
        ("data_dir", "--data image-folder", "needs --data_dir"),
        ("image_size", "--image_size 0", "at least 1"),
        ("image_size", "--image_size 1", "at least 8×8"),
        ("image_size", "--image_size 200000", "memory"),
        ("model", "--model resnet9", "did you mean 'resnet8'?"),
        ("model", "--model nowhere:net", "nowhere"),
        ("model", "--model os:getcwd", "expected a torch.nn.Module"),
        ("model", "--model :", "package.module:callable"),
        ("width", "--width 0", "positive and finite, got 0"),
        ("width", "--width -1", "positive and finite, got -1"),
        ("width", "--width 1e400", "positive and finite, got inf"),
        ("width", "--model mlp --width 1e9", "cannot be built"),
        ("width", "--model mlp --width 1e300", "cannot be built"),
        ("method", "--method sfw-rnk", "did you mean 'sfw-rank'?"),
        ("k", "--method sfw-rank --k 0", "at least 1"),
        ("k", "--method sfw-rank --k -2", "at least 1"),
        ("k", "--method sfw-rank --k 1.5", "(0, 1]"),
        ("k", "--method sfw-rank --k 0.0", "(0, 1]"),
        ("k", "--method sfw-filters --k 1000", "k=1000"),
        ("k", "--method sgd --k 3", "not a setting of --method sgd"),
        ("radius", "--method sfw-rank --radius 0", "positive and finite"),
        ("radius", "--method sfw-rank --radius -1", "positive and finite"),
        ("radius", "--method sgd --radius 1", "not a setting of --method sgd"),
        ("vertices", "--method sfw-rank --vertices supports", "did you mean 'support'?"),
        ("vertices", "--vertices support", "not a setting of --method sgd"),
        ("scheme", "--method sfw-rank --scheme spacial", "did you mean 'spatial'?"),
        ("scheme", "--method sfw-filters --scheme spatial", "not a setting of --method sfw-filters"),
        ("rescale", "--method sfw-rank --rescale gradients", "did you mean 'gradient'?"),
        ("rescale", "--rescale none", "not a setting of --method sgd"),
        ("turnover", "--method sfw-filters --turnover 0", "positive and finite"),
        ("turnover", "--turnover 5", "not a setting of --method sgd"),
        ("turnover", "--method sfw-filters --turnover 5 --lr 0.1", "lr"),
        ("recipe", "--method sfw-rank --recipe papr", "did you mean 'paper'?"),
        ("recipe", "--recipe paper", "not a setting of --method sgd"),
        ("coupled", "--method sfw-filters --coupled some", "expects true or false"),
        ("coupled", "--coupled true", "not a setting of --method sgd"),
        ("anneal", "--method sfw-rank --anneal 0", "(0, 1]"),
        ("strength", "--method sfw-rank --recipe gradient --strength 0.1", "needs --rescale none"),
        ("strength", "--method sfw-rank --strength 1", "from 0 to below 1"),
        ("anneal", "--method sfw-rank --anneal 1.5", "(0, 1]"),
        ("anneal", "--anneal 0.5", "not a setting of --method sgd"),
        ("tracker", "--tracker tensorbord", "did you mean 'tensorboard'?"),
        ("pattern", "--method sfw-nm --pattern 4:2", "N:M"),
        ("pattern", "--method sfw-nm --pattern 0:4", "N:M"),
        ("pattern", "--method sfw-nm --pattern 2", "N:M"),
        ("pattern", "--method sfw-rank --pattern 2:4", "not a setting of --method sfw-rank"),
        ("k_start", "--method sfw-rank --k_start 0", "at least 1"),
        ("k_start", "--method sfw-rank --k_start 2.5", "(0, 1]"),
        ("k_start", "--k_start 0.5", "not a setting of --method sgd"),
        ("strength", "--method ssl --strength -1", ">= 0"),
        ("persistence", "--method sfw-filters --persistence -1", ">= 0"),
        ("persistence", "--method sfw-filters --recipe paper --persistence 1", "needs --rescale none"),
        ("persistence", "--method sfw-rank --persistence 1", "not a setting of --method sfw-rank"),
        ("strength", "--strength 1", "not a setting of --method sgd"),
        ("every", "--method trp --every 0", "at least 1"),
        ("every", "--every 2", "not a setting of --method sgd"),
        ("energy", "--method trp --energy 1", "[0, 1)"),
        ("energy", "--method trp --energy -0.1", "[0, 1)"),
        ("energy", "--energy 0.5", "not a setting of --method sgd"),
        ("factors", "--method lorita --factors 1", "at least 2"),
        ("factors", "--factors 2", "not a setting of --method sgd"),
        ("condition", "--method condlr --condition 0.5", ">= 1"),
        ("condition", "--condition 2", "not a setting of --method sgd"),
        ("other_lr", "--method muon --other_lr 0", "positive and finite"),
        ("other_lr", "--other_lr 1", "not a setting of --method sgd"),
        ("epochs", "--epochs 0", "at least 1, got 0"),
        ("epochs", "--epochs -3", "at least 1, got -3"),
        ("epochs", "--epochs 2.5", "expects an integer, got '2.5'"),
        ("batch_size", "--batch_size 0", "at least 1, got 0"),
        ("accumulate", "--accumulate 0", "at least 1, got 0"),
        ("lr", "--lr 0", "positive and finite, got 0"),
        ("lr", "--lr -0.1", "positive and finite, got -0.1"),
        ("lr", "--lr nan", "expects a number"),
        ("lr", "--lr .inf", "positive and finite, got inf"),
        ("schedule", "--schedule cosin", "did you mean 'cosine'?"),
        ("warmup", "--warmup 1", "[0, 1)"),
        ("warmup", "--warmup -0.1", "[0, 1)"),
        ("momentum", "--momentum 1", "[0, 1)"),
        ("momentum", "--momentum .nan", "[0, 1)"),
        ("weight_decay", "--weight_decay -1", ">= 0"),
        ("weight_decay", "--weight_decay .inf", ">= 0"),
        ("augment", "--augment maybe", "expects true or false, got 'maybe'"),
        ("precision", "--precision fp8", "auto, fp32"),
        ("precision", "--precision fp16", "needs a GPU"),
        ("channels_last", "--channels_last 2", "expects true or false"),
        ("seed", "--seed -1", "from 0 to"),
        ("seed", "--seed 99999999999999999999", "from 0 to"),
        ("seed", "--seed 1.5", "expects an integer, got '1.5'"),
        ("deterministic", "--deterministic 7", "expects true or false"),
        ("checkpoint_steps", "--checkpoint_steps 0", "at least 1"),
        ("out", "--out full", "--resume"),
        ("out", "--out full/file", "--resume"),
        ("out", "--out full/file/run", "Not a directory"),
        ("out", "--out base", "--resume"),
        ("resume", "--resume maybe", "expects true or false, got 'maybe'"),
        ("resume", "--resume --out full", "pliant train"),
        ("out", "--resume --out small", "compressed network, not a run"),
        ("epochs", "--resume --out base --epochs 30", "contradicts 1"),
        ("lr", "--resume --out base --lr 0.7", "contradicts 0.1"),
        ("model", "--resume --out base --model resnet8", "contradicts 'mlp'"),
        ("augment", "--out base --augment false --resume", "contradicts True"),
        ("epochs", "--config half.yaml --epochs 3.5", "expects an integer"),
        ("config", "--config nowhere.yaml", "nowhere.yaml"),
        ("config", "--config full", "expects a YAML file"),
    ],
    "sweep": [
        ("runs", "", "required"),
        ("runs", "nowhere", "not a run folder"),
        ("runs", "base full", "not a run folder"),
        ("runs", "full/file", "not a run folder"),
        ("compressor", "base --compressor rnk", "did you mean 'rank'?"),
        ("compressor", "base --compressor int8", "known are"),
        ("compressor", "base --compressor filters+", "known are"),
        ("compressor", "base --compressor int8+rank", "last"),
        ("ratios", "base --ratios 0,1", "0 <= ratio < 1"),
        ("ratios", "base --ratios 0,-0.5", "0 <= ratio < 1"),
        ("ratios", "base --ratios nan", "0 <= ratio < 1"),
        ("ratios", "base --ratios 0.5,,", "separated by commas"),
        ("ratios", "base --ratios ''", "separated by commas"),
        ("ratios", "base --ratios []", "at least one"),
        ("ratios", "base --ratios 50%", "separated by commas"),
        ("allocation", "base --allocation globl", "did you mean 'global'?"),
        ("scheme", "base --compressor rank --scheme spacial", "did you mean 'spatial'?"),
        ("pattern", "base --compressor nm --pattern 4:2", "N:M"),
        ("pattern", "base --compressor nm --pattern 2:4,", "N:M"),
        ("pattern", "base --compressor rank --pattern 1:4", "for the compressor nm"),
        ("multiple_of", "base --multiple_of 0", "at least 1"),
        ("multiple_of", "base --multiple_of 2.5", "expects an integer"),
        ("multiple_of", "base --compressor nm --multiple_of 8", "nm has no such option"),
        ("keep", "base --keep nowhere*", "'nowhere*' matches no layer"),
        ("keep", "base --compressor weights --keep fc", "for filters, heads and rank"),
        ("at_least", "base --at_least 0", "at least 1"),
        ("at_least", "base --at_least 1.5", "[0, 1]"),
        ("at_least", "base --at_least few", "expects an integer or a number"),
        ("at_least", "base --at_least 0.5 --at_most 0.4", "more than at_most"),
        ("at_most", "base --at_most 0.0", "(0, 1]"),
        ("at_most", "base --compressor rank --at_most -1", "at least 1"),
        ("layer_ratios", "base --layer_ratios nowhere=0.5", "'nowhere' matches no layer"),
        ("layer_ratios", "base --layer_ratios fc", "such as layer1.*=0.5"),
        ("layer_ratios", "base --layer_ratios fc=1", "0 <= share < 1"),
        ("layer_ratios", "base --layer_ratios fc=half", "such as layer1.*=0.5"),
        ("calibration", "base --calibration 1", "at least 2"),
        ("calibration", "base --calibration -5", "at least 2"),
        ("precision", "base --precision half", "auto, fp32"),
        ("whiten", "base --whiten 2", "expects true or false"),
        ("refit", "base --refit maybe", "expects true or false"),
        ("importance", "base --importance l3", "--importance 'l3': filters does not take it"),
        ("importance", "base --compressor rank --importance l2", "rank has no importance to choose"),
        ("scheme", "base --compressor filters --scheme spatial", "for the compressor rank"),
        ("out", "base --out full", "directory"),
        ("out", "base --out full/file", "mend or delete this line"),
        ("out", "base --out full/file/x", "Not a directory"),
        ("ratios", "base --compressor nm --ratios 0.5", "pattern"),
        ("config", "base --config nowhere.yaml", "there is no file"),
    ],
    "report": [
        ("records", "", "required"),
        ("records", "nowhere.jsonl", "nowhere.jsonl"),
        ("records", "full", "file of records"),
        ("records", "full/file", "mend or delete this line"),
        ("records", "empty.jsonl", "got none"),
        ("out", "records.jsonl --out full", "got the folder"),
        ("out", "records.jsonl --out full/file/r.html", "full/file: "),
        ("markdown", "records.jsonl --markdown full", "got the folder"),
        ("runs", "records.jsonl --runs a b", "unexpected argument b"),
        ("config", "--config nowhere.yaml", "there is no file"),
    ],
    "compare": [
        ("suite", "", "required"),
        ("suite", "tinny", "did you mean 'tiny'?"),
        ("suite", "nowhere.yaml", "nowhere.yaml"),
        ("suite", "full", "full"),
        ("suite", "half.yaml", "half.yaml"),
        ("out", "tiny --out full/file", "full/file: "),
        ("data_dir", "fashion --data_dir nowhere", "nowhere is not a folder"),
        ("methods", "tiny --methods sgdd", "did you mean 'sgd'?"),
        ("tasks", "paper --tasks cifar11", "unknown task of this suite 'cifar11': did you mean 'cifar10'?"),
        ("methods", "tiny --methods ''", "known are"),
        ("ray", "tiny --methods sgd --dry_run --ray", "expects a value"),
        ("ray", "tiny --methods sgd --ray localhost:1", "cannot be reached"),
        ("dry_run", "tiny --dry_run maybe", "expects true or false"),
        ("config", "--config nowhere.yaml", "there is no file"),
    ],
    "compress": [
        ("run", "", "required"),
        ("run", "nowhere", "not a run folder"),
        ("run", "full", "not a run folder"),
        ("run", "small", "compressed already"),
        ("compressor", "base --compressor filtrs", "did you mean 'filters'?"),
        ("ratio", "base --ratio 1", "0 <= ratio < 1"),
        ("ratio", "base --ratio -0.1", "0 <= ratio < 1"),
        ("ratio", "base --ratio nan", "expects a number"),
        ("ratio", "base --ratio .nan", "0 <= ratio < 1"),
        ("ratio", "base --ratio 0.5 --keep_macs 0.5", "exclude each other"),
        ("keep_params", "base --keep_params 0", "0 < keep_params <= 1"),
        ("keep_params", "base --keep_params 1.5", "0 < keep_params <= 1"),
        ("keep_params", "base --keep_params 0.5 --keep_macs 0.5", "expected one budget"),
        ("keep_params", "base --keep_params 1e-9", "out of reach"),
        ("keep_macs", "base --keep_macs 0", "0 < keep_macs <= 1"),
        ("keep_macs", "base --keep_macs .nan", "must be a number"),
        ("max_bytes", "base --max_bytes 0", "must be positive"),
        ("max_bytes", "base --max_bytes -1", "must be positive"),
        ("max_bytes", "base --max_bytes 0.5", "expects an integer"),
        ("max_bytes", "base --max_bytes 1", "out of reach"),
        ("max_latency_ms", "base --max_latency_ms 0", "must be positive"),
        ("max_latency_ms", "base --max_latency_ms .inf", "must be a number"),
        ("max_drop", "base --max_drop 1", "0 <= max_drop < 1"),
        ("max_drop", "base --max_drop -0.1", "0 <= max_drop < 1"),
        ("max_drop", "base --compressor nm --max_drop 0.1", "exclude each other"),
        ("allocation", "base --allocation globally", "did you mean 'global'?"),
        ("scheme", "base --compressor rank --scheme spacial", "did you mean 'spatial'?"),
        ("pattern", "base --compressor nm --pattern 4:2", "N:M"),
        ("pattern", "base --compressor rank --pattern 1:4", "nm"),
        ("ratio", "base --compressor nm --ratio 0.5", "pattern"),
        ("multiple_of", "base --multiple_of 0", "at least 1"),
        ("multiple_of", "base --multiple_of 2.5", "expects an integer"),
        ("multiple_of", "base --compressor weights --multiple_of 8", "weights has no such option"),
        ("keep", "base --keep nowhere*", "'nowhere*' matches no layer"),
        ("keep", "base --compressor weights --keep fc", "for filters, heads and rank"),
        ("at_least", "base --at_least 0", "at least 1"),
        ("at_least", "base --at_least 1.5", "[0, 1]"),
        ("at_least", "base --at_least few", "expects an integer or a number"),
        ("at_least", "base --at_least 0.5 --at_most 0.4", "more than at_most"),
        ("at_most", "base --at_most 0.0", "(0, 1]"),
        ("at_most", "base --compressor rank --at_most -1", "at least 1"),
        ("layer_ratios", "base --layer_ratios nowhere=0.5", "'nowhere' matches no layer"),
        ("layer_ratios", "base --layer_ratios fc", "such as layer1.*=0.5"),
        ("layer_ratios", "base --layer_ratios fc=1", "0 <= share < 1"),
        ("layer_ratios", "base --layer_ratios fc=half", "such as layer1.*=0.5"),
        ("calibration", "base --calibration 0", "at least 2"),
        ("precision", "base --precision 16", "auto, fp32"),
        ("whiten", "base --whiten 2", "expects true or false"),
        ("refit", "base --refit maybe", "expects true or false"),
        ("importance", "base --importance l3", "--importance 'l3': filters does not take it"),
        ("importance", "base --compressor rank --importance l2", "rank has no importance to choose"),
        ("scheme", "base --compressor filters --scheme spatial", "for the compressor rank"),
        ("elastic", "base --elastic maybe", "expects true or false"),
        ("ladder", "base --elastic --ladder 0.5,x", "ladder"),
        ("out", "base --out full", "exists"),
        ("out", "base --out base", "exists"),
        ("out", "base --out full/file/x", "Not a directory"),
        ("config", "base --config nowhere.yaml", "there is no file"),
    ],
    "export": [
        ("folder", "", "required"),
        ("folder", "nowhere", "not a run folder"),
        ("folder", "full", "not a run folder"),
        ("keep_params", "base --keep_params 0", "keep_params"),
        ("keep_macs", "base --keep_macs 2", "keep_macs"),
        ("max_bytes", "base --max_bytes 0", "max_bytes"),
        ("max_latency_ms", "base --max_latency_ms 0", "max_latency_ms"),
        ("formats", "base --formats tflite", "known are"),
        ("formats", "base --formats ''", "at least one"),
        ("formats", "base --formats ,", "at least one"),
        ("out", "base --out full", "exists"),
        ("out", "base --out full --overwrite", "is no export"),
        ("out", "base --out base --overwrite", "is no export"),
        ("out", "base --out exported", "overwrite"),
        ("out", "base --out full/file/x --formats safetensors", "Not a directory"),
        ("overwrite", "base --overwrite 2", "expects true or false"),
        ("config", "base --config nowhere.yaml", "there is no file"),
    ],
    "demo": [
        ("out", "--out full", "exists and is not empty"),
        ("out", "--out full/file", "exists and is not empty"),
        ("out", "--out full/file/x", "Not a directory"),
        ("epochs", "--epochs 0", "at least 1"),
        ("seed", "--seed -1", "from 0 to"),
        ("config", "--config nowhere.yaml", "there is no file"),
    ],
}
CASES = [pytest.param(verb, *case, id=f"{verb} {case[1]}") for verb, cases in TABLE.items() for case in cases]


def flags_of(verb: str) -> set[str]:
    """Return the names of all settings of a verb: those of its flags, and its positional argument."""
    names = {action.dest for action in make_parser(verb)._actions}
    return names - {"help", "print_config", "print_shtab"}


FLAGS = [(verb, flag) for verb in TABLE for flag in sorted(flags_of(verb))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("bad") / "base"
    return train(model="mlp", width=0.05, epochs=1, batch_size=512, out=str(place))


@pytest.fixture
def workplace(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with something of every kind."""
    (tmp_path / "base").symlink_to(base)
    for name in ("full", "small", "exported"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/file").write_text("precious\n")
    for name in ("config.yaml", "shape.json"):
        (tmp_path / "small" / name).write_bytes((base / name).read_bytes())
    (tmp_path / "small/plan.json").write_text("{}")
    (tmp_path / "exported/export.json").write_text("{}")
    (tmp_path / "half.yaml").write_text("epochs: 3\n")
    (tmp_path / "empty.jsonl").touch()
    append_record(tmp_path / "records.jsonl", Record.from_dict(REQUIRED))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(*folders: Path) -> dict[Path, str]:
    """Return all files, folders and links below, with a hash of what they hold."""

    def entries(folder: Path) -> Iterator[tuple[Path, str]]:
        for path in folder.rglob("*"):
            yield path, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    return dict(entry for folder in folders for entry in entries(folder))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with code 2, and return its one line."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2, captured
    assert not captured.out
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("pliant: error: ")
    assert len(line) < 400
    return line


PLACES = {"data_dir", "out", "markdown", "runs", "run", "records", "folder", "suite"}


def names(line: str, flag: str, flags: str = "") -> bool:
    """Tell whether a line names a flag, or the file or folder that was given to it."""
    words = [word for word in flags.split() if not word.startswith("-")] if flag in PLACES | {"resume"} else []
    paths = [path for word in words for path in (word, word.rpartition("/")[0]) if path]
    return re.search(rf"\b({flag}|{flag.rstrip('s')})\b", line) is not None or any(path in line for path in paths)


@pytest.mark.parametrize(("verb", "flag", "flags", "says"), CASES)
def test_out_of_range_or_contradictory(
    verb: str, flag: str, flags: str, says: str, workplace: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(workplace, base)
    line = refused([verb, *shlex.split(flags)], capsys)
    assert names(line, flag, flags), line
    assert says in line
    assert everything(workplace, base) == before


@pytest.mark.parametrize(("verb", "flag"), [pair for pair in FLAGS if pair[1] != "config"])
def test_wrong_type(verb: str, flag: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = VERBS[verb]
    (workplace / "c.yaml").write_text(yaml.safe_dump({flag: {"a": [1, {"b": None}]}}))
    before = everything(workplace)
    run = [] if not known.positional or flag == known.positional else ["base"]
    line = refused([verb, *run, "--config", "c.yaml"], capsys)
    assert names(line, flag), line
    assert everything(workplace) == before


def is_switch(verb: str, flag: str) -> bool:
    (action,) = [action for action in make_parser(verb)._actions if action.dest == flag]
    return flag == VERBS[verb].positional or action._typehint is bool if hasattr(action, "_typehint") else False


@pytest.mark.parametrize(
    ("verb", "flag"), [pair for pair in FLAGS if pair[1] != VERBS[pair[0]].positional and not is_switch(*pair)]
)
def test_missing_value(verb: str, flag: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(workplace)
    line = refused([verb, f"--{flag}"], capsys)
    assert f"--{flag} expects a value, got none" in line
    assert everything(workplace) == before


@pytest.mark.parametrize("verb", [*TABLE])
def test_unknown_flag(verb: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(workplace)
    assert "unknown flag --confg: did you mean --config?" in refused([verb, "--confg", "a.yaml"], capsys)
    (workplace / "c.yaml").write_text("outt: a\n")
    assert names(refused([verb, "--config", "c.yaml"], capsys), "outt")
    (workplace / "c.yaml").unlink()
    assert everything(workplace) == before


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_in_the_table(verb: str) -> None:
    assert flags_of(verb) <= {flag for flag, _, _ in TABLE[verb]}


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train?" in refused(["trian"], capsys)


def test_text_that_yaml_takes_for_a_number(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "c.yaml").write_text("pattern: 2:4\n")  # 2·60 + 4 in YAML 1.1
    assert "got '124'; in a YAML file, put text such as 2:4 in quotes" in refused(
        ["compress", "base", "--compressor", "nm", "--config", "c.yaml"], capsys
    )


@pytest.mark.parametrize("content", [b"epochs: [\n", b"epochs: \xff\n", b"[1, 2]\n", b"5\n", b"{" * 5000, b"\0"])
def test_files_of_settings_that_are_none(content: bytes, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "c.yaml").write_bytes(content)
    assert "c.yaml" in refused(["train", "--config", "c.yaml"], capsys)
