"""The command line: pliant train | sweep | report | compare | compress | export | demo.

Every verb is a Python function, and its flags are the function's keywords; a YAML file can give the same settings with
--config. Only the module of the given verb is imported, so that `pliant report` and `pliant --help` need no torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

import pliant
from pliant.errors import BadInput, PliantError


@dataclass(frozen=True)
class Verb:
    """One verb.

    Args:
        module: module of its function.
        function: name of its function.
        help: its description.
        positional: name of its positional argument, if there is one.
        several: whether the positional argument takes several values.
        prints_path: whether to print the path that the function returns.
        flags: module with a function ``add_flags`` that adds its flags to a parser; if empty, the flags are the
            parameters of the function.
    """

    module: str
    function: str
    help: str
    positional: str | None = None
    several: bool = False
    prints_path: bool = False
    flags: str = ""


VERBS = {
    "train": Verb(
        "experiments.train",
        "train",
        "train one network with SGD, SFW or another method",
        prints_path=True,
        flags="experiments.training.flags",
    ),
    "sweep": Verb(
        "experiments.sweep", "sweep", "compress trained networks at many ratios and measure", "runs", True, True
    ),
    "report": Verb("reporting.page", "report", "turn records into a table and an HTML page", "records", True),
    "compare": Verb("experiments.compare", "compare", "compare methods fairly, according to a suite", "suite"),
    "compress": Verb("experiments.compress", "compress_run", "compress a trained network to one size", "run"),
    "export": Verb(
        "experiments.export", "export_run", "write a network for other programs", "folder", prints_path=True
    ),
    "demo": Verb("experiments.demo", "demo", "all of this on small images, in about a minute"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 after an error that the user can mend, one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(arguments)
    except PliantError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; a training goes on with --resume, a sweep with the same command", code=130)
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(f"{error.filename}: {reason}" if error.filename else reason)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        return _fail("not enough memory: take a smaller network (--width), images (--image_size) or --batch_size")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"pliant {pliant.__version__}")
        return 0
    if name not in VERBS:
        return _fail(f"unknown verb {name!r}: {_nearest(name, VERBS)}known are {', '.join(VERBS)}")
    verb = VERBS[name]
    _check_files(rest, verb)
    parser = make_parser(name, rest)
    switches = {action.dest for action in parser._actions if getattr(action, "_typehint", None) is bool}
    # Without the defaults, because a function may want to know what was given; a printed file of settings has them.
    defaults = any(argument.startswith("--print_config") for argument in rest)
    given = vars(parser.parse_args(_with_values(rest, switches), defaults=defaults))
    path = _function(verb)(**{name: value for name, value in given.items() if name != "config"})
    if verb.prints_path and os.environ.get("RANK", "0") == "0":  # torchrun starts many processes
        print(path)
    return 0


def _check_files(arguments: list[str], verb: Verb) -> None:
    """Raise BadInput for a file of settings that is not a mapping in YAML: the parser would not name the file."""
    for index, argument in enumerate(arguments):
        flag, _, name = argument.partition("=")
        name = name or (arguments[index + 1] if index + 1 < len(arguments) else "")
        if flag != "--config" or not Path(name).is_file():
            continue
        try:
            settings = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
            raise BadInput(f"--config {name} is not a YAML file in UTF-8: {' '.join(reason.split())}") from None
        if not isinstance(settings, dict):
            raise BadInput(f"--config {name}: expected settings such as 'seed: 1', got {type(settings).__name__}")
        value = settings.get(verb.positional, "") if verb.positional else ""
        if not all(isinstance(part, str) for part in (value if isinstance(value, list) else [value])):
            raise BadInput(f"--config {name}: {verb.positional} expects text, got {value!r}")


def _function(verb: Verb) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"pliant.{verb.module}"), verb.function)
    return function


def make_parser(name: str, arguments: Sequence[str] = ()) -> Parser:
    """Return the parser of a verb.

    Args:
        name: of the verb.
        arguments: those that it will parse; some flags depend on others.
    """
    verb = VERBS[name]
    function = _function(verb)
    summary = inspect.getdoc(function) or verb.help
    parser = Parser(
        prog=f"pliant {name}", description=summary.split("\n\n")[0], allow_abbrev=False, formatter_class=Help
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it.")
    if verb.positional:
        text = re.search(rf"^\s+{verb.positional}: (.+)$", summary, re.MULTILINE)
        parser.add_argument(
            verb.positional,
            type=str,
            nargs="+" if verb.several else None,
            help=text[1] if text else None,
        )
    if verb.flags:
        importlib.import_module(f"pliant.{verb.flags}").add_flags(parser, _peek(arguments))
    else:
        parser.add_function_arguments(function, skip={verb.positional} if verb.positional else set())
    return parser


def _peek(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values that arguments and files of settings seem to give, before a parser has read them."""
    values: dict[str, Any] = {}
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if not equals:
            value = next(iter(arguments[index + 1 :]), "--")
            if value.startswith("--"):
                continue
        if flag == "--config" and Path(value).is_file():
            values |= yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        elif flag.startswith("--"):
            values[flag[2:]] = value
    return values


