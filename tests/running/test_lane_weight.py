"""A weight in a lane lets go of what it holds before the next one begins; its bytes are tested where runs are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Access
from streamconv.running.engine import Engine
from streamconv.running.lane_weight import LaneWeight
from streamconv.running.messages import BeginWeight
from streamconv.running.opened import LoadedWeight


@pytest.mark.parametrize(("access", "waits"), [(Access.ROW, False), (Access.WHOLE, True)])
def test_a_weight_that_is_held_whole_is_let_go_before_the_next(access: Access, waits: bool) -> None:
    waited: list[bool] = []
    ticket = SimpleNamespace(wait=lambda: waited.append(True))
    engine = SimpleNamespace(
        begin=lambda *given: None,
        end_reduce=lambda works: None,
        rewrite=lambda *given: ticket,
        finish=lambda work: ((), None),
    )
    step: Any = SimpleNamespace(
        access=access, encoder=SimpleNamespace(grid=None, order=None, row_offset=int), name="w", waits=False
    )
    outputs: Any = [SimpleNamespace(plan=SimpleNamespace(options=MergeOptions()))]
    begin = BeginWeight((0,), (0,), LoadedWeight([step], {}, [[]]))
    weight = LaneWeight(begin, cast("Engine", engine), outputs)
    weight.rewrite(torch.empty(0), range(64), [torch.empty(64)])
    weight.finish()
    assert waited == [True] * waits
