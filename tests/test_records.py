"""Records: validation, the file format, and that a file survives whatever interrupts its writer."""

from __future__ import annotations

import errno
import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import BadInput, DamagedFile
from pliant.records import Record, append_record, read_records, records_file

REQUIRED: dict[str, Any] = {
    "run": "sfw-0",
    "method": "sfw-rank",
    "model": "resnet20",
    "data": "cifar10",
    "seed": 0,
    "compressor": "rank",
    "ratio": 0.5,
    "top1": 0.88,
    "top1_raw": 0.81,
    "top1_dense": 0.91,
    "val_top1": 0.87,
    "params": 136_000,
    "params_dense": 272_000,
    "nonzero": 135_990,
    "macs": 21_000_000,
    "macs_dense": 41_000_000,
    "bytes": 550_000,
    "bytes_dense": 1_100_000,
    "latency_s": 0.004,
    "latency_dense_s": 0.006,
    "versions": {"torch": "2.13.0"},
}


def make(**changes: Any) -> Record:
    return Record(**(REQUIRED | changes))


FULL = make(
    allocation="energy",
    ratio_removed=0.497,
    layers=[
        {"name": "conv1", "kind": "rank", "kept": 8, "total": 16, "params": 200, "params_dense": 432},
    ],
    refused=[("fc", "the classifier is kept")],
    config={"k": 0.1, "radius": 10, "betas": (0.9, 0.99)},
    created="2026-01-02T03:04:05+00:00",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


# ------------------------------------------------------------------------------------------------- validation


def test_a_record_with_only_the_required_fields_loads() -> None:
    record = Record.from_dict(REQUIRED)
    assert record == make()
    assert record.layers == []
    assert record.latency_batch == 1


def test_dictionaries_come_back_equal() -> None:
    assert Record.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


def test_the_record_keeps_no_reference_to_mutable_arguments() -> None:
    config = {"k": 1}
    record = make(config=config)
    config["k"] = 2
    assert record.config == {"k": 1}


def test_unknown_fields_are_kept_and_written_back() -> None:
    record = Record.from_dict(REQUIRED | {"energy_joule": 3.5})
    assert record.extra == {"energy_joule": 3.5}
    assert record.to_dict()["energy_joule"] == 3.5


def test_a_record_holds_the_accuracies_before_a_refit_and_its_decision() -> None:
    decision = {
        "result": "refitted",
        "errors": {"cut": 0.3, "refitted": 0.1},
        "samples": 64,
        "seconds": {"choosing": 1.0},
    }
    record = make(top1_reestimated=0.7, val_top1_reestimated=0.6, refit=decision)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.to_dict()["refit"] == decision
    # Records without a refit are those of earlier versions.
    assert not {"top1_reestimated", "val_top1_reestimated", "refit"} & make().to_dict().keys()
    for wrong in (
        {"top1_reestimated": 1.5},
        {"val_top1_reestimated": "0.5"},
        {"refit": [1]},
        {"refit": {"a": math.nan}},
    ):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            make(**wrong)


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_missing_required_field_is_named(name: str) -> None:
    with pytest.raises(BadInput, match=rf"needs the field {name}$"):
        Record.from_dict({key: value for key, value in REQUIRED.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run", ""),
        ("method", None),
        ("allocation", 3),
        ("run", "half a pair \udc80"),
        ("config", {"note": "half a pair \udc80"}),
        ("seed", -1),
        ("seed", True),
        ("seed", 1.0),
        ("ratio", 1.5),
        ("ratio", "0.5"),
        ("top1", 88.0),
        ("top1", math.nan),
        ("top1_raw", -0.1),
        ("top1_dense", math.inf),
        ("top1", 10**400),
        ("ratio_removed", 2),
        ("val_top1_raw", math.nan),
        ("params", 3.5),
        ("params_dense", 0),
        ("nonzero", 136_001),
        ("nonzero_dense", 0),
        ("macs_dense", 0),
        ("latency_s", 0.0),
        ("latency_s", math.inf),
        ("latency_batch", 0),
        ("versions", {"torch": 2.13}),
        ("versions", []),
        ("config", {"radius": math.inf}),
        ("config", {"device": object()}),
        ("layers", {}),
        ("layers", [{"name": "conv1"}]),
        (
            "layers",
            [{"name": "c", "kind": "rank", "kept": 9, "total": 8, "params": 1, "params_dense": 1}],
        ),
        ("refused", [["fc"]]),
        ("refused", ["ab"]),
        ("created", "yesterday"),
        ("extra", {"top1": 1.0}),
    ],
)
def test_invalid_values_are_refused_in_one_line_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=name) as caught:
        make(**{name: value})
    assert "\n" not in str(caught.value)


