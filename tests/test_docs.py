"""What the pages in docs say: their examples give what they show, their links and pictures exist and can be drawn."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = re.compile(r"^```pycon\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["norms.md", "constraints.md", "baselines.md"])
def test_examples_show_what_they_give(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    # Blanking the prose keeps the line numbers of the page in a failure's message.
    blocks = [match.span(1) for match in EXAMPLES.finditer(text)]
    kept = "".join(
        c if c == "\n" or any(start <= i < end for start, end in blocks) else " " for i, c in enumerate(text)
    )
    test = doctest.DocTestParser().get_doctest(kept, {}, name, str(ROOT / "docs" / name), 0)
    assert len(test.examples) > 5
    failures: list[str] = []
    doctest.DocTestRunner().run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.slow
def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = [ROOT / "docs" / "images" / name for name in ("vector-balls", "lifted-balls", "vertices", "steps")]
    subprocess.run([sys.executable, ROOT / "docs" / "pictures" / "balls.py", tmp_path], check=True)
    assert {path.stem for path in tmp_path.iterdir()} == {path.name for path in pictures}
    assert all(path.with_suffix(".png").stat().st_size < 150_000 for path in pictures)
