"""The directive ``verbs``: all verbs of the command line with their flags, asked of the command line's own parsers."""

import argparse
import re
from collections.abc import Iterator

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from pliant.cli import VERBS, Parser, make_parser

HIDDEN = {"help", "config", "print_config"}  # every verb has them; the page says so once
KINDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}


def parsers() -> Iterator[tuple[str, Parser]]:
    """Yield every verb and its parser."""
    for name in VERBS:
        yield name, make_parser(name)


class Verbs(Directive):
    """A section for each verb: what it does, then a list of its arguments."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        return [self._section(name, parser) for name, parser in parsers()]

    def _section(self, name: str, parser: Parser) -> nodes.section:
        section = nodes.section(ids=[f"pliant-{name}"], names=[f"pliant {name}"])
        section += nodes.title(text=f"pliant {name}")
        section += nodes.paragraph(text=parser.description)
        actions = [action for action in parser._actions if action.dest not in HIDDEN]
        usage = " ".join(["pliant", name, *(_operand(a) for a in actions if not a.option_strings), "[flags]"])
        section += nodes.literal_block(usage, usage, language="text")
        section += nodes.definition_list("", *(_item(action) for action in actions))
        self.state.document.note_implicit_target(section, section)
        return section


def _operand(action: argparse.Action) -> str:
    return action.dest.upper() + (" ..." if action.nargs == "+" else "")


def _item(action: argparse.Action) -> nodes.definition_list_item:
    """Return name, type and default of an argument, and its explanation."""
    name = action.option_strings[0] if action.option_strings else _operand(action)
    kinds = re.findall(r"\b(?:str|int|float|bool)\b(?![^\[]*\])", str(getattr(action, "_typehint", None) or str))
    term = nodes.term("", "", nodes.literal(text=name), nodes.Text(" " + " or ".join(KINDS[kind] for kind in kinds)))
    # As text a default may be quoted, as it stands in the source.
    default = "" if action.default in (None, argparse.SUPPRESS) else str(action.default).strip("\"'")
    if default not in ("", "None"):
        shown = default.lower() if default in ("True", "False") else default
        term += [nodes.Text(", default "), nodes.literal(text=shown)]
    definition = nodes.definition("", nodes.paragraph(text=action.help or ""))
    return nodes.definition_list_item("", term, definition)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("verbs", Verbs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
