"""Compilation of loops by numba, and the machine code that it keeps between processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import numba

_Loop = Callable[..., Any]


class StoredCode:
    """Machine code that numba keeps: what is damaged there, or cannot be kept, is compiled again."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def load_overload(self, *given: Any) -> Any:
        try:
            return self._cache.load_overload(*given)
        except MemoryError:
            raise
        except Exception:  # a file that was cut short is read by pickle, which raises what it likes
            with contextlib.suppress(Exception):
                self._cache.flush()
            return None

    def save_overload(self, *given: Any) -> None:
        with contextlib.suppress(Exception):  # it reads what is there first
            self._cache.save_overload(*given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def compiled(function: _Loop) -> _Loop:
    """The function as machine code, kept where numba finds a place for it."""
    try:
        made: Any = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it: every process compiles it again
        made = numba.njit(nogil=True, error_model="numpy")(function)
    else:
        if hasattr(made, "_cache"):  # with NUMBA_DISABLE_JIT nothing is compiled, and nothing kept
            made._cache = StoredCode(made._cache)
    return cast("_Loop", made)
