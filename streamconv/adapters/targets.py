"""Whether the file holds what its config promises: every target module has adapted at least one weight.

Matching follows PEFT (`check_target_module_exists` in `peft/tuners/tuners_utils.py`): a list names modules by
the end of their path, a string is a regular expression for the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from streamconv.adapters.config import AdapterConfig
from streamconv.errors import AdapterError

ALL_LINEAR = "all-linear"


def check_targets(
    config: AdapterConfig, base: Collection[str], adapted: Collection[str], saved: Collection[str]
) -> None:
    """Raise AdapterError for a target without tensors. `base`, `adapted` and `saved` are paths of modules."""
    targets = config.fields.get("target_modules")
    if isinstance(targets, str):
        _check_pattern(config, targets, adapted)
        return
    # What modules_to_save takes is no target any more, whatever target_modules says.
    ends = {end for module in (*adapted, *saved) for end in _ends(module)}
    for name in config.names("target_modules"):
        if name not in ends and not _is_excluded(config, name, base):
            raise AdapterError(
                f"{config.name}: target_modules lists {name!r}, but the adapter holds no tensors of such a"
                " module; the file is not complete, or the entry matched nothing in training: then remove it"
            )


def _is_excluded(config: AdapterConfig, target: str, base: Collection[str]) -> bool:
    """Whether exclude_modules takes every module that `target` means; `all-linear` lists those too."""
    meant = [module for module in base if target in _ends(module)]
    if not isinstance(config.fields.get("exclude_modules"), str):
        excluded = frozenset(config.names("exclude_modules"))
        return bool(meant) and all(not excluded.isdisjoint(_ends(module)) for module in meant)
    pattern = config.text("exclude_modules")
    try:
        return bool(meant) and all(re.fullmatch(pattern, module) for module in meant)
    except re.error as error:
        raise AdapterError(
            f"{config.name}: exclude_modules {pattern!r} is not a regular expression: {error}"
        ) from error


def _ends(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]


def _check_pattern(config: AdapterConfig, pattern: str, adapted: Collection[str]) -> None:
    if pattern.lower() == ALL_LINEAR:
        found = bool(adapted)
    else:
        try:
            found = any(re.fullmatch(pattern, module) for module in adapted)
        except re.error as error:
            raise AdapterError(
                f"{config.name}: target_modules {pattern!r} is not a regular expression: {error}"
            ) from error
    if not found:
        raise AdapterError(
            f"{config.name}: target_modules is {pattern!r}, but no module in the adapter matches it; the file"
            " is not complete"
        )
