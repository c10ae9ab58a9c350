"""What an earlier version wrote is read as it was meant: run folders, records, plans, artefacts, comparisons, states.

`data` was made by `make.py` with commit c6beaf1, before the files of the package moved into folders. Outputs are those
that the earlier version gave, on a machine of its own: the last bits may differ, nothing else.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.cli import main

DATA = Path(__file__).parent / "data"
OUTPUTS = json.loads((DATA / "outputs.json").read_text(encoding="utf-8"))
FOLDERS = sorted(name for name in OUTPUTS if "/" in name)
# How all networks were cut.
AS_THEN, NORMS, SIZES = ["--refit", "false"], ["--importance", "l2"], ["--importance", "magnitude"]
IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)


class Net(nn.Module):
    """The network of make.py."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def run(*arguments: object) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main([str(argument) for argument in arguments]) == 0
    return shown.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "data"))


@pytest.mark.parametrize("name", FOLDERS)
def test_networks_give_the_outputs_of_then(name: str) -> None:
    torch.testing.assert_close(pliant.load(DATA / name)(IMAGES), torch.tensor(OUTPUTS[name]), rtol=1e-4, atol=1e-4)


def test_an_export_of_a_network_of_ones_own_is_rebuilt() -> None:
    tokens = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)
    small = pliant.rebuild(Net(), DATA / "heads")
    torch.testing.assert_close(small(tokens), torch.tensor(OUTPUTS["heads"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("suffix", "epochs"), [("", 2), ("-numuon", 4)])
def test_a_training_goes_on(suffix: str, epochs: int, data: Path) -> None:
    folder = data / "runs" / f"unfinished{suffix}"
    run("train", "--out", folder, "--resume")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epochs + 1))
    # Steps of another processor round otherwise, and vertices may then have other directions.
    torch.testing.assert_close(
        pliant.load(folder)(IMAGES), torch.tensor(OUTPUTS[f"finished{suffix}"]), rtol=0.05, atol=0.1
    )


def test_records_are_read_and_written_back_unchanged() -> None:
    lines = (DATA / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = pliant.read_records(DATA / "records.jsonl")
    assert [record.to_dict() for record in records] == [json.loads(line) for line in lines]
    assert [pliant.Record.from_dict(record.to_dict()) for record in records] == records


def test_a_sweep_finds_its_records(data: Path) -> None:
    before = (data / "records.jsonl").read_bytes()
    for compressor in ("filters", "rank", "filters+rank+int8"):
        options = ["--compressor", compressor, "--ratios", "0,0.5,0.9", "--out", data / "records.jsonl"]
        run("sweep", data / "runs" / "filters", *options, *AS_THEN, *(NORMS if "filters" in compressor else []))
    run("sweep", data / "runs" / "filters", "--compressor", "nm", "--out", data / "records.jsonl", *AS_THEN, *SIZES)
    assert (data / "records.jsonl").read_bytes() == before


def test_the_report_says_the_same(tmp_path: Path) -> None:
    page, tables = tmp_path / "report.html", tmp_path / "report.md"
    run("report", DATA / "records.jsonl", "--out", page, "--markdown", tables)
    assert tables.read_text(encoding="utf-8") == (DATA / "report.md").read_text(encoding="utf-8")


def test_a_comparison_that_would_cut_otherwise_now_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(data / "suite.yaml"), "--out", str(data / "comparison")]) == 2
    assert "with compressor 'filters', the first measure of family filters has 'filters-loss-refit' now" in (
        capsys.readouterr().err
    )


def test_a_comparison_is_complete(data: Path) -> None:
    folder = data / "comparison"
    before = {name: (folder / name).read_bytes() for name in ("records.jsonl", "trials.jsonl", "report.md")}
    suite = (data / "suite.yaml").read_text(encoding="utf-8")
    suite = suite.replace("compressor: rank,", "compressor: rank, refit: false,")
    suite = suite.replace("compressor: filters,", "compressor: filters, importance: l2, refit: false,")
    (data / "suite.yaml").write_text(suite, encoding="utf-8")
    run("compare", data / "suite.yaml", "--out", folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("path", [*sorted(DATA.glob("*/*/plan.json")), DATA / "heads" / "plan.json"], ids=str)
def test_plans_are_read_and_written_back_unchanged(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(pliant.Plan.from_dict(stored).to_dict())) == stored


def test_a_network_is_cut_as_it_was_then(data: Path) -> None:
    out = data / "again"
    options = ["--compressor", "filters", "--ratio", "0.5", "--out", out, *AS_THEN, *NORMS]
    run("compress", data / "runs" / "filters", *options)
    plans = [json.loads((folder / "plan.json").read_text(encoding="utf-8")) for folder in (out, DATA / "small/filters")]
    for plan in plans:
        plan["compressible"].sort()  # in whatever order the channels are found
    assert plans[0] == plans[1]


def test_an_optimizer_goes_on() -> None:
    model = Net()
    groups = pliant.constrain(model, [("*.weight", pliant.rank(k=2, radius=3))], default=None)
    optimizer = pliant.SFW(groups, lr=0.1)
    schedule = pliant.KSchedule(optimizer, 3, steps=5)
    state = torch.load(DATA / "optimizer.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    tokens = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)
    model(tokens).square().sum().backward()
    optimizer.step()
    constrained = [group for group in optimizer.param_groups if group["ball"]]
    for group in constrained:
        ball = pliant.NormBall.from_spec(group["ball"])
        assert ball.norm.inner == pliant.KSupport(2)
        assert all(ball.contains(p) for p in group["params"])
    assert constrained
