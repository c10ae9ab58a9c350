"""One row per compressor, and what is made of the rows."""

import re
import subprocess
import sys

import pytest

import pliant.compression
from pliant.cli import VERBS, main, make_parser
from pliant.compression import Compressor
from pliant.compression.base import option_names
from pliant.compression.by_name import allocation_of, class_named
from pliant.compressor_names import (
    ALONE,
    COMPRESSORS,
    LINKS,
    SCHEME,
    parse_pattern,
    record_name,
    shell_flags,
    takes_pattern,
    variant_in_words,
)
from pliant.errors import BadInput
from pliant.experiments.controls import choice_of, importances_of


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_row_says_what_its_class_is(name: str) -> None:
    row, kind = COMPRESSORS[name], class_named(name)
    assert issubclass(kind, Compressor)
    assert kind is getattr(pliant.compression, row.class_name)
    assert ("ratio" in option_names(kind)) == (row.takes == "ratio")
    assert (name in ALONE, name in LINKS) == (bool(row.takes), bool(row.in_chains))
    assert not row.takes or row.removed or row.zeroed
    assert ("importance" in option_names(kind)) == bool(row.norm)
    if row.norm:
        kind(importance=row.norm)  # type: ignore[call-arg]


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
    assert record_name("filters", whiten=True, choice="loss", refit=True) == "filters-loss-refit"
    assert record_name("filters", whiten=True, choice="l1") == "filters-l1"
    chain = record_name("filters+rank", True, "spatial", {"multiple_of": 8}, choice="loss", refit=True)
    assert chain == "filters+rank-loss-whitened-spatial-multiple_of=8-refit"


@pytest.mark.parametrize(
    ("compressor", "importance", "chosen", "word"),
    [
        ("filters", "auto", {"filters": "auto"}, "loss"),
        ("filters", "loss", {"filters": "loss"}, "loss"),
        ("filters", "l2", {"filters": "l2"}, ""),
        ("filters", "bn", {"filters": "bn"}, "bn"),
        ("filters+heads", "bn", {"filters": "bn", "heads": "l2"}, "bn"),
        ("filters+rank+int8", "l1", {"filters": "l1"}, "l1"),
        ("rank", "auto", {}, ""),
        ("weights", "auto", {"weights": "auto"}, "loss"),
        ("filters+weights", "l2", {"filters": "l2", "weights": "magnitude"}, ""),
        ("filters+weights", "magnitude", {"filters": "l2", "weights": "magnitude"}, ""),
    ],
)
def test_an_importance_goes_to_the_links_that_have_it(
    compressor: str, importance: str, chosen: dict[str, str], word: str
) -> None:
    assert importances_of(compressor, importance) == chosen
    assert choice_of(compressor, importance) == word


@pytest.mark.parametrize(("compressor", "importance"), [("rank", "l2"), ("heads", "bn"), ("filters+rank", "l3")])
def test_an_importance_that_no_link_takes_is_refused(compressor: str, importance: str) -> None:
    with pytest.raises(BadInput, match=rf"^--importance '{importance}': {re.escape(compressor)} (has no|does not)"):
        importances_of(compressor, importance)


@pytest.mark.parametrize("compressor", ["filters", "heads", "rank", "weights", "nm", "filters+rank", "rank+int8"])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_flags_of_a_name_make_that_name(compressor: str, refit: bool, norm: bool) -> None:
    kinds = [class_named(link) for link in compressor.split("+")]
    own = [COMPRESSORS[link].norm for link in compressor.split("+") if COMPRESSORS[link].norm]
    importance = own[0] if norm and own else "auto"
    assert bool(own) == any("importance" in option_names(kind) for kind in kinds)
    for whiten in (True, False):
        for scheme in ("channel", "spatial", "best") if "rank" in compressor else (None,):
            choice = choice_of(compressor, importance)
            name = record_name(compressor, whiten, scheme, choice=choice, refit=refit)
            flags = shell_flags(name)
            assert flags is not None
            words = [*flags, *(["--pattern", "2:4"] if compressor == "nm" else [])]
            settings = make_parser("compress").parse_args(["run", "--compressor", compressor, *words])
            again = choice_of(compressor, settings.importance)
            assert record_name(compressor, settings.whiten, settings.scheme, choice=again, refit=settings.refit) == name


def test_a_variant_of_unknown_words_has_no_flags() -> None:
    assert shell_flags("filters-mask") is None
    assert shell_flags("rank-whitened-diagonal") is None
    assert shell_flags("filters-loss-l1-refit") is None


def test_titles_have_the_variant_in_words() -> None:
    assert variant_in_words("filters") == []
    assert variant_in_words("filters-loss-refit") == ["chosen by calibration images", "refitted"]
    assert variant_in_words("rank-whitened-spatial") == ["whitened", "spatial"]


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
