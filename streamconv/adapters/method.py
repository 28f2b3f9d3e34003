"""A PEFT method: all that reading, naming, plans and reports have to know of it, as one entry of ADAPTERS."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Update
from streamconv.adapters.config import Rule
from streamconv.adapters.source import BaseParameters, Source
from streamconv.checkpoint.types import StoredTensor

Reader = Callable[[Source, BaseParameters], tuple[Update, ...]]
Facts = Callable[[Mapping[str, Any], Mapping[str, StoredTensor]], Mapping[str, Any]]


def no_facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del fields, tensors
    return {}


@dataclass(frozen=True, slots=True)
class Method:
    """One value of `peft_type`.

    `label`: its name in sentences (`LoRA`). `read`: the updates of an adapter, whose config `fields` has allowed.
    `keys`: regular expression of what its tensors are called below the path of a module (`lora_\\w+`); it may take in
    more than `read` uses, the rest is refused. `neutral`: how updates are that were never trained, after "every update
    is". `formula`: the merged weight in the letters of docs/adapters.md, whose table is made of it and of `layers`, the
    kinds of layer that the method's tests merge. `unused`: tensors that training alone needs, by the field of the
    config that switches them on. `shared`: what tensors are called that belong to all modules, `base_model.NAME`;
    updates use each, or it is refused. `indices`: those that may be stored as whole numbers, below 2²⁴, as parts are
    float32. `facts`: what `inspect` tells of config and tensors. `multiplies`: whether updates scale or rotate a weight
    instead of adding to it, so that of several adapters each changes what those before it made. `orients`: whether its
    reader asks how a weight is stored (`orientation`), so that it can be for one stored as [in, out].
    """

    label: str
    read: Reader
    fields: Mapping[str, Rule]
    keys: str
    neutral: str
    formula: str
    layers: tuple[str, ...] = ("Linear",)
    unused: Mapping[str, re.Pattern[str]] = field(default_factory=lambda: MappingProxyType({}))
    shared: str = ""
    indices: str = ""
    facts: Facts = no_facts
    multiplies: bool = False
    orients: bool = False
