"""Fork servers for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.commands import MODEL_MODULES, Commands, fork_server


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    with fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def model_commands() -> Iterator[Commands]:
    """Of a process that has what runs models imported, too, and what torch imports to open a pickle."""
    with fork_server(*MODEL_MODULES) as server:
        yield server
