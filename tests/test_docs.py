"""What the pages say is so: their code runs and prints what they show, links lead somewhere, pictures can be drawn.

A block of Python or of commands is executed, page by page, in order, in an empty folder; `REDUCED` makes trainings
shorter. A block that may not be run says why in a comment before it, `<!-- not run: ... -->`, and is only parsed. The
README's own blocks run in e2e/test_demo.py.
"""

import ast
import contextlib
import doctest
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pliant
from pliant.cli import VERBS, _with_values, main, make_parser
from pliant.experiments.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<language>\S*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)

# page → (as it stands, as the tests take it)
REDUCED = {
    "tutorial.md": [
        ("epochs = 40", "epochs = 4"),
        ("--compressor rank", "--compressor rank --ratios 0,0.5"),
        # After so few epochs another processor's rounding decides between 1 and 2 % lost to new BatchNorm statistics.
        ('"max_drop": 0.01', '"max_drop": 0.1'),
    ],
    "budgets.md": [("share in (0.7, 0.5, 0.3)", "share in (0.5,)")],
    "export.md": [("resnet18", "resnet8")],
    "fair-comparison.md": [("--compressor filters", "--compressor filters --ratios 0,0.5")],
    "own-model.md": [("epochs = 15", "epochs = 2")],
    "radius-and-k.md": [("epochs = 40", "epochs = 1")],
}
# page → commands for what it takes as given
GIVEN = {
    "budgets.md": [
        "pliant train --method sfw-rank --k 0.05 --radius 3 --epochs 4 --out runs/rank",
        "pliant train --model mlp --method sgd --epochs 2 --out runs/wide",
    ],
    "export.md": ["pliant train --model mlp --method sfw-filters --epochs 1 --out runs/filters"],
}
SHOWN_ONLY = {"", "text", "yaml", "json", "toml"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``run`` is False where the page says that it is not run."""

    language: str
    code: str
    line: int
    run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")), not m["reason"])
        for m in BLOCK.finditer(text)
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a console block as lists of words."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield shlex.split(line.removeprefix("$ "), comments=True)


def check_command(words: list[str]) -> None:
    """Fail unless a command could be run: its flags, files, targets and extras exist."""
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]  # VARIABLE=value
    match words:
        case ["pliant", verb, *rest] if verb in VERBS:
            parser = make_parser(verb, rest)
            switches = {action.dest for action in parser._actions if getattr(action, "_typehint", None) is bool}
            parser.parse_args(_with_values(rest, switches))
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
        case ["pip", "install", *_]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            wanted = {extra for word in words for group in re.findall(r"\[(.+)\]", word) for extra in group.split(",")}
            assert wanted <= set(project["optional-dependencies"])
        case ["python" | "torchrun" | "accelerate", *rest] if "pliant" in rest:  # -m pliant train
            check_command(rest[rest.index("pliant") :])
        case ["python" | "torchrun" | "accelerate", *rest]:
            scripts = [word for word in rest if word.endswith(".py")]
            assert scripts
            assert all((ROOT / script).exists() for script in scripts), scripts
        case _:
            pytest.fail(f"the tests do not know this command: {shlex.join(words)}")


# --- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_could_be_run(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        match block.language:
            case "python":
                ast.parse(block.code)
            case "console":
                found = list(commands(block.code))
                assert found, f"{where}: a command starts with '$ '"
                for words in found:
                    if page.name != "extending.md":  # its commands are for a source that has been extended
                        check_command(words)
            case "pycon" | "diff":
                pass
            case language:
                assert language in SHOWN_ONLY or language.startswith("{"), f"{where}: is {language} to be run?"
    for line in re.findall(r"^    (pliant \S.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        if "VERB" not in line:
            check_command(shlex.split(line))


@pytest.mark.parametrize(
    "page", [page for page in DOCS if any(b.language == "pycon" for b in blocks(page))], ids=lambda page: page.name
)
def test_examples_show_what_they_give(page: Path) -> None:
    # Blank lines instead of prose keep the line numbers of the page in a failure's message.
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for block in blocks(page):
        if block.language == "pycon":
            code = block.code.splitlines()
            lines[block.line : block.line + len(code)] = code
    test = doctest.DocTestParser().get_doctest("\n".join(lines), {}, page.name, str(page), 0)
    failures: list[str] = []
    doctest.DocTestRunner().run(test, out=failures.append)
    assert not failures, "".join(failures)


# --- pages whose code is run ------------------------------------------------------------------------------------------


def in_words(output: str) -> set[str]:
    """Return the lines of an output without what a shorter training changes: numbers, and which layers lose most."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("at the floor: ")]
    return {" ".join(re.sub(r"-?[\d.,]+", "#", line).split()) for line in lines}


def run_python(code: str, names: dict[str, object], where: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, where, "exec"), names)
    return "\n".join(line for line in printed.getvalue().splitlines() if not line.startswith("[torch.onnx]"))


