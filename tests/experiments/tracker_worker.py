"""Programs that train with a tracker and tell what it holds: python -m tests.tracker_worker train|read NAME FOLDER.

"train" makes two runs, the first one interrupted between a line of its log and the checkpoint, and resumed. "read"
prints JSON: for each run as the tracker has it, by name and first step, its name, its settings, and [step, values] in
order. It is another process, since Weights & Biases writes until the first one has ended.
"""

import json
import os
import sqlite3
import struct
import sys
from pathlib import Path
from typing import Any

from pliant import train
from pliant.experiments.training.session import Session

Tracked = dict[str, Any]


def train_twice(name: str) -> None:
    options: dict[str, Any] = {"model": "lenet5", "width": 0.5, "batch_size": 256, "tracker": name}
    save = Session.save

    def save_then_die(self: Session, path: Path) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        save(self, path)

    Session.save = save_then_die  # type: ignore[method-assign]
    try:
        train(**options, method="sfw-rank", epochs=3, out="runs/one")
    except KeyboardInterrupt:
        Session.save = save  # type: ignore[method-assign]
    train(**options, method="sgd", epochs=1, out="runs/two")
    train(out="runs/one", resume=True)


def read_wandb() -> list[Tracked]:
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in Path("runs").glob("*/wandb/offline-run-*/*.wandb"):
        run: Tracked = {"name": "", "settings": {}, "values": []}
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            match record.WhichOneof("record_type"):
                case "run":
                    run["name"] = record.run.display_name
                    run["settings"] |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
                case "config":
                    run["settings"] |= {x.key: json.loads(x.value_json) for x in record.config.update}
                case "history":
                    items = {(x.key or "/".join(x.nested_key)): json.loads(x.value_json) for x in record.history.item}
                    step = items["_step"]
                    run["values"].append([step, {k: v for k, v in items.items() if not k.startswith("_")}])
        runs.append(run)
    return runs


def log_records(data: bytes) -> list[bytes]:
    """Return the records of a file in LevelDB's log format behind a header of 7 bytes."""
    records, parts, place = [], [], 7
    while place < len(data):
        if 32768 - place % 32768 < 7:  # too short for the head of a part: filled up
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            records.append(b"".join(parts))
            parts = []
    return records


def read_mlflow() -> list[Tracked]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'pliant'")
    runs = []
    for run in client.search_runs([experiment.experiment_id]):
        values: list[list[Any]] = []
        for key in run.data.metrics:
            for i, metric in enumerate(client.get_metric_history(run.info.run_id, key)):
                if i == len(values):
                    values.append([metric.step, {}])
                assert values[i][0] == metric.step
                values[i][1][key] = metric.value
        runs.append({"name": run.info.run_name, "settings": run.data.params, "values": values})
        assert run.info.status == "FINISHED"
    return runs


def read_trackio() -> list[Tracked]:
    from trackio.utils import TRACKIO_DIR

    with sqlite3.connect(Path(TRACKIO_DIR) / "pliant.db") as database:
        runs = []
        for key, name, config in database.execute("SELECT run_id, run_name, config FROM configs"):
            rows = database.execute("SELECT step, metrics FROM metrics WHERE run_id = ? ORDER BY id", [key])
            values = [[step, json.loads(metrics)] for step, metrics in rows]
            runs.append({"name": name, "settings": json.loads(config), "values": values})
        return runs


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}

if __name__ == "__main__":
    action, tracker, folder = sys.argv[1:]
    os.chdir(folder)
    if action == "train":
        train_twice(tracker)
    else:
        print(json.dumps(sorted(READERS[tracker](), key=lambda run: (run["name"], run["values"][0][0]))))
