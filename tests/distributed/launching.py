"""Starting several processes as users do, with torchrun."""

import atexit
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(
    processes: int, *arguments: str, seconds: float = 600, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a program in so many processes, in a folder; one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def leave() -> None:
    """End a process of torchrun that has done its work, without Python's own shutdown.

    DTensor's caches keep process groups, whose threads may still let go of a tensor while Python shuts down; torch
    then aborts the process ("terminate called without an active exception"), rarely, and often on a busy machine.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
