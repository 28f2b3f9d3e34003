"""Gradients by a walk over torch's own nodes, in the order of its engine, which asks a driver for streams.

The nodes are torch's: each is called with what came to it, and its operations come to the device as any others.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Edge = tuple[Any, int]


@contextmanager
def walked_backward() -> Iterator[None]:
    """Have torch.autograd.grad walk."""
    with mock.patch.object(torch.autograd, "grad", grad):
        yield


def grad(
    outputs: Tensor,
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | None = None,
    *,
    allow_unused: bool = False,
) -> tuple[Tensor | None, ...]:
    """As torch.autograd.grad has it, of one output. Raises RuntimeError for an input that has no part in it."""
    wanted = [_edge(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    root = _edge(outputs)
    came = {root: torch.ones_like(outputs) if grad_outputs is None else grad_outputs}
    with torch.no_grad():
        _walk(root, came, set(wanted))
    found = [came.get(edge) for edge in wanted]
    if not allow_unused and any(each is None for each in found):
        raise RuntimeError("one of the differentiated tensors appears to not have been used in the graph")
    return tuple(found)


def _edge(tensor: Tensor) -> Edge:
    """The node that a tensor's gradient comes to, and the place there."""
    if tensor.grad_fn is None:
        with torch.enable_grad():
            view = tensor.view_as(tensor)
        assert view.grad_fn is not None
        return view.grad_fn.next_functions[0]
    return tensor.grad_fn, tensor.output_nr


def _walk(root: Edge, came: dict[Edge, Any], wanted: set[Edge]) -> None:
    """Add to `came` what comes to each node; the latest of those that nothing more comes to is next."""
    waits = _uses(root[0])
    ready = [(-root[0]._sequence_nr(), 0, root[0])]
    while ready:
        _, _, node = heapq.heappop(ready)
        given = [came.get((node, place)) for place in range(len(node._input_metadata))]
        for place in range(len(given)):
            if (node, place) not in wanted:
                came.pop((node, place), None)
        made = node(*given) if node.next_functions and any(each is not None for each in given) else ()
        results = made if isinstance(made, tuple) else (made,)
        for number, (following, place) in enumerate(node.next_functions):
            if following is None:
                continue
            if number < len(results) and results[number] is not None:
                _add(came, (following, place), results[number])
            waits[following] -= 1
            if not waits[following]:
                heapq.heappush(ready, (-following._sequence_nr(), id(following), following))


def _uses(root: Any) -> Counter[Any]:
    """How often each node's gradient is added to."""
    found: Counter[Any] = Counter()
    todo, seen = [root], {root}
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is None:
                continue
            found[following] += 1
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return found


def _add(came: dict[Edge, Any], edge: Edge, gradient: Tensor) -> None:
    """Add `gradient`, as what it belongs to has it: of its shape and dtype."""
    meant = edge[0]._input_metadata[edge[1]]
    if gradient.shape != tuple(meant.shape):
        gradient = gradient.sum_to_size(tuple(meant.shape))
    gradient = gradient.to(meant.dtype)
    came[edge] = gradient if edge not in came else came[edge] + gradient
