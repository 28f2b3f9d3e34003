"""Tensors that say cuda:0, hold a tensor of the CPU, and behave as those of a GPU do towards tensors of the host.

They do not meet tensors of the CPU but in copies, as numbers of no dimension, or as places; copies to and from memory
that is not pinned have the host wait, and so does whatever the host is told about a value. What they compute is what
the CPU computes, bit for bit. Found that way are mixed devices, waits, streams and memory: no race, no speed, and no
kernel that CUDA lacks, but for types that its own list of operations does not have (`unknown_to_cuda`).

torch is asked to leave its calls to us: a fallback for all operations on CUDA, and a guard that does nothing for
the device that is not there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config

from tests.pretend.ledger import LEDGER, Storage
from tests.pretend.shapes import shapes_alone

CUDA = torch.device("cuda:0")
PINNED: dict[int, int] = {}
"""Pinned memory of the host: addresses, with bytes."""

_COPIES = {"aten::copy_", "aten::_to_copy", "aten::copy"}
_TAKE_PLACES = {
    "aten::index.Tensor",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor",
}
_TELL = {  # what the host is told: a value, a size that depends on values, or that a solver failed
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "linalg_eigh",
    "_linalg_eigh",
    "linalg_svd",
    "_linalg_svd",
    "histc",
    "bincount",
}
_VIEWS = {
    *("view", "slice", "select", "as_strided", "expand", "transpose", "t", "permute", "unsqueeze", "squeeze"),
    *("detach", "alias", "_unsafe_view", "split", "split_with_sizes", "unbind", "diagonal", "_reshape_alias"),
    *("reshape", "unfold", "lift_fresh", "view_as_real", "chunk"),
}
# Composite operations that would resize an output, or look for a driver.
_FACTORIES: Mapping[str, Sequence[str]] = {
    "arange": ("default", "start", "start_step"),
    "eye": ("default", "m"),
    "linspace": ("default",),
    "randperm": ("default",),
}


@dataclass
class _Holder:
    device: torch.device


_holder = _Holder(torch.device("cpu"))


@contextmanager
def without_values() -> Iterator[None]:
    """Have tensors on the device hold shapes alone, so that they may be of any size; see `shapes_alone`."""
    before, _holder.device = _holder.device, torch.device("meta")
    try:
        with mock.patch.object(fx_config, "meta_nonzero_assume_all_nonzero", True):
            yield
    finally:
        _holder.device = before


class MixedDevicesError(RuntimeError):
    """Raised as torch does where tensors of two devices meet."""


class DeviceTensor(Tensor):
    """A tensor on the device. `held` are its values, on the CPU; `storage` is the memory that it lies in."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it
    held: Tensor
    storage_of: Storage

    @staticmethod
    def __new__(cls, values: Tensor, storage: Storage | None = None) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.held = values
        made.storage_of = storage or Storage(values.untyped_storage().nbytes())
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as torch documents it
        return f"DeviceTensor({self.held!r})"

    def tolist(self) -> Any:
        LEDGER.wait("tolist")
        return (torch.zeros_like(self.held, device="cpu") if self.held.is_meta else self.held).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo: object) -> DeviceTensor:
        return DeviceTensor(self.held.clone())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch documents it
        cls, op: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _dispatch(op, args, dict(kwargs or {}))


