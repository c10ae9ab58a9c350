"""The wheel: it holds what a user needs and nothing else, and works where the source is not."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import pliant

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is left in the source, with the backend at hand: no network."""
    pytest.importorskip("hatchling")
    source = tmp_path_factory.mktemp("source") / "pliant"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("src", "tests", "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    }
    assert {"pliant/py.typed", "pliant/reporting/templates/report.html.j2", "pliant/cli.py"} <= expected
    package = {name for name in names if name.startswith("pliant/")}
    assert package == expected
    (info,) = {name.partition("/")[0] for name in names - package}
    assert info == f"pliant-{pliant.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(info).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Requires-Python: {project['requires-python']}" in metadata
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(needed) == len(project["dependencies"])
    scripts = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "pliant = pliant.cli:main" in scripts


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment that sees this one's packages but not this one's pliant."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python, script = home / "bin" / "python", home / "bin" / "pliant"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # A .pth file adds a folder behind the environment's own, and the .pth files in that folder are not followed: an
    # editable pliant there stays out of sight.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    def run(*command: str | Path) -> str:
        environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import pliant; print(pliant.__file__); [getattr(pliant, n) for n in pliant.__all__]")
    assert Path(where.strip()).is_relative_to(packages)
    assert run(script, "--version").strip() == f"pliant {pliant.__version__}"
    # One network of the three, refitted on few images: test_demo runs the others.
    program = """
import sys
from pliant.cli import main
from pliant.experiments import demo
demo.RECIPES, demo.CALIBRATION = {"sfw-rank": demo.RECIPES["sfw-rank"]}, 64
sys.exit(main(["demo", "--epochs", "1", "--out", "demo"]))
"""
    assert "sfw-rank" in run(python, "-c", program)
    assert "</html>" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
