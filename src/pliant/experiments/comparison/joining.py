"""Methods that join a comparison whose suite does not name them, such as those of other packages.

Each takes part in the families whose first compressor its networks are made for, and has as many trials as the others:
its own :attr:`~pliant.experiments.methods.Method.trials`, then a grid over its learning rate, the default times 1, 1/2,
2, 1/4, 4 and so on (over ``turnover`` if the learning rate follows from that).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pliant.errors import BadInput, DamagedFile
from pliant.experiments.comparison.suite import Suite
from pliant.experiments.methods import Method, find_method

SUITE = "suite.yaml"
"""The suite in the folder of a comparison; its entry ``joined`` names the methods that joined."""


def join(suite: Suite, names: Sequence[str]) -> Suite:
    """Return a suite with some more methods.

    Raises:
        BadInput: a method cannot be found, or suits none of the suite's families.
    """
    names = [name for name in dict.fromkeys(names) if name not in {entrant.label for entrant in suite.methods}]
    if not names:
        return suite
    content = yaml.safe_load(suite.text)
    count = len(suite.methods[0].trials)
    for name in names:
        method = find_method(name)
        content["methods"][name] = {"families": _families(suite, name, method), "trials": trials_of(method, count)}
    content["joined"] = [*suite.joined, *names]
    return Suite.from_dict(suite.name, content)


def joined_before(folder: Path) -> list[str]:
    """Return the methods that joined the comparison in a folder earlier."""
    file = folder / SUITE
    if not file.exists():
        return []
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return [str(name) for name in content.get("joined", [])]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise DamagedFile(f"{file} is damaged ({type(error).__name__}): restore it, or delete it") from None


def trials_of(method: Method, count: int) -> list[dict[str, Any]]:
    """Return ``count`` different trials of a method."""
    name = "turnover" if method.lr is None else "lr"
    default = method.settings["turnover"].default if method.lr is None else method.lr
    grid = ({name: float(f"{default * factor:.6g}")} for factor in _factors())
    own = [dict(trial) for trial in method.trials]
    trials = itertools.chain(own, (trial for trial in grid if trial not in own))
    return list(itertools.islice(trials, count))


def _factors() -> Iterator[float]:
    yield 1
    for power in itertools.count(1):
        yield from (2**-power, 2**power)


def _families(suite: Suite, name: str, method: Method) -> list[str]:
    firsts = {family: measures[0].compressor for family, measures in suite.families.items()}
    families = [family for family, first in firsts.items() if not method.cut_by or first in method.cut_by]
    if not families:
        raise BadInput(
            f"method {name} is made for {', '.join(method.cut_by)}; this suite compresses by "
            f"{', '.join(dict.fromkeys(firsts.values()))}"
        )
    return families
