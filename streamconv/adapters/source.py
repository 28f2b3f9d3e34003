"""An adapter's tensors by the name of the module they belong to, and the base parameters they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Parameter, Tie
from streamconv.adapters.config import AdapterConfig
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import DENSE
from streamconv.errors import AdapterError

PREFIX = "base_model.model."
_DTYPES = frozenset(DENSE.values())


@dataclass(frozen=True, slots=True)
class Base:
    """What is known of the base model: parameters by name, config.json, and what it ties."""

    parameters: Mapping[str, Parameter]
    config: Mapping[str, Any]
    tie: Tie | None

    def find(self, name: str) -> Parameter | None:
        """The parameter `name`; a tied head need not be stored and then has the embedding's shape."""
        if self.tie is not None and name == self.tie.head:
            embedding = self.parameters.get(self.tie.embedding)
            return None if embedding is None else Parameter(name, embedding.shape)
        return self.parameters.get(name)

    def get(self, name: str, key: str) -> Parameter:
        """The parameter `name`, for the adapter's tensor `key`. Raises AdapterError with the nearest name."""
        found = self.find(name)
        if found is None:
            raise AdapterError(f"{key} is for {name}, which the base model does not have{self._hint(name)}")
        return found

    def _hint(self, name: str) -> str:
        """Names that differ by a prefix only: the adapter was trained on another class of the same model."""
        for other in self.parameters:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                return (
                    f", but it has {other}: the adapter was trained on a class without {prefix!r} in its"
                    f" names, such as AutoModel; put {prefix!r} after {PREFIX!r} in the adapter's tensor"
                    " names"
                )
            if name.endswith(f".{other}"):
                prefix = name.removesuffix(other)
                return (
                    f", but it has {other}: the base was saved without {prefix!r} in its names; save it again"
                    " with the class that the adapter was trained on"
                )
        return "; is this the base the adapter was trained on, and of the same class?"


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter. `tensors` by their key in the file without `base_model.model.`, sorted."""

    location: str
    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]


def by_key(location: str, tensors: Iterable[StoredTensor]) -> Mapping[str, StoredTensor]:
    """Strip the prefix that PEFT gives every key. Raises AdapterError for other keys and element types."""
    found = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if not tensor.name.startswith(PREFIX):
            raise AdapterError(
                f"{location}: the tensor {tensor.name} does not belong to a PEFT adapter, whose names start"
                f" with {PREFIX!r}; save the adapter with PEFT's save_pretrained"
            )
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{location}: {tensor.name} is stored as {tensor.dtype}, expected F32, F16 or BF16; a"
                " quantized adapter must be saved in floating point first"
            )
        found[tensor.name.removeprefix(PREFIX)] = tensor
    return MappingProxyType(found)
