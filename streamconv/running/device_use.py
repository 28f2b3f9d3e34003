"""A device in use: float32 products as results are defined by, its failures in our words, its memory given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from streamconv.errors import ResourceError
from streamconv.memory_errors import is_out_of_memory, ran_out
from streamconv.planning.devices import Device
from streamconv.system_errors import first_line


@contextmanager
def in_use(device: Device) -> Iterator[None]:
    """Compute on `device` inside: with IEEE float32 products, whatever the process has set, and no memory kept after.

    Raises ResourceError where the device fails or has not got the memory, and nobody nearer has said it better.
    """
    with full_precision():
        try:
            yield
        except RuntimeError as error:
            told = _told(device, error)
            if told is None:
                raise
            raise told from error
        finally:
            give_back(device)


def _told(device: Device, error: RuntimeError) -> ResourceError | None:
    if is_out_of_memory(error):
        remedy = "Give it a smaller --max-vram, free some memory, or use --device cpu, and run again"
        return ran_out(device.name, error, remedy)
    if isinstance(error, torch.AcceleratorError):
        return ResourceError(
            f"{device.name} ({device.model}) failed: {first_line(error).rstrip('. ')}. Run the same command again; if "
            "it fails there once more, use --device cpu"
        )
    return None


def give_back(device: Device) -> None:
    """Return what torch keeps of freed memory, on the GPUs and pinned on the host, to the system: others may need it.

    On a CPU, and where CUDA did not come up, do nothing.
    """
    if device.is_cpu or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        return
    with suppress(RuntimeError):  # a GPU that has failed refuses this, too
        for name in device.names:
            with torch.cuda.device(name):
                torch.cuda.empty_cache()
        empty_host_cache: Callable[[], None] | None = getattr(torch.accelerator, "empty_host_cache", None)
        if empty_host_cache is not None:  # not every torch that will do has it
            empty_host_cache()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products of float32 in float32 inside, on every device; afterwards as the process had it.

    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some containers set, or a caller's torch.set_float32_matmul_precision would
    have GPUs round factors to 10 bits (TF32), and some CPUs to 7 (bfloat16).
    """
    with ExitStack() as restore:
        _set_ieee(restore)
        yield


def _set_ieee(restore: ExitStack) -> None:
    """Have `restore` undo what is set here, when it is closed.

    torch has an older way to set this for a process and a newer one by backend, and refuses to compute where the two
    disagree: the older one sets both, and reads only where they agree.
    """
    backends: Any = torch.backends  # whose types torch leaves out
    for holder in (
        backends,
        backends.cuda.matmul,
        backends.mkldnn.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
    ):
        restore.callback(setattr, holder, "fp32_precision", holder.fp32_precision)
    with suppress(RuntimeError):
        restore.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    with suppress(RuntimeError):
        restore.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
    backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
