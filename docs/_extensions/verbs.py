"""The directive ``verbs``: all verbs of the command line with their flags, asked of the command line's own parsers."""

import argparse
import re

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from pliant.cli import VERBS, Parser, make_parser
from pliant.experiments.methods import METHODS, Method

HIDDEN = {"help", "config", "print_config"}  # every verb has them; the page says so once
KINDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}


class Verbs(Directive):
    """A section for each verb: what it does, then a list of its arguments."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        return [self._section(name, make_parser(name)) for name in VERBS]

    def _section(self, name: str, parser: Parser) -> nodes.section:
        section = nodes.section(ids=[f"pliant-{name}"], names=[f"pliant {name}"])
        section += nodes.title(text=f"pliant {name}")
        section += nodes.paragraph(text=parser.description)
        operands = [_operand(action) for action in parser._actions if not action.option_strings]
        usage = " ".join(["pliant", name, *operands, "[flags]"])
        section += nodes.literal_block(usage, usage, language="text")
        if VERBS[name].flags:
            section += _groups(parser)
            section += [nodes.rubric(text="own settings of the methods"), _methods()]
        else:
            section += nodes.definition_list("", *map(_argument, _shown(parser._actions)))
        self.state.document.note_implicit_target(section, section)
        return section


def _shown(actions: list[argparse.Action]) -> list[argparse.Action]:
    return [action for action in actions if action.dest not in HIDDEN and action.help != argparse.SUPPRESS]


def _groups(parser: Parser) -> list[nodes.Node]:
    """Return a title and a list of arguments for each group of a parser."""
    result: list[nodes.Node] = []
    for group in parser._action_groups:
        if actions := _shown(group._group_actions):
            result += [nodes.rubric(text=group.title), nodes.definition_list("", *map(_argument, actions))]
    return result


def _methods() -> nodes.definition_list:
    """Return what each method is and the settings that are its own, with its defaults."""
    return nodes.definition_list("", *(_method(name, method) for name, method in METHODS.items()))


def _method(name: str, method: Method) -> nodes.definition_list_item:
    cut_by = " and ".join(method.cut_by) or "all compressors"
    lr = "lr follows from turnover" if method.lr is None else f"lr {method.lr}"
    term = nodes.term("", "", nodes.literal(text=f"--method {name}"))
    definition = nodes.definition("", nodes.paragraph(text=f"{method.summary}; for {cut_by}; {lr}."))
    items = [
        _item(f"--{flag}", str(setting.kind), setting.default, setting.doc) for flag, setting in method.settings.items()
    ]
    if items:
        definition += nodes.definition_list("", *items)
    return nodes.definition_list_item("", term, definition)


def _operand(action: argparse.Action) -> str:
    return action.dest.upper() + (" ..." if action.nargs == "+" else "")


def _argument(action: argparse.Action) -> nodes.definition_list_item:
    name = action.option_strings[0] if action.option_strings else _operand(action)
    return _item(name, str(getattr(action, "_typehint", None) or str), action.default, action.help or "")


def _item(name: str, kind: str, default: object, text: str) -> nodes.definition_list_item:
    """Return name, type and default of an argument, and its explanation."""
    kinds = re.findall(r"\b(?:str|int|float|bool)\b(?![^\[]*\])", kind)
    term = nodes.term("", "", nodes.literal(text=name), nodes.Text(" " + " or ".join(KINDS[kind] for kind in kinds)))
    # As text a default may be quoted, as it stands in the source.
    value = "" if default in (None, argparse.SUPPRESS) else str(default).strip("\"'")
    if value not in ("", "None"):
        shown = value.lower() if value in ("True", "False") else value
        term += [nodes.Text(", default "), nodes.literal(text=shown)]
    # What stands between backticks is code.
    parts = [nodes.literal(text=part) if i % 2 else nodes.Text(part) for i, part in enumerate(text.split("`"))]
    definition = nodes.definition("", nodes.paragraph("", "", *parts))
    return nodes.definition_list_item("", term, definition)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("verbs", Verbs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
