"""Which classes of the package implement a protocol, so that a contract's table of them can be held complete."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Protocol

import streamconv


def implementations(protocol: type) -> set[type]:
    """Every class of streamconv that has all methods of `protocol`, inherited ones included; no protocols."""
    methods = {name for name, member in vars(protocol).items() if _is_public_method(name, member)}
    assert methods, f"{protocol.__name__} has no methods to tell its implementations by"
    return {
        found
        for module in _modules()
        for found in vars(module).values()
        if inspect.isclass(found)
        and found.__module__ == module.__name__
        and Protocol not in found.__bases__
        and all(callable(getattr(found, method, None)) for method in methods)
    }


def _is_public_method(name: str, member: object) -> bool:
    return not name.startswith("_") and inspect.isfunction(member)


def _modules() -> Iterator[ModuleType]:
    """Every module of the package but those that run something when they are imported."""
    for found in pkgutil.walk_packages(streamconv.__path__, "streamconv."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)
