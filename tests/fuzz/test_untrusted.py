"""Nothing that comes from a file is run: what the source may not contain, and what a hostile file would have to do."""

import ast
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import pliant
from pliant.errors import PliantError
from pliant.experiments.run_folder import Run, load
from pliant.experiments.train import train
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.storage import read_plan

SOURCES = sorted(Path(pliant.__file__).parent.rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "np.load", "numpy.load"}


def faults(tree: ast.AST) -> Iterator[str]:
    """Yield what a source should not do with a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in UNSAFE_CALLS or (name == "torch.load" and not safe):
                yield name
            if any(
                k.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(k.value) != "False"
                for k in node.keywords
            ):
                yield f"{name} with {ast.unparse(node)}"


def test_the_source_unpickles_nothing() -> None:
    found = {path.name: list(faults(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}
    assert {name: what for name, what in found.items() if what} == {}
    assert any("torch.load" in path.read_text() for path in SOURCES)  # the scan has something to look at


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader)",
        "np.load(path)",
        "read(path, allow_pickle=True)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_what_is_unsafe(line: str) -> None:
    assert list(faults(ast.parse(line)))


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrusted") / "run"
    return train(model="mlp", width=0.05, epochs=1, batch_size=512, out=str(folder))


@pytest.mark.parametrize("name", [str(CHECKPOINT), "model.safetensors", "config.yaml", "shape.json", "plan.json"])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(name: str, run: Path, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", run / name
    former = file.read_bytes() if file.exists() else None
    try:
        saved, array = io.BytesIO(), io.BytesIO()
        torch.save({"model": Bomb(mark)}, saved)
        np.save(array, np.array([Bomb(mark)], dtype=object))
        for content in (saved.getvalue(), array.getvalue(), pickle.dumps(Bomb(mark))):
            file.write_bytes(content)
            with pytest.raises(PliantError, match=str(run)):
                train(out=str(run), resume=True) if name == str(CHECKPOINT) else load(run)
    finally:
        file.unlink()
        if former is not None:
            file.write_bytes(former)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch mark']",
        "model: !!python/name:os.system",
        "model: !!python/object/new:pathlib.Path ['mark']",
    ],
)
def test_yaml_that_names_python_objects_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pliant.cli import main

    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(PliantError, match=r"config\.yaml is damaged"):
        Run.open(tmp_path)
    assert main(["train", "--config", "config.yaml"]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_names_in_files_lead_nowhere(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, data sets and methods called like paths are names: no file is read or written there."""
    from pliant.experiments.compress import compress_run

    monkeypatch.chdir(tmp_path)
    small = compress_run(run, "weights", ratio=0.5, importance="magnitude", refit=False, out="small")
    text = (small / "plan.json").read_text().replace('"fc1"', '"../../fc1"')
    (small / "plan.json").write_text(text)
    with pytest.raises(PliantError, match=r"has no layer '\.\./\.\./fc1'"):
        load(small)
    assert "../../fc1" in {layer.name for layer in read_plan(small / "plan.json").layers}
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in (("model", "../../mlp"), ("model", "/etc/passwd")):
        (small / "config.yaml").write_text(yaml.safe_dump(config | {name: value}))
        with pytest.raises(PliantError, match="unknown model"):
            load(small)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
