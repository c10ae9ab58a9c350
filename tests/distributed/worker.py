"""One of several processes: runs all cases and writes what failed, by torchrun -m tests.distributed.worker FOLDER."""

import json
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .launching import leave
from .model_cases import CASES


def main(folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    # A case that fails on one process leaves the others waiting; not for long.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    failures: dict[str, str] = {}
    path = folder / f"failures-{dist.get_world_size()}.json"
    seconds = {}
    for name in chosen or list(CASES):
        started = time.perf_counter()
        failure = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".* started outside of their balls")
            try:
                CASES[name](mesh, folder)
            except BaseException:  # torch.distributed.checkpoint raises errors that are no Exception
                failure = traceback.format_exc()
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, failure)
        texts = [f"process {rank}:\n{text}" for rank, text in enumerate(everywhere) if text]
        failures[name] = "\n".join(texts)
        seconds[name] = time.perf_counter() - started
        if dist.get_rank() == 0:
            path.write_text(json.dumps(failures))
    if dist.get_rank() == 0:
        (folder / f"seconds-{dist.get_world_size()}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
