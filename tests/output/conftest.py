"""A plan of three shards and an empty output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Plan
from tests.models import Sizes, write_base

SIZES = Sizes(hidden=32, inner=40, layers=1, vocabulary=50)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    base = write_base(tmp_path_factory.mktemp("output") / "base", SIZES.shapes, shards=3)
    return prepare(Job(str(base), None, MergeOptions(), "cpu")).plan


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
