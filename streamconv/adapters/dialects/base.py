"""A dialect: the way in which one program lays out its adapters, translated into PEFT's fields and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.source import PREFIX, BaseParameters
from streamconv.checkpoint.types import StoredTensor
from streamconv.storage.base import Storage

ReadTensors = Callable[[Storage, AdapterConfig, BaseParameters | None], Mapping[str, StoredTensor]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One entry of DIALECTS.

    `name`: the program, as it stands before "adapter" in sentences. `recognizes`: whether a folder is written in it, by
    names of files and small ones alone. `read_config`: its config as PEFT would have written it; `raw` stays what the
    file holds. `read_tensors`: its tensors by PEFT's keys, prefix included, under the names that they have in the file;
    without a base, names that only a base can tell stay as they are. `note`: a sentence on what was read, and how.
    """

    name: str
    recognizes: Callable[[Storage], bool]
    read_config: Callable[[Storage], AdapterConfig]
    read_tensors: ReadTensors
    note: Callable[[AdapterConfig], str]


def peft_key(module: str, end: str) -> str:
    """The key of PEFT for the tensor `end` (`lora_A.weight`) of `module`."""
    return f"{PREFIX}{module}.{end}"
