"""The flags of ``pliant train``: one for each setting, under the title of its group, and those of the run folder."""

from __future__ import annotations

import jsonargparse

from pliant.experiments.training.settings import SETTINGS


def add_flags(parser: jsonargparse.ArgumentParser) -> None:
    """Add the flags to a parser, in the order of the groups."""
    titles = dict.fromkeys(setting.group for setting in SETTINGS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, setting in SETTINGS.items():
        groups[setting.group].add_argument(f"--{name}", type=setting.kind, default=setting.default, help=setting.doc)
    folder = parser.add_argument_group("run folder")
    folder.add_argument(
        "--out", type=str | None, default=None, help="run folder; by default runs/DATA-MODEL-METHOD-seedN."
    )
    folder.add_argument(
        "--resume",
        type=bool,
        default=False,
        help="go on from the last checkpoint of the run folder, with its settings.",
    )
