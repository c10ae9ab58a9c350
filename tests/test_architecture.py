"""Who may import whom; the public door; what works without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pliant

SOURCE = Path(pliant.__file__).parent


def imported(room: str) -> set[str]:
    """Return the rooms of pliant that a room imports, anywhere in its files."""
    files = SOURCE.glob(f"{room}/*.py") if (SOURCE / room).is_dir() else [SOURCE / f"{room}.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [f"pliant.{a.name}" for a in node.names] if node.module == "pliant" else [node.module]
            elif isinstance(node, ast.ImportFrom) and node.level == (2 if (SOURCE / room).is_dir() else 1):
                names = [f"pliant.{node.module}"]
            found |= {name.split(".")[1] for name in names if name.startswith("pliant.")}
    return found - {room, "__version__"}


ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "linalg": set(),
    "projections": {"linalg"},
    "norms": {"projections", "linalg"},
    "ball": {"norms", "linalg"},
    "oracles": {"norms", "linalg"},
    "fused": {"oracles", "norms", "linalg"},
    "distributed": {"oracles", "ball", "norms", "linalg"},
    "sfw": {"distributed", "fused", "oracles", "ball", "norms", "linalg"},
    "constraints": {"sfw", "distributed", "fused", "oracles", "ball", "norms", "linalg", "errors"},
    "thresholding": {"constraints", "sfw", "distributed", "ball", "norms", "linalg", "errors"},
    "layers": {"attention", "errors"},
    "blocks": {"constraints", "attention", "groups", "errors"},
    # Neither norms, ball nor sfw: a mistake there must not help or harm both sides of a comparison.
    "baselines": {"linalg", "errors"},
    "attention": set(),
    "groups": {"layers"},
    "coupling": {"attention", "groups", "layers"},
    "heads": {"attention", "groups", "layers"},
    "structure": {"coupling", "heads", "groups", "layers", "attention"},
    "compression": {"structure", "heads", "layers", "errors"},
    "lines": {"errors", "files"},
    "records": {"errors", "lines"},
    "areas": {"errors"},
    "curves": {"records"},
    "standings": {"areas", "curves", "records"},
    "tables": {"areas", "curves", "standings", "records"},
    "reporting": {"areas", "curves", "standings", "tables", "records", "errors", "files"},
    "models": {"errors"},
    "onednn": set(),
    "readers": {"errors"},
    "trackers": {"errors"},
    "data": {"readers", "errors"},
    "tracing": {"layers", "files", "errors"},
    "measuring": {"tracing", "layers", "errors"},
    "budgets": {"compression", "measuring", "layers", "errors"},
}


@pytest.mark.parametrize("room", ALLOWED)
def test_who_imports_whom(room: str) -> None:
    assert imported(room) <= ALLOWED[room]


def test_every_room_is_found() -> None:
    assert imported("sfw") == ALLOWED["sfw"]  # the scan sees what is there
    assert "structure" in imported("compression")


def test_public_names_are_there() -> None:
    for name in pliant.__all__:
        assert getattr(pliant, name) is not None
    assert set(pliant.__all__) <= set(dir(pliant))
    with pytest.raises(AttributeError, match="sgd"):
        pliant.sgd  # noqa: B018


def test_no_module_bears_the_name_of_a_public_function() -> None:
    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not modules & set(pliant.__all__)


@pytest.mark.parametrize("statement", ["import pliant", "import pliant; pliant.report", "import pliant.cli"])
def test_no_torch_needed(statement: str) -> None:
    program = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
