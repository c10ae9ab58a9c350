import os
import stat
from pathlib import Path

import pytest

from pliant.files import making_folder, replacing, write_text


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


def test_a_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    former = os.umask(0o022)
    try:
        with making_folder(tmp_path / "a" / "b") as room:
            (room / "x.txt").write_text("x")
            assert not (tmp_path / "a" / "b").exists()
    finally:
        os.umask(former)
    assert (tmp_path / "a" / "b" / "x.txt").read_text() == "x"
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def fill(folder: Path, content: str, *, replace: bool, error: Exception | None = None) -> None:
    with making_folder(folder, replace=replace) as room:
        (room / content).write_text(content)
        if error:
            raise error


@pytest.mark.parametrize("replace", [True, False])
def test_the_former_folder_survives_a_failure(replace: bool, tmp_path: Path) -> None:
    fill(tmp_path / "a", "first", replace=False)
    with pytest.raises(OSError, match="full"):
        fill(tmp_path / "a", "second", replace=replace, error=OSError("disk full"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_holds_something_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", "first", replace=False)
    with pytest.raises(OSError, match="a"):
        fill(tmp_path / "a", "second", replace=False)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["first"]
    fill(tmp_path / "a", "third", replace=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["third"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
