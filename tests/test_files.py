import os
import stat
from pathlib import Path

import pytest

from pliant.files import replacing, write_text


def test_content_appears_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "σ first")
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_former_file_survives_a_failure(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "first")

    def fail_half_way() -> None:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail_half_way()
    assert (tmp_path / "a.txt").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_results_are_as_readable_as_other_files(tmp_path: Path) -> None:
    former = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
