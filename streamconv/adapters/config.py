"""adapter_config.json, read strictly: every field is known and used, harmless, or refused by name.

Fields are those of PEFT 0.21.2 (`peft/config.py`, `peft/tuners/*/config.py`) and of its earlier versions.
PEFT adds variants of a method as new fields, so an unknown field that is not empty may change the maths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.errors import AdapterError, CheckpointError, UnsupportedError
from streamconv.storage.base import Storage

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class Known:
    """A field that a reader uses, or that has no effect once the tensors exist."""


@dataclass(frozen=True, slots=True)
class Neutral:
    """A field that would change the maths: it must be off or one of `values`, else refused for `reason`.

    Off is null or false. An empty object is not: PEFT makes the default config of a variant from it.
    """

    reason: str
    values: tuple[str | bool | list[str], ...] = ()

    def allows(self, value: object) -> bool:
        # By type as well: 1 == True, and neither stands for the other here.
        return any(type(value) is type(ok) and value == ok for ok in (None, False, *self.values))


Rule = Known | Neutral

USED = Known()
NO_EFFECT = Known()

# PeftConfig and the fields that every tuner shares.
COMMON_FIELDS: Mapping[str, Rule] = MappingProxyType(
    {
        "peft_type": USED,
        "target_modules": USED,
        "modules_to_save": USED,
        "ensure_weight_tying": USED,
        "exclude_modules": USED,
        "task_type": NO_EFFECT,
        "auto_mapping": NO_EFFECT,
        "peft_version": USED,
        "base_model_name_or_path": NO_EFFECT,
        "revision": NO_EFFECT,
        "inference_mode": NO_EFFECT,
        # These chose the modules when training began; which were chosen is in the tensors.
        "layers_to_transform": NO_EFFECT,
        "layers_pattern": NO_EFFECT,
    }
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of one adapter_config.json; `name` is what messages call it, `raw` its bytes."""

    name: str
    fields: Mapping[str, Any]
    raw: bytes

    @property
    def peft_type(self) -> str:
        return self.text("peft_type")

    def text(self, field: str) -> str:
        value = self.fields.get(field)
        return value if isinstance(value, str) and value else self._refuse(field, "a name")

    def flag(self, field: str) -> bool:
        value = self.fields.get(field)
        if value is None:
            return False
        return value if isinstance(value, bool) else self._refuse(field, "true or false")

    def rank(self, field: str) -> int:
        value = self.fields.get(field)
        return value if is_rank(value) else self._refuse(field, "a positive whole number")

    def seed(self, field: str, drawn: str) -> int:
        """The seed of a torch.Generator; `drawn` says for messages what was drawn from it."""
        value = self.fields.get(field)
        return value if is_seed(value) else self._refuse(field, f"the whole number that {drawn}")

    def number(self, field: str) -> float:
        value = self.fields.get(field)
        return float(value) if is_number(value) else self._refuse(field, "a number")

    def names(self, field: str) -> tuple[str, ...]:
        """A list of non-empty strings; null and a missing field are the empty list."""
        value = self.fields.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self._refuse(field, "a list of names")
        return tuple(value)

    def section(self, field: str, known: frozenset[str]) -> Mapping[str, Any] | None:
        """An object of fields among `known`, the sub-config of a variant; None where it is null or missing.

        Raises UnsupportedError for a field in it that is not known and says something.
        """
        value = self.fields.get(field)
        if value is None or value is False:
            return None
        if not isinstance(value, dict):
            self._refuse(field, "an object")
        for name, entry in value.items():
            if name not in known and not is_empty(entry):
                raise UnsupportedError(
                    f"{self.name}: {field} has the field {shown(name)} ({shown(entry)}), which is not known here and"
                    " may change what a merge must do; if it has no effect on the weights, remove it from the file"
                )
        return MappingProxyType(value)

    def ranks(self, field: str) -> Mapping[str, int]:
        """Ranks by pattern, in file order."""
        return self._by_pattern(field, is_rank)

    def numbers(self, field: str) -> Mapping[str, float]:
        """Numbers by pattern, in file order."""
        return self._by_pattern(field, is_number)

    def _by_pattern(self, field: str, fits: Callable[[object], bool]) -> Mapping[str, Any]:
        value = self.fields.get(field)
        if value is None:
            return MappingProxyType({})
        if not isinstance(value, dict) or not all(fits(entry) for entry in value.values()):
            self._refuse(field, "an object of numbers by pattern")
        return MappingProxyType(value)

    def _refuse(self, field: str, expected: str) -> Any:
        found = shown(self.fields[field]) if field in self.fields else "nothing"
        raise AdapterError(f"{self.name}: {field} must be {expected}, found {found}")


def read_config(storage: Storage) -> AdapterConfig:
    """The adapter's config, strict JSON. Raises AdapterError where it is missing or broken."""
    if CONFIG_NAME not in storage.names():
        raise AdapterError(_missing(storage))
    name = f"{storage.location}: {CONFIG_NAME}"
    raw = storage.read_bytes(CONFIG_NAME, MAX_CONFIG_BYTES)
    try:
        return AdapterConfig(name, MappingProxyType(parse_object(raw, name)), raw)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def check_fields(config: AdapterConfig, rules: Mapping[str, Rule]) -> None:
    """Raise UnsupportedError for the first field that could change the maths in a way not built here."""
    for field, value in config.fields.items():
        match rules.get(field):
            case Known():
                continue
            case Neutral() as rule if not rule.allows(value):
                raise UnsupportedError(f"{config.name}: {field} is {shown(value)}: {rule.reason}")
            case None if not is_empty(value):
                raise UnsupportedError(
                    f"{config.name}: the field {shown(field)} ({shown(value)}) is not known here and may"
                    " change what a merge must do; if it has no effect on the weights, remove it from the"
                    " file"
                )


def is_empty(value: object) -> bool:
    """Whether a field says no more than if it were absent."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def is_number(value: object) -> TypeGuard[float]:
    # JSON has integers that no float can hold; NaN is greater and less than nothing.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_seed(value: object) -> TypeGuard[int]:
    """Whether a torch.Generator takes it."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def is_rank(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _missing(storage: Storage) -> str:
    """Message for a folder that is no adapter, with what is there instead: the base model, or checkpoints below it."""
    where = f"{storage.location}: {CONFIG_NAME} is missing"
    if "config.json" in storage.names():
        return f"{where}, and config.json is there: this is a model, not an adapter; give it with --base"
    found = [each for each in storage.folders() if f"{each}/{CONFIG_NAME}" in storage.names(each)]
    if found:
        listed = ", ".join(f"{storage.location}/{each}" for each in found[:5])
        listed += ", ..." if len(found) > 5 else ""
        are = "is an adapter in a folder" if len(found) == 1 else f"are {len(found)} adapters in folders"
        ways = "give it" if len(found) == 1 else "give one of them"
        return f"{where}, but there {are} below; {ways}: {listed}"
    return f"{where}; give the folder of a PEFT adapter, with {CONFIG_NAME} and adapter_model.safetensors"