def _dispatch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out `op`, of which an argument or the result is on the device."""
    tensors: list[Tensor] = []
    inner_args = [_held(each, tensors) for each in args]
    inner_kwargs = {name: _held(each, tensors) for name, each in kwargs.items()}
    there = [each for each in tensors if isinstance(each, DeviceTensor)]
    name, short = _names(op)
    _check_mix(op, name, tensors, there, args)
    if short not in _VIEWS:
        for each in there:
            LEDGER.use(each.storage_of)
    _note_waits(name, short, args, kwargs)
    if there and short in {"div", "div_"} and _is_inexact(args[1]) and there[0].is_floating_point():
        LEDGER.reciprocal()
    if short == "_fused_sdp_choice":
        return 0  # the one that is made of other operations
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == "cuda"
        inner_kwargs["device"] = _holder.device if goes_there else torch.device("cpu")
    if any(each.held.is_meta for each in there):
        found = shapes_alone(op, short, inner_args, inner_kwargs)
    else:
        found = op(*inner_args, **inner_kwargs)
    if short not in _VIEWS:
        _note_launch(short, there, found)
    given = _given(op, args, kwargs)
    if given is not None:
        return given
    return _wrapped(found, there) if goes_there else found


def _held(given: Any, tensors: list[Tensor]) -> Any:
    """An argument with values of the CPU in place of tensors, which are added to `tensors`."""
    if isinstance(given, Tensor):
        tensors.append(given)
        return given.held if isinstance(given, DeviceTensor) else given
    if isinstance(given, list | tuple):
        return [_held(each, tensors) for each in given]
    return given


@functools.cache
def _names(op: Any) -> tuple[str, str]:
    """Name of an operation, and that without its library and overload."""
    return op.name(), op.name().partition("::")[2].partition(".")[0]


def _check_mix(
    op: Any, name: str, tensors: Sequence[Tensor], there: Sequence[DeviceTensor], args: Sequence[Any]
) -> None:
    """Raise MixedDevicesError where a tensor of the host is no number, no place, and not copied."""
    if len(tensors) == len(there):
        return
    host = [each for each in tensors if not isinstance(each, DeviceTensor)]
    if not host or not there or name in _COPIES:
        return
    allowed = {id(each) for each in host if each.dim() == 0}
    if name in _TAKE_PLACES and isinstance(args[0], DeviceTensor):
        places = [each for each in args[1] or () if isinstance(each, Tensor)]
        if any(not isinstance(each, DeviceTensor) for each in places):
            LEDGER.wait("places from the host")
        allowed |= {id(each) for each in places}
    is_written = (
        op._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], DeviceTensor)
    )
    if is_written or any(id(each) not in allowed for each in host):
        shapes = ", ".join(
            f"{'cuda' if isinstance(each, DeviceTensor) else 'cpu'}{list(each.shape)}" for each in tensors
        )
        LEDGER.mix(f"{name}: {shapes}")
        raise MixedDevicesError(f"{name}: expected all tensors to be on the same device, found {shapes}")


def _note_waits(name: str, short: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    is_mask = name in _TAKE_PLACES and any(
        isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1] if each is not None
    )
    if short in _TELL or is_mask:
        LEDGER.wait(short)
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        if isinstance(args[0], DeviceTensor) != (torch.device(kwargs["device"]).type == "cuda"):
            _note_copy(args[0], kwargs.get("non_blocking", False), to_host=isinstance(args[0], DeviceTensor))
    elif name == "aten::copy_":
        target, source = args[0], args[1]
        if isinstance(target, DeviceTensor) != isinstance(source, DeviceTensor):
            is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            host = source if isinstance(target, DeviceTensor) else target
            _note_copy(host, is_async, to_host=host is target)


def _is_inexact(divisor: Any) -> bool:
    """Whether it is a number, of which torch makes the reciprocal on CUDA, and that is rounded."""
    if isinstance(divisor, DeviceTensor) or (isinstance(divisor, Tensor) and divisor.dim()):
        return False
    return math.frexp(float(divisor))[0] not in {0.5, -0.5}


def _note_copy(host: Tensor, is_async: bool, *, to_host: bool) -> None:
    """A copy has the host wait unless its memory is pinned and it is told not to."""
    is_pinned = not host.numel() or any(
        start <= host.data_ptr() < start + size for start, size in PINNED.items()
    )
    if not (is_pinned and is_async):
        LEDGER.wait(f"copy {'to' if to_host else 'from'} {'pinned' if is_pinned else 'pageable'} memory")


def _note_launch(short: str, there: Sequence[DeviceTensor], found: Any) -> None:
    outputs: list[Tensor] = []
    _held(found, outputs)
    sizes = [each.numel() * each.element_size() for each in (*(one.held for one in there), *outputs)]
    LEDGER.launch(short, str(there[0].dtype if there else outputs[0].dtype if outputs else "-"), sum(sizes))


def _given(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The tensors that `op` wrote to and returns, None if it returns others."""
    schema = op._schema
    returns = schema.returns
    if not (schema.is_mutable and returns) or not all(
        each.alias_info is not None and each.alias_info.is_write for each in returns
    ):
        return None
    given = [
        args[place] if place < len(args) and not each.kwarg_only else kwargs.get(each.name)
        for place, each in enumerate(schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]
    for each in given:
        if isinstance(each, DeviceTensor) and each.held.size() != each.size():
            raise RuntimeError(f"{op.name()} resized an output, which this device cannot")
    return given[0] if len(given) == 1 else tuple(given)


def _wrapped(found: Any, there: Sequence[DeviceTensor]) -> Any:
    """Results as tensors of the device, in the memory of what they are views of."""
    storages = {each.held.untyped_storage()._cdata: each.storage_of for each in there}

    return _there(found, storages)


def _there(found: Any, storages: Mapping[int, Storage]) -> Any:
    """As `found`, with tensors on the device; no function within another, which would keep memory in a cycle."""
    if isinstance(found, DeviceTensor):
        return found
    if isinstance(found, Tensor):
        return DeviceTensor(found, storages.get(found.untyped_storage()._cdata))
    return (
        type(found)([_there(each, storages) for each in found]) if isinstance(found, list | tuple) else found
    )


_libraries: list[Any] = []


def install() -> None:
    """Have operations on CUDA come here, in this process, for good."""
    if _libraries:
        return
    vars(torch.cuda)["_lazy_init"] = lambda: None
    _guard_nothing()
    library: Any = torch.library.Library
    everything, aten = library("_", "IMPL"), library("aten", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: _dispatch(op, args, kwargs), "CUDA")
    copy = torch.ops.aten.copy_.default
    aten.impl("copy_", lambda *args, **kwargs: _dispatch(copy, args, kwargs), "CUDA")
    for packet, overloads in _FACTORIES.items():
        for overload in overloads:
            op = getattr(getattr(torch.ops.aten, packet), overload)
            aten.impl(op.name().partition("::")[2], _factory(op), "CUDA")
    _libraries.extend((everything, aten))


def _factory(op: Any) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return _dispatch(op, args, {**kwargs, "device": CUDA})

    return make


def _guard_nothing() -> None:
    """Have CUDA guarded as `meta` is; places in c10's table are those of its device types."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    core = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 21).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    if not table[cuda]:
        table[cuda] = table[meta]


# Not listed, and yet there: cumsum of bool is summed in int64.
_PROMOTED = {("cumsum", "torch.bool")}


@functools.cache
def _listed() -> Mapping[str, frozenset[str]]:
    """Types that CUDA has a kernel for, by operation, as torch's own tests list them."""
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, frozenset[str]] = {}
    for each in op_db:
        types = frozenset(map(str, each.dtypesIfCUDA))
        for name in (each.name, *(alias.name for alias in each.aliases)):
            short = name.rpartition(".")[2]
            found[short] = found.get(short, frozenset()) | types
    return found


def unknown_to_cuda(dtypes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of (operation, dtype) that torch lists for CUDA without that type."""
    listed = _listed()
    known = set(dtypes) - _PROMOTED
    return sorted(
        (name, dtype)
        for name, dtype in known
        if dtype not in listed.get(name.rstrip("_"), frozenset((dtype,))) and not name.startswith("empty")
    )
