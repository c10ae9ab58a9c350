"""SFW on tensors in pieces, with 1, 2 and 3 processes: each case of cases.py, run by worker.py, is a test here."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from .launching import torchrun
from .model_cases import CASES


@pytest.fixture(scope="session")
def failures(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Callable[[int], dict[str, str]]:
    """Return what failed with so many processes; two are started before three, which go on from their checkpoint.

    pytest-xdist has a session in each of its workers: they share what the first of them has found.
    """
    folder: Path = tmp_path_factory.getbasetemp().parent / f"processes-{testrun_uid}"
    folder.mkdir(exist_ok=True)

    def run(processes: int) -> dict[str, str]:
        with FileLock(folder / "lock"):
            for count in [2, processes]:
                done, found = folder / f"done-{count}.json", folder / f"failures-{count}.json"
                if not done.exists():
                    job = torchrun(count, "-m", "tests.distributed.worker", str(folder))
                    failed = json.loads(found.read_text()) if found.exists() else {}
                    done.write_text(json.dumps({**failed, "output": job.stdout[-20_000:] + job.stderr[-20_000:]}))
            result: dict[str, str] = json.loads((folder / f"done-{processes}.json").read_text())
            return result

    return run


def test_one_process_imports_nothing_of_this() -> None:
    program = """
import sys, torch, pliant
p = torch.nn.Parameter(torch.ones(3, 4))
opt = pliant.SFW(pliant.constrain(torch.nn.ParameterList([p]), [("*", pliant.filters(k=2))]))
p.grad = torch.ones(3, 4)
opt.step()
sys.exit("pliant.optim.sharded" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("processes", [2, 3, 1])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, processes: int, failures: Callable[[int], dict[str, str]]) -> None:
    found = failures(processes)
    assert name in found, f"the processes ended before this case:\n{found['output']}"
    assert not found[name], found[name]
