"""The command line as a person meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pliant.cli import VERBS, main, make_parser
from pliant.experiments.methods import METHODS
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import OWN, SETTINGS
from pliant.records import read_records

QUICK = ["--model", "mlp", "--epochs", "1", "--batch_size", "256"]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its one line."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("pliant: error: ")
    return line


def test_train_sweep_compress_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--method", "sfw-rank", "--k", "2", "--radius", "5", "--rescale", "none"]) == 0
    (run,) = Path("runs").iterdir()
    assert capsys.readouterr().out.strip() == str(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["k"], config["radius"], config["rescale"]) == (2, 5.0, "none")
    assert main(["sweep", str(run), "--compressor", "rank", "--ratios", "0,0.6", "--allocation", "uniform"]) == 0
    assert [r.ratio for r in read_records("records.jsonl")] == [0, 0.6]
    assert main(["compress", str(run), "--compressor", "rank", "--ratio", "0.6", "--out", "small"]) == 0
    assert "LowRank" in capsys.readouterr().out
    assert main(["report", "records.jsonl", "--out", "r.html"]) == 0
    assert "sfw-rank" in capsys.readouterr().out
    assert "</html>" in Path("r.html").read_text()


def test_an_integer_k_is_a_count_and_a_float_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, value in (("1", 1), ("1.0", 1.0)):
        assert main(["train", *QUICK, "--method", "sfw-filters", "--k", text, "--out", text]) == 0
        saved = yaml.safe_load(Path(text, "config.yaml").read_text())["k"]
        assert (saved, type(saved)) == (value, type(value))


def test_controls_of_a_compressor_are_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--out", "run"]) == 0
    for text, value in (("1", 1), ("0.5", 0.5), ("1.0", 1.0)):
        flags = ["--ratio", "0.9", "--calibration", "16", "--at_least", text]
        assert main(["compress", "run", *flags, "--out", text]) == 0
        saved = json.loads(Path(text, "plan.json").read_text())["options"]["at_least"]
        assert (saved, type(saved)) == (value, type(value))
    flags = ["--multiple_of", "8", "--at_most", "0.5", "--keep", "fc3", "--layer_ratios", "fc1=0.75"]
    assert main(["compress", "run", *flags, "--calibration", "16"]) == 0
    name = "run-filters-calibration16-multiple_of=8-keep=fc3-at_most=0.5-layer_ratios=fc1=0.75-0.5"
    options = json.loads(Path(name, "plan.json").read_text())["options"]
    assert {key: options[key] for key in ("multiple_of", "keep", "at_most", "ratios")} == {
        "multiple_of": 8,
        "keep": ["fc3"],
        "at_most": 0.5,
        "ratios": {"fc1": 0.75},
    }
    assert json.loads(Path(name, "record.json").read_text())["config"]["controls"]["multiple_of"] == 8
    Path("c.yaml").write_text("keep: [fc3, fc3*]\nlayer_ratios: {fc1: 0.25}\ncalibration: 16\n")
    for out in ("by-file", "again"):
        assert main(["sweep", "run", "--config", "c.yaml", "--ratios", "0.5", "--out", f"{out}.jsonl"]) == 0
    (record,) = read_records("by-file.jsonl")
    assert record.compressor == "filters-keep=fc3,fc3*-layer_ratios=fc1=0.25"
    assert record.config["controls"] == {"keep": ["fc3", "fc3*"], "ratios": {"fc1": 0.25}}
    assert main(["sweep", "run", "--config", "c.yaml", "--ratios", "0.5", "--out", "again.jsonl"]) == 0
    assert "1 records exist already" in capsys.readouterr().err
    assert main(["sweep", "run", "--ratios", "0.5", "--calibration", "16", "--out", "again.jsonl"]) == 0
    assert len(read_records("again.jsonl")) == 2
    assert main(["report", "again.jsonl", "--out", "r.html"]) == 0
    assert "--layer_ratios" in Path("r.html").read_text()


def test_a_layer_may_be_called_by_a_number() -> None:
    flags = make_parser("sweep").parse_args(["run", "--keep", "0", "--layer_ratios", "2=0.5"])
    assert (flags.keep, flags.layer_ratios) == ("0", "2=0.5")


def test_a_runs_config_is_a_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--lr", "0.05", "--out", "first"]) == 0
    assert main(["train", "--config", "first/config.yaml", "--seed", "1", "--out", "second"]) == 0
    first, second = (yaml.safe_load(Path(run, "config.yaml").read_text()) for run in ("first", "second"))
    assert second == first | {"seed": 1}


def test_resume_is_a_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--out", "run"]) == 0
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert main(["train", "--out", "run", "--resume"]) == 0


def test_overview_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(verb in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pliant ")


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [[verb] for verb in VERBS] + [["train", "--method", name] for name in METHODS])
def test_every_flag_is_explained(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(command, capsys).split("options:")[1].split())
    assert re.findall(r"(--\w+ \S+) \(", text) == []  # the type in brackets would follow the flag at once


def test_help_shows_what_all_methods_have_and_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["train"], capsys)
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == ["options", "data", "network", "method", "schedule", "machine", "run folder"]
    flags = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert flags == {*SETTINGS, "config", "print_config", "out", "resume"} - set(OWN)
    for name, method in METHODS.items():
        assert re.search(rf"^  {name} +{', '.join(method.cut_by) or 'all'} +{method.summary}$", text, re.MULTILINE)


@pytest.mark.parametrize("place", ["flag", "equals", "config"])
def test_help_for_a_method_shows_its_own_settings(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("method: q3r\n")
    flags = {
        "flag": ["--method", "q3r"],
        "equals": ["--method=q3r"],
        "config": ["--method", "sgd", "--config", str(tmp_path / "c.yaml")],
    }
    text = help_of(["train", *flags[place]], capsys)
    own = text.partition("settings of q3r:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  --(\w+)", own, re.MULTILINE) == ["k", "strength", "every"]
    told = " ".join(own.split())
    assert "--k K rank to go to: 3 is a count, 0.1 a share. (type: int | float | null, default: 0.2)" in told
    assert "default: 5)" in told
    assert "lr LR" in text


def test_help_for_an_unknown_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'sgd'?" in fails(["train", "--method", "sgdd", "--help"], capsys)


def test_a_printed_config_has_all_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--method", "q3r", "--model", "mlp", "--epochs", "1", "--print_config"])
    text = capsys.readouterr().out
    names = {*SETTINGS, "out", "resume"} - set(OWN) | set(METHODS["q3r"].own)
    assert set(yaml.safe_load(text)) == names
    Path("c.yaml").write_text(text)
    assert main(["train", "--config", "c.yaml", "--out", "run"]) == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["k"] == 0.2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "did you mean train?"),
        ("train --epoch 3", "unknown flag --epoch: did you mean --epochs?"),
        ("train --epochs three", "--epochs expects an integer, got 'three'"),
        ("train --epochs 2.5", "--epochs expects an integer, got '2.5'"),
        ("train --k some", "--k expects an integer or a number"),
        ("train --augment maybe", "--augment expects true or false, got 'maybe'"),
        ("train --epochs", "--epochs"),
        ("train here", "unexpected argument here"),
        ("train --config nowhere.yaml", "there is no file"),
        ("train --method sfw-rnk", "did you mean 'sfw-rank'?"),
        ("train --data cifar1", "did you mean 'cifar"),
        ("train --data cifar10 --data_dir nowhere", "nowhere"),
        ("train --model resnet9", "did you mean 'resnet8'?"),
        ("train --model nowhere:net", "nowhere"),
        ("train --method sfw-rank --k 0", "at least 1"),
        ("train --method sfw-rank --k 1.5", "(0, 1]"),
        ("train --method sfw-nm --pattern 4:2", "N:M"),
        ("sweep", "runs"),
        ("sweep nowhere", "not a run folder"),
        ("sweep nowhere --compressor rnk", "did you mean 'rank'?"),
        ("sweep nowhere --ratios 0,1.5", "0 <= ratio < 1"),
        ("compress nowhere --ratio 1", "0 <= ratio < 1"),
        ("compress a b", "b"),
        ("report nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(command.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_bad_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ("epoch: 3\n", "epochs: [\n", "epochs: three\n"):
        Path("c.yaml").write_text(content)
        assert "epoch" in fails(["train", "--config", "c.yaml"], capsys) or "[" in content


def test_a_config_file_that_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes(b"epochs: \xff\n")
    assert "UTF-8" in fails(["train", "--config", "c.yaml"], capsys)


def test_a_run_that_exists_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--out", "run"]) == 0
    capsys.readouterr()
    before = Path("run/model.safetensors").read_bytes()
    assert "--resume" in fails(["train", *QUICK, "--out", "run"], capsys)
    assert Path("run/model.safetensors").read_bytes() == before


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing past the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
from pliant.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_disk_without_room_is_one_line_and_earlier_files_survive(tmp_path: Path) -> None:
    command = ["train", *QUICK, "--out", str(tmp_path / "run")]
    # Measuring coverage writes files, too.
    unwatched = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    program = [sys.executable, "-c", FULL_DISK, *command]
    failed = subprocess.run(program, capture_output=True, text=True, check=False, env=unwatched)
    assert failed.returncode == 2
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("pliant: error: ")
    assert "large" in last
    assert "Traceback" not in failed.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "shape.json",
        "env.json",
        "train.jsonl",
        "checkpoint",
    }
    assert not list((tmp_path / "run" / "checkpoint").iterdir())
    assert main([*command, "--resume"]) == 0  # with room again, it goes on


def test_interruption_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", interrupt)
    assert main(["train", *QUICK, "--out", str(tmp_path / "run")]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "run" / CHECKPOINT).exists()