def run_command(words: list[str]) -> None:
    if words[0] == "pliant":
        quick = ["--epochs", "1"] if words[1] in ("train", "demo") and "--epochs" not in words else []
        assert main([*words[1:], *quick]) == 0, shlex.join(words)


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in the current folder."""
    text_of = {block: block.code for block in blocks(page)}
    for long, short in REDUCED.get(page.name, []):
        assert any(long in code for code in text_of.values()), f"{page.name} has no {long!r} to reduce"
        text_of = {block: code.replace(long, short) for block, code in text_of.items()}
    for command in GIVEN.get(page.name, []):
        run_command(shlex.split(command))
    names: dict[str, object] = {"__name__": "__main__"}
    output: str | None = None
    for block, code in text_of.items():
        where = f"{page.name}, line {block.line}"
        if block.language == "text" and output is not None:
            assert in_words(block.code) == in_words(output), f"{where}: the page shows something else"
        output = None
        if not block.run:
            continue
        if block.language == "python":
            if file := re.match(r"# (\w+\.py)\n", code):
                Path(file[1]).write_text(code, encoding="utf-8")
                monkeypatch.delitem(sys.modules, file[1].removesuffix(".py"), raising=False)
            else:
                output = run_python(code, names, where)
        elif block.language == "console":
            for words in commands(code):
                # Trainings in the tests are short, whatever the page says.
                if "--epochs" in words:
                    words[words.index("--epochs") + 1] = "1"
                run_command(words)


# Small balls shrink what was freshly drawn, and say so; the tutorial explains it.
@pytest.mark.filterwarnings("ignore:.*started outside of their balls")
@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in DOCS
        if page.name != "extending.md" and any(b.run and b.language in ("python", "console") for b in blocks(page))
    ],
    ids=lambda page: page.name,
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "onnx" in page.read_text(encoding="utf-8"):
        pytest.importorskip("onnxruntime")
    if "accelerate" in page.read_text(encoding="utf-8"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # of a test before this one in the same process
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_page(page, monkeypatch)


@pytest.mark.slow
def test_a_package_extends_pliant_as_described(tmp_path: Path) -> None:
    programs, lines = [], []
    for block in blocks(ROOT / "docs" / "extending.md"):
        if block.language == "console":
            lines += list(commands(block.code))
        elif file := re.match(r"# (my_package/\S+)\n", block.code):
            path = tmp_path / file[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code.partition("\n")[2], encoding="utf-8")
        elif file := re.match(r"# (\w+\.py)\n", block.code):
            (tmp_path / file[1]).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            programs.append(block.code)
    (tmp_path / "my_package/src/my_package/__init__.py").touch()
    site = tmp_path / "site"
    environment = {"PYTHONPATH": f"{site}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "PATH": ""}

    def run(*arguments: str) -> None:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), "./my_package")
    assert len(programs) == 2
    for program in programs:
        run("-W", "error", "-c", program)
    assert [line[1] for line in lines] == ["train", "train", "train", "sweep", "report", "compare"]
    for line in lines:
        run("-m", *line)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(r["data"], r["model"], r["method"], r["compressor"]) for r in records} == {
        ("stripes", "patches", method, "kernels-refit") for method in ("l1", "sfw-weights")
    }
    assert "Kernels zeroed" in (tmp_path / "report.html").read_text(encoding="utf-8")


def own_settings() -> str:
    """Return the table of methods in docs/baselines.md, as the methods say it."""

    def default(value: object) -> str:
        return "" if value is None else f" {str(value).lower() if isinstance(value, bool) else f'{value}'}"

    rows = ["| method | cut by | `lr` | own settings and their defaults |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        own = ", ".join(f"`{flag}`{default(setting.default)}" for flag, setting in method.settings.items())
        lr = "by `turnover`" if method.lr is None else str(method.lr)
        rows.append(f"| `{name}` | {', '.join(method.cut_by) or 'all'} | {lr} | {own} |")
    return "".join(f"{row}\n" for row in rows)


def test_the_table_of_own_settings_is_that_of_the_methods() -> None:
    assert own_settings() in (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")


# --- the pages as a site ----------------------------------------------------------------------------------------------


def test_the_reference_lists_every_public_name_once() -> None:
    listed = re.findall(r"^\.\. auto\w+:: pliant\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(set(pliant.__all__) - {"__version__"})


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_tell_every_flag(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "cli.html").read_text(encoding="utf-8")
    for verb in VERBS:
        section = page.partition(f'<section id="pliant-{verb}">')[2].partition("</section>")[0]
        flags = {option for action in make_parser(verb)._actions for option in action.option_strings[:1]}
        shown = set(re.findall(r'<span class="pre">(--\w+)</span>', section))
        # A text about a flag may mention --help.
        assert shown - {"--help"} == flags - {"-h", "--config", "--print_config"}, verb
    for method in METHODS:
        assert re.search(rf"--method</span> <span class=\"pre\">{method}</span>", page), method


@pytest.mark.slow
def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = [ROOT / "docs" / "images" / name for name in ("vector-balls", "lifted-balls", "vertices", "steps")]
    subprocess.run([sys.executable, ROOT / "docs" / "pictures" / "balls.py", tmp_path], check=True)
    assert {path.stem for path in tmp_path.iterdir()} == {path.name for path in pictures}
    assert all(path.with_suffix(".png").stat().st_size < 150_000 for path in pictures)


def test_the_table_of_the_readme_is_that_of_the_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    image, page = tmp_path / "comparison.png", tmp_path / "README.md"
    page.write_text(
        re.sub(r"(?<=`make pictures`: -->\n).*(?=<!-- until here)", "", readme, flags=re.DOTALL), encoding="utf-8"
    )
    assert page.read_text(encoding="utf-8") != readme
    subprocess.run([sys.executable, ROOT / "docs" / "pictures" / "comparison.py", image, page], check=True)
    assert page.read_text(encoding="utf-8") == readme
    assert image.stat().st_size < 150_000