def test_the_key_tells_measurements_apart_and_nothing_else() -> None:
    same = make(top1=0.1, ratio=0.1 + 0.2, created="2026-01-01")
    assert same.key() == make(ratio=0.3).key()
    others = [
        make(ratio=0.31),
        make(ratio=0.3, run="other"),
        make(ratio=0.3, weights="0" * 64),
        make(ratio=0.3, compressor="rank-whitened"),
        make(ratio=0.3, allocation="energy"),
        make(ratio=0.3, pattern="2:4"),
        make(ratio=0.3, pattern="4:8"),
    ]
    assert len({record.key() for record in [same, *others]}) == len(others) + 1


# --------------------------------------------------------------------------------------------------- the file


def test_records_come_back_in_order(path: Path) -> None:
    records = [make(ratio=ratio) for ratio in (0.0, 0.5, 0.9)] + [FULL, make(run="Größe \u2028 'x' 网络")]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    assert path.read_bytes().count(b"\n") == len(records)


def test_the_folder_is_made(tmp_path: Path) -> None:
    append_record(tmp_path / "new" / "records.jsonl", FULL)
    assert read_records(tmp_path / "new" / "records.jsonl") == [FULL]


def test_an_empty_file_holds_no_records_and_blank_lines_are_none(path: Path) -> None:
    path.write_text("")
    assert read_records(path) == []
    path.write_text("\n \n")
    assert read_records(path) == []


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"none\.jsonl: expected a file of records"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DamagedFile, match="expected a file of records"):
        read_records(tmp_path)


def test_a_line_cut_at_any_byte_is_ignored_and_then_dropped(path: Path) -> None:
    record = make(run="Größe")
    append_record(path, record)
    whole = path.read_bytes()
    for cut in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert read_records(path) == [record], cut
        append_record(path, FULL)
        assert read_records(path) == [record, FULL], cut


def test_a_whole_last_line_without_newline_counts_and_stays(path: Path) -> None:
    path.write_text(json.dumps(REQUIRED))
    assert read_records(path) == [make()]
    append_record(path, FULL)
    assert read_records(path) == [make(), FULL]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        json.dumps(REQUIRED).encode()[:-5],
        json.dumps(REQUIRED | {"top1": 2}).encode(),
        json.dumps(REQUIRED | {"top1": math.nan}).encode(),
    ],
)
def test_a_damaged_line_is_an_error_that_names_file_and_line(path: Path, line: bytes) -> None:
    append_record(path, FULL)
    good = path.read_bytes()
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(DamagedFile, match=r"records\.jsonl:2: ") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_another_kind_of_file_is_neither_read_nor_changed(path: Path) -> None:
    path.write_text("# Notes\nnot a record")
    with pytest.raises(DamagedFile, match="is this the right file"):
        append_record(path, FULL)
    with pytest.raises(DamagedFile, match="is this the right file"):
        read_records(path)
    assert path.read_text() == "# Notes\nnot a record"


def test_a_full_disk_leaves_the_file_as_it_was(path: Path) -> None:
    append_record(path, FULL)
    before = path.read_bytes()
    # A limit on the file size cuts the write short in the middle, as a full disk does.
    program = f"""
import resource, signal
from pliant.records import append_record, read_records
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
record = read_records({str(path)!r})[0]
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} + 100, resource.RLIM_INFINITY))
try:
    append_record({str(path)!r}, record)
except OSError as error:
    print(error.errno)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) == errno.ENOSPC
    assert path.read_bytes() == before


def test_several_processes_may_append_to_one_file(path: Path) -> None:
    record = replace(FULL, config={"notes": "x" * 20_000})
    append_record(path, record)
    program = f"""
from pliant.records import append_record, read_records
record = read_records({str(path)!r})[0]
for _ in range(20):
    append_record({str(path)!r}, record)
