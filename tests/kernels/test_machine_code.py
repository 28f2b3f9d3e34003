"""Machine code that numba keeps decides nothing: damaged, or not to be kept, it is compiled again."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import runpy
from typing import Any

import pytest

pytest.importorskip("numba")

from streamconv.kernels.machine_code import StoredCode


class Damaged:
    """A store of machine code whose files were cut short, on a disk that is full."""

    def __init__(self, error: Exception) -> None:
        self.error, self.flushed, self.cache_path = error, 0, "here"

    def load_overload(self, *given: object) -> object:
        raise self.error

    def save_overload(self, *given: object) -> None:
        raise self.error if self.flushed else OSError(errno.ENOSPC, "full")

    def flush(self) -> None:
        self.flushed += 1
        raise OSError(errno.EROFS, "read only")


def test_damaged_machine_code_is_compiled_again() -> None:
    store = Damaged(EOFError("Ran out of input"))
    kept = StoredCode(store)
    assert kept.load_overload("signature", "context") is None
    assert store.flushed == 1
    kept.save_overload("signature", "code")
    store.flushed = 0
    kept.save_overload("signature", "code")
    assert kept.cache_path == "here"
    with pytest.raises(MemoryError):
        StoredCode(Damaged(MemoryError())).load_overload("signature", "context")


def test_loops_that_are_not_compiled_stay_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamconv.kernels import loops

    monkeypatch.setattr("numba.config.DISABLE_JIT", True)  # as NUMBA_DISABLE_JIT=1 has it
    assert inspect.isfunction(runpy.run_path(loops.__file__)["absmax_64"])


def test_loops_are_known_again_by_the_next_process() -> None:
    """numba tells loops apart by the variables that they are closed over, and another loop is another every time."""
    from streamconv.kernels import e2m1_loops

    loops: list[Any] = [
        getattr(each, field.name) for each in e2m1_loops.LOOPS.values() for field in dataclasses.fields(each)
    ]
    loops += [each for each in vars(e2m1_loops).values() if hasattr(each, "py_func")]
    closed = [cell.cell_contents for loop in loops for cell in loop.py_func.__closure__ or ()]
    assert closed
    assert {type(value) for value in closed} == {int}