class Help(jsonargparse.DefaultHelpFormatter):
    """Help that keeps the lines of tables, and shows the defaults that a method decides."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "\n".join(f"{indent}{line}" for line in text.splitlines())

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        decided = getattr(action, "decided", None)
        return text if decided is None else text.replace("default: %(default)s", f"default: {decided}")


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and where to find help, and exit with code 2."""
        known = [option for action in self._actions for option in action.option_strings]
        raise SystemExit(_fail(f"{_one_line(message, known)} (see {self.prog} --help)"))


def _one_line(message: str, known: list[str]) -> str:
    """Put a message of jsonargparse or argparse into one line and into the user's words."""
    if stray := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        flag = stray[1].partition("=")[0]
        kind = "unknown flag" if flag.startswith("-") else "unexpected argument"
        return f"{kind} {flag}: {_nearest(flag, known)}".rstrip(": ")
    if wrong := re.search(r'[Pp]arser key "([^"]+)":', message):
        value = re.search(r"(?:Got value|Given value|got value): ?(.*)", message)
        expected = re.findall(r"Expected (?:an? )?([^.\n]+)", message)
        kinds = " or ".join(dict.fromkeys(_kind(kind) for kind in expected))
        if value and kinds:
            # On the command line 2:4 is text; in YAML it is the number 124, minutes and seconds.
            hint = "; in a YAML file, put text such as 2:4 in quotes" if "text" in kinds else ""
            return f"--{wrong[1]} expects {kinds}, got {value[1].strip()!r}{hint}"
    if missing := re.search(r"File does not exist: '?([^']+)'?", message):
        return f"--config: there is no file {missing[1]}"
    if folder := re.search(r"Path is not a file: '?([^']+)'?", message):
        return f"--config expects a YAML file, got {folder[1]}"
    if bare := re.search(r"argument (--\w+)\S*: expected one argument", message):
        return f"{bare[1]} expects a value, got none"
    return " ".join(message.split())


def _kind(text: str) -> str:
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
    name = re.search(r"<class '(\w+)'>", text)
    return names.get(name[1], name[1]) if name else text.strip()


def _with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """Return the arguments with values for switches that have none: ``--resume`` becomes ``--resume=true``."""
    result = []
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        alone = argument.startswith("--") and argument[2:] in switches
        result.append(f"{argument}=true" if alone and (not following or following.startswith("-")) else argument)
    return result


def _overview() -> str:
    verbs = "\n".join(f"  {name:<10}{verb.help}" for name, verb in VERBS.items())
    return (
        f"pliant {pliant.__version__}: train once, deploy at any size\n\nusage: pliant VERB [flags]\n\n{verbs}\n\n"
        "`pliant VERB --help` lists the flags of a verb. Try `pliant demo` first."
    )


def _nearest(name: str, known: Sequence[str] | dict[str, Verb]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"pliant: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int = 2) -> int:
    print(f"pliant: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
