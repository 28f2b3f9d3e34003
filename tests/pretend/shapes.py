"""Operations on tensors that have a shape and no values, and what the host is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")


def shapes_alone(op: Any, short: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Results of `op`. A number is 1, a truth true, no two tensors are equal; what comes to the host is 1, 0, 0, ...

    Where a mask says which values to set, none are; operations whose results have a size by values are refused.
    """
    if short == "_local_scalar_dense":
        return torch.ones((), dtype=args[0].dtype).item()
    if short in {"equal", "is_nonzero"}:
        return short == "is_nonzero"
    if short == "_to_copy" and kwargs.get("device", META).type == "cpu":
        return _nearly_zeros(args[0].shape, kwargs.get("dtype") or args[0].dtype)
    if short == "copy_" and not args[0].is_meta:
        return args[0]
    if short == "index_put_" and any(each is not None and each.dtype == torch.bool for each in args[1]):
        return args[0]
    return op(*map(_without_values, args), **{name: _without_values(each) for name, each in kwargs.items()})


def _nearly_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros, of which the system makes memory when somebody looks, and a 1: what is all 0 is taken for nothing."""
    made = torch.zeros(shape, dtype=dtype)
    made.view(-1)[:1] = 1
    return made


def _without_values(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.to(META)
    return [_without_values(each) for each in given] if isinstance(given, list | tuple) else given
