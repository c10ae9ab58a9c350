"""What other packages offer is found by name; a broken package is named, and harms nobody else."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from pliant.errors import BadInput
from pliant.extensions import already_imported, find, import_named, installed, names, names_of

OWN = {"ours": 1, "mine": 2}


def install(folder: Path, package: str, entries: dict[str, str], code: str = "", group: str = "pliant.methods") -> None:
    """Put a package with entry points into a folder, as pip would."""
    (folder / f"{package}.py").write_text(code, encoding="utf-8")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    lines = "\n".join(f"{name} = {value}" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def is_number(thing: object) -> str | None:
    return None if isinstance(thing, int) else f"expected a number, got a {type(thing).__name__}"


def test_ours_come_first_and_cannot_be_taken(folder: Path) -> None:
    install(folder, "taking_our_name", {"ours": "taking_our_name:x"}, "x = 3")
    assert find("method", "ours", OWN, is_number) == 1


def test_what_a_package_offers_is_found_by_its_name(folder: Path) -> None:
    install(folder, "offering_one", {"theirs": "offering_one:x"}, "x = 3")
    assert find("method", "theirs", OWN, is_number) == 3
    assert find("method", "theirs", OWN, is_number, lambda name, x: 10 * x) == 30
    assert names("method", OWN) == ["ours", "mine", "theirs"]
    assert "theirs" not in installed("norm")


def test_the_names_of_an_object_are_told_without_an_import(folder: Path) -> None:
    install(
        folder, "naming_one", {"theirs": "naming_one:Outer.x", "other": "naming_one:y"}, "class Outer: x = []\ny = []"
    )
    assert already_imported("naming_one:y") is None
    assert names_of("method", []) == []
    assert "naming_one" not in sys.modules
    thing = find("method", "theirs", {}, lambda _: None)
    assert names_of("method", thing) == ["theirs"]
    assert already_imported("naming_one:Outer.x") is thing
    assert already_imported("naming_one:z") is None


def test_a_module_is_named_without_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_installed.py").write_text("x = 4\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find("method", "not_installed:x", OWN, is_number) == 4
    assert str(tmp_path) not in sys.path


def test_an_unknown_name_tells_all_that_are_known(folder: Path) -> None:
    install(folder, "offering_another", {"theirs": "offering_another:x"}, "x = 3")
    with pytest.raises(
        BadInput, match=r"^unknown method 'their': did you mean 'theirs'\? known are mine, ours, theirs$"
    ):
        find("method", "their", OWN, is_number)


@pytest.mark.parametrize(
    ("entries", "code", "message"),
    [
        ({"m": "broken_p:x"}, "import nowhere_to_be_found", "cannot be imported: ModuleNotFoundError: No module named"),
        ({"m": "broken_p:x"}, "import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ({"m": "broken_p:x"}, "1/0", "cannot be imported: ZeroDivisionError: division by zero"),
        ({"m": "broken_p:y"}, "x = 3", "cannot be imported: AttributeError: module 'broken_p' has no attribute 'y'"),
        ({"m": "broken_p:x"}, "x = 'three'", "expected a number, got a str"),
        ({"m": "broken_p:x"}, "raise ValueError('two\\nlines')", "cannot be imported: ValueError: two lines"),
        ({"m": "broken_p:"}, "x = 3", "expected an entry point package.module:name"),
    ],
)
def test_a_broken_package_is_named_in_one_line(
    folder: Path, entries: dict[str, str], code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, "broken_p", entries, code)
    monkeypatch.delitem(sys.modules, "broken_p", raising=False)
    with pytest.raises(BadInput) as caught:
        find("method", "m", OWN, is_number)
    text = str(caught.value)
    assert text.startswith("method 'm' of the package broken_p (broken_p:")
    assert message in text
    assert "\n" not in text
    assert find("method", "mine", OWN, is_number) == 2
    assert "m" in names("method", OWN)


@pytest.mark.parametrize("reference", ["odd_package", "odd_package:", "no package at all:x y", "odd_package:x"])
def test_an_entry_point_without_an_object_harms_nobody(folder: Path, reference: str) -> None:
    install(folder, "odd_package", {"odd": reference}, "def __getattr__(name): raise RuntimeError(name)")
    install(folder, "sound_package", {"sound": "sound_package:x [extra]"}, "x = []")
    importlib.import_module("odd_package")
    thing = find("method", "sound", OWN, lambda _: None)
    assert names_of("method", thing) == ["sound"]
    with pytest.raises(BadInput, match=r"^method 'odd' of the package odd_package "):
        find("method", "odd", OWN, is_number)


def test_a_package_without_a_name_harms_nobody(folder: Path) -> None:
    install(folder, "nameless_package", {"odd": "nameless_package:x"}, "x = 'text'")
    install(folder, "named_package", {"sound": "named_package:x"}, "x = 3")
    (folder / "nameless_package-1.0.dist-info" / "METADATA").unlink()
    assert find("method", "sound", OWN, is_number) == 3
    with pytest.raises(BadInput, match=r"^method 'odd' of the package nameless_package "):
        find("method", "odd", OWN, is_number)


def test_two_packages_with_one_name_are_both_named(folder: Path) -> None:
    install(folder, "first_of_two", {"twice": "first_of_two:x"}, "x = 3")
    install(folder, "second_of_two", {"twice": "second_of_two:x"}, "x = 3")
    with pytest.raises(BadInput, match="'twice' is offered by first_of_two and second_of_two: uninstall one"):
        find("method", "twice", OWN, is_number)


@pytest.mark.parametrize("name", [":x", "json:", "json:a b", "a b:x", "json.:x"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"expected package\.module:object, such as my_package\.module:name$"):
        import_named("method", name)


def test_a_module_without_the_name_is_told() -> None:
    with pytest.raises(BadInput, match=r"^method 'json:nothing': module json has no object named 'nothing'$"):
        import_named("method", "json:nothing")


def test_no_torch_is_needed() -> None:
    program = "import sys; import pliant.extensions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
