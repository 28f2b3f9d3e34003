"""Side parts that wait: a run goes on from no place where one is in memory alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16
from streamconv.planning.plan import SideParts
from streamconv.running.cell import KeptDelta
from streamconv.running.waiting import WaitingParts


def test_no_boundary_is_told_while_parts_wait() -> None:
    told: list[dict[str, KeptDelta]] = []
    sink: Any = SimpleNamespace(boundary=lambda sums: told.append(dict(sums)))
    waiting, kept = WaitingParts(sink), {name: KeptDelta(1.0, 2.0, 3.0) for name in "abc"}
    waiting.boundary({"c": kept["c"]})
    waiting.hold("a", (b"a0", b"a1"))
    waiting.boundary({"a": kept["a"]})
    waiting.boundary({})  # a copied weight between
    waiting.hold("b", (b"b0", b"b1"))
    waiting.boundary({"b": kept["b"]})
    for number in range(2):
        step = SideParts("s", ("a", "b"), number, TensorSpec("s", BF16, (2, 1)))
        assert told == [{"c": kept["c"]}]
        assert waiting.take(step) == [f"a{number}".encode(), f"b{number}".encode()]
        waiting.boundary({})
    assert told == [{"c": kept["c"]}, {"a": kept["a"], "b": kept["b"]}]
    waiting.boundary({})
    assert told[-1] == {}