"""
    writers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert read_records(path) == [record] * 61


# -------------------------------------------------------------------------------------------- packed with gzip


@pytest.fixture
def packed(path: Path) -> Path:
    return path.with_name("records.jsonl.gz")


RECORDS = [make(ratio=ratio, config={"k": 0.1, "notes": "x" * 100}) for ratio in (0.0, 0.3, 0.5)]


def plain(records: list[Record]) -> bytes:
    return b"".join(json.dumps(record.to_dict()).encode() + b"\n" for record in records)


def test_a_packed_file_holds_the_same_records_in_less(path: Path, packed: Path) -> None:
    path.write_bytes(plain(RECORDS))
    subprocess.run(["gzip", "-9n", path], check=True)  # as the documentation says
    assert read_records(packed) == RECORDS
    assert packed.stat().st_size < len(plain(RECORDS)) / 2


def test_a_packed_file_is_known_by_its_content_too(path: Path) -> None:
    path.write_bytes(gzip.compress(plain(RECORDS)))
    assert read_records(path) == RECORDS
    append_record(path, FULL)
    assert read_records(path) == [*RECORDS, FULL]
    assert gzip.decompress(path.read_bytes()).startswith(plain(RECORDS))


def test_a_packed_file_grows(packed: Path) -> None:
    for record in RECORDS:
        append_record(packed, record)
    assert read_records(packed) == RECORDS
    assert gzip.decompress(packed.read_bytes()) == plain(RECORDS)


def test_a_packed_file_without_a_last_newline_grows(packed: Path) -> None:
    packed.write_bytes(gzip.compress(plain(RECORDS)[:-1]))
    append_record(packed, FULL)
    assert read_records(packed) == [*RECORDS, FULL]


@pytest.mark.parametrize("empty", [b"", gzip.compress(b"")], ids=["no member", "an empty member"])
def test_an_empty_packed_file_holds_no_records(packed: Path, empty: bytes) -> None:
    packed.write_bytes(empty)
    assert read_records(packed) == []
    append_record(packed, FULL)
    assert read_records(packed) == [FULL]


def test_an_appended_member_cut_at_any_byte_is_ignored_and_then_dropped(packed: Path) -> None:
    whole, added = gzip.compress(plain(RECORDS)), gzip.compress(plain([FULL]))
    for cut in range(1, len(added)):
        packed.write_bytes(whole + added[:cut])
        assert read_records(packed) == RECORDS, cut
        append_record(packed, FULL)
        assert packed.read_bytes()[: len(whole)] == whole
        assert read_records(packed) == [*RECORDS, FULL], cut


def test_packed_lines_that_end_early_are_an_error(packed: Path) -> None:
    many = plain([make(ratio=share / 1000, config={"notes": "x" * share}) for share in range(200)])
    for text in (many, plain(RECORDS) + many):
        content = gzip.compress(text)
        for cut in (len(content) // 2, len(content) - 1):
            packed.write_bytes(content[:cut])
            for act in (read_records, lambda path: append_record(path, FULL)):
                with pytest.raises(DamagedFile, match="ends in the middle of the packed lines; get it anew"):
                    act(packed)
            assert packed.read_bytes() == content[:cut]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (plain(RECORDS), r"expected lines packed with gzip, got .*incorrect header check"),
        (gzip.compress(plain(RECORDS)) + b"more", "incorrect header check"),
        (gzip.compress(plain(RECORDS))[:-8] + bytes(8), "incorrect data check"),
        (gzip.compress(plain(RECORDS)[:-20]), "its last line is cut; unpack the file, delete that line"),
        (gzip.compress(b"notes"), "is this the right file"),
    ],
    ids=["plain", "more", "checksum", "cut", "notes"],
)
def test_a_damaged_packed_file_is_named_and_not_changed(packed: Path, content: bytes, words: str) -> None:
    packed.write_bytes(content)
    for act in (read_records, lambda path: append_record(path, FULL)):
        with pytest.raises(DamagedFile, match=words) as caught:
            act(packed)
        assert str(packed) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert packed.read_bytes() == content


def test_a_packed_line_that_is_damaged_is_named(packed: Path) -> None:
    packed.write_bytes(gzip.compress(plain(RECORDS) + b"[]\n"))
    with pytest.raises(DamagedFile, match=r"records\.jsonl\.gz:4: expected a JSON object, got list; mend or delete"):
        read_records(packed)


def test_a_decompression_bomb_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pliant.jsonl.LARGEST", 2**20)
    for content in (gzip.compress(bytes(2**21)), gzip.compress(b" " * 2**19 + b"\n") * 3):
        packed.write_bytes(content)
        for act in (read_records, lambda path: append_record(path, FULL)):
            with pytest.raises(DamagedFile, match="unpacks to more than 1 MiB; is this the right file"):
                act(packed)


def test_the_file_of_a_folder_is_the_packed_one_where_there_is_one(tmp_path: Path) -> None:
    assert records_file(tmp_path) == tmp_path / "records.jsonl"
    append_record(tmp_path / "records.jsonl.gz", FULL)
    assert records_file(tmp_path) == tmp_path / "records.jsonl.gz"
    append_record(tmp_path / "records.jsonl", FULL)
    with pytest.raises(BadInput, match=r"holds records\.jsonl and records\.jsonl\.gz: keep one of them"):
        records_file(tmp_path)


def test_importing_records_and_reporting_loads_neither_torch_nor_numpy() -> None:
    program = """
import sys
import pliant.records, pliant.reporting.page
print([name for name in ("torch", "numpy", "pandas") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
