"""The house: rooms on floors, who may import whom, how large things may grow, the public door, what needs no torch.

A room is a folder or a module directly below ``pliant``. It imports from lower floors only.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pliant

SOURCE = Path(pliant.__file__).parent
FLOORS = [
    {"errors", "version"},
    {"files", "linalg", "dtensors", "calling", "compressor_names", "extensions"},
    {"jsonl", "norms", "structure"},
    {"records", "constraints", "measuring"},
    {"optim", "compression", "reporting"},
    {"storage"},
    {"exporting"},
    {"experiments"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
BEFORE_TRAINING = {"norms", "constraints", "optim"}
AFTER_TRAINING = {"structure", "compression", "measuring", "storage", "exporting"}
# What a room must not import, whatever the floors say. `compression` knows nothing of how a network was trained.
NEEDS_NO_TORCH = {"errors", "files", "compressor_names", "extensions", "jsonl", "records", "reporting", "cli"}
NEVER: dict[str, set[str]] = {
    **dict.fromkeys(AFTER_TRAINING, BEFORE_TRAINING),
    **dict.fromkeys(BEFORE_TRAINING, AFTER_TRAINING),
    "constraints": AFTER_TRAINING - {"structure"},  # rules for transformers ask where heads and neurons are
    **{room: {"torch", "numpy"} for room in NEEDS_NO_TORCH},
}
# A mistake in norms or oracles must not help or harm both sides of a comparison.
BASELINES_MAY_IMPORT = {"linalg", "errors"}
LONGEST_FILE, LONGEST_CLASS = 500, 300

FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted({file.relative_to(SOURCE).parts[0].removesuffix(".py") for file in FILES})


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def files_of(room: str) -> list[Path]:
    return sorted((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import in a file, wherever it stands; the name is None for a whole module."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from ((node.module or "", alias.name) for alias in node.names)


def module_of(file: Path) -> str:
    parts = ["pliant", *file.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def targets(file: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of pliant that a file imports, with the name that it takes, None for the whole module."""
    for module, name in imports(file):
        if name is not None and f"{module}.{name}" in MODULES:
            yield MODULES[f"{module}.{name}"], None
        elif module in MODULES:
            yield MODULES[module], name


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


# --- who imports whom -------------------------------------------------------------------------------------------------


def test_every_room_has_a_floor() -> None:
    assert sorted(room for rooms in FLOORS for room in rooms) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room: str) -> None:
    used = {room_of(target) for file in files_of(room) for target, _ in targets(file)} - {room}
    assert {other for other in used if floor_of(other) >= floor_of(room)} == set()


@pytest.mark.parametrize("room", sorted(NEVER))
def test_some_rooms_never_meet(room: str) -> None:
    used = {room_of(target) for file in files_of(room) for target, _ in targets(file)}
    used |= {module.partition(".")[0] for file in files_of(room) for module, _ in imports(file)}
    assert used & NEVER[room] == set()


def test_baselines_know_neither_norms_nor_compressors() -> None:
    home = SOURCE / "experiments" / "baselines"
    used = {target for file in files_of("experiments/baselines") for target, _ in targets(file)}
    assert {room_of(target) for target in used if home not in target.parents} <= BASELINES_MAY_IMPORT


def test_no_file_imports_itself_by_way_of_others() -> None:
    # The face of a folder names what is in it and is named by nobody inside.
    arrows = {file: {target for target, _ in targets(file)} for file in FILES}
    for file in FILES:
        seen, ahead = set(), list(arrows[file])
        while ahead:
            target = ahead.pop()
            assert target != file, f"{file.relative_to(SOURCE)} is in a circle of imports"
            if target not in seen:
                seen.add(target)
                ahead += arrows[target]


def test_nobody_takes_a_private_name_of_another_file() -> None:
    taken = [
        f"{file.relative_to(SOURCE)} takes {name} of {target.relative_to(SOURCE)}"
        for file in FILES
        for target, name in targets(file)
        if name is not None and is_private(name)
    ]
    assert taken == []


def private_attributes(file: Path) -> Iterator[str]:
    """Yield the private attributes that a file asks for of other objects than self, and does not define."""
    nodes = list(ast.walk(tree(file)))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    for node in attributes:
        asks_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if not asks_itself and node.attr not in own:
            yield node.attr


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def modules_in(file: Path) -> set[str]:
    """Return what a file calls the modules of pliant that it imports: a name, or a whole path with dots."""
    called = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            called |= {alias.asname or alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            called |= {alias.asname or alias.name for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return called


def test_nobody_asks_an_object_of_another_file_for_something_private() -> None:
    ours = {
        node.name
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_private(node.name)
    }
    asked = {str(file.relative_to(SOURCE)): sorted(set(private_attributes(file)) & ours) for file in FILES}
    assert {name: attributes for name, attributes in asked.items() if attributes} == {}


def test_nobody_asks_a_module_for_something_private() -> None:
    asked = [
        f"{file.relative_to(SOURCE)} asks for {ast.unparse(node)}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules_in(file)
    ]
    assert asked == []


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_classes_stay_small(room: str) -> None:
    for file in files_of(room):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= LONGEST_CLASS, f"the class {node.name} has {length} lines"


def test_files_stay_small() -> None:
    written = [file for file in SOURCE.rglob("*") if file.suffix in (".py", ".pyi", ".js", ".css", ".j2")]
    lengths = {str(file.relative_to(SOURCE)): file.read_text(encoding="utf-8").count("\n") for file in written}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


@pytest.mark.parametrize("face", [file for file in FILES if file.name == "__init__.py"], ids=module_of)
def test_a_face_defines_nothing(face: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom)
    statements = tree(face).body
    assert ast.get_docstring(tree(face)), "it says what the room is for"
    if face.parent == SOURCE:  # the public door: names are loaded when first used
        return
    others = [node for node in statements[1:] if not isinstance(node, allowed)]
    assert [ast.unparse(node) for node in others] == []


# --- the public door --------------------------------------------------------------------------------------------------


def test_public_names_are_there() -> None:
    for name in pliant.__all__:
        assert getattr(pliant, name) is not None
    assert set(pliant.__all__) <= set(dir(pliant))
    with pytest.raises(AttributeError, match="sgd"):
        pliant.sgd  # noqa: B018


def test_no_module_bears_the_name_of_a_public_function() -> None:
    assert not set(ROOMS) & set(pliant.__all__)


STATEMENTS = [
    "import pliant",
    "import pliant; pliant.report",
    "import pliant.cli",
    "import pliant.records",
    "import pliant.compressor_names",
    "import pliant.extensions",
    "import pliant.reporting",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_no_torch_needed(statement: str) -> None:
    program = f"import sys; {statement}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
