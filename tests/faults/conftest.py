"""The process that the tests of faults harm the children of."""

from collections.abc import Iterator

import pytest

from .nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery
