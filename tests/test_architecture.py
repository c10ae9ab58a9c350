"""The public door; what works without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import pliant

SOURCE = Path(pliant.__file__).parent


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
