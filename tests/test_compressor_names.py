"""One row per compressor, and what is made of the rows."""

import subprocess
import sys

import pytest

import pliant.compression
from pliant.cli import VERBS, main
from pliant.compression import Compressor
from pliant.compression.base import option_names
from pliant.compression.by_name import allocation_of, class_named
from pliant.compressor_names import ALONE, COMPRESSORS, LINKS, SCHEME, parse_pattern, record_name, takes_pattern
from pliant.errors import BadInput


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_row_says_what_its_class_is(name: str) -> None:
    row, kind = COMPRESSORS[name], class_named(name)
    assert issubclass(kind, Compressor)
    assert kind is getattr(pliant.compression, row.class_name)
    assert ("ratio" in option_names(kind)) == (row.takes == "ratio")
    assert (name in ALONE, name in LINKS) == (bool(row.takes), bool(row.in_chains))
    assert not row.takes or row.removed or row.zeroed


def test_every_compressor_has_a_row() -> None:
    public = {name for name in pliant.__all__ if isinstance(getattr(pliant, name), type)}
    compressors = {name for name in public if issubclass(getattr(pliant, name), Compressor)}
    assert compressors == {row.class_name for row in COMPRESSORS.values()} | {"Chain"}


@pytest.mark.parametrize("verb", ["sweep", "compress"])
def test_the_help_names_every_compressor(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb in VERBS
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(ALONE[:-1])} or {ALONE[-1]}, the name of one" in text
    assert "{" not in text.replace("{true,false}", "")


def test_names_of_records_tell_the_variant() -> None:
    assert record_name("filters", whiten=True) == "filters"
    assert record_name("rank", whiten=True) == f"rank-whitened-{SCHEME}"
    assert record_name("rank", whiten=False, scheme="channel") == "rank"
    assert record_name("filters+rank", whiten=True, scheme="best") == "filters+rank-whitened-best"


def test_an_allocation_is_kept_where_there_is_a_choice() -> None:
    assert allocation_of("filters+int8", "energy") == "energy"
    assert allocation_of("nm", "energy") == ""


def test_patterns() -> None:
    assert list(filter(takes_pattern, COMPRESSORS)) == ["nm"]
    assert parse_pattern("2:4") == (2, 4)
    for wrong in ("", "2", "4:2", "0:4", "a:b", "-1:4"):
        with pytest.raises(BadInput, match="a pattern is N:M with 1 <= N <= M"):
            parse_pattern(wrong)


def test_no_torch_is_needed() -> None:
    program = "import sys; import pliant.compressor_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
