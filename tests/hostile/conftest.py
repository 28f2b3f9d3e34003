"""One fork server for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.commands import Commands, fork_server


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    with fork_server() as server:
        yield server
