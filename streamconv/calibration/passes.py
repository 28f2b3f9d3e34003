"""Text, threads, memory and stop request, which all passes of a text through a model share."""

from __future__ import annotations

import ctypes
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamconv.calibration.layer_files import LayerFiles, Result, Stream
from streamconv.calibration.need import batch_of
from streamconv.calibration.subject import Subject
from streamconv.errors import InputError, Stopped
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.forward.walk import Passing, Walk, in_batches
from streamconv.memory_errors import is_out_of_memory, ran_out
from streamconv.planning.devices import Device
from streamconv.progress import OnBytes, StopRequest
from streamconv.running.device_use import give_back
from streamconv.system_errors import lacking


def windows_of(subject: Subject) -> Tensor:
    """The calibration text [sequence, token]. Raises InputError where it is not the one that was planned with."""
    calibration = subject.calibration
    assert subject.tokenizer is not None, "there is no tokenizer to read a text with"
    with subject.tokenizer.as_folder() as folder:
        tokenizer = load_tokenizer(folder)
    windows = read_windows(
        calibration.data,
        tokenizer,
        subject.sequences,
        calibration.sequence_length,
        "--calibration-tokens",
    )
    if not calibration.is_data_set:
        _check_text(Path(calibration.data).expanduser(), calibration.sha256)
    return windows


def _check_text(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise lacking(error) or InputError(
            f"--calibration {path} cannot be read: {error.strerror}"
        ) from error
    if found != sha256:
        raise InputError(
            f"--calibration {path} changed while it was in use; put it back to go on with the same command, or begin "
            "anew with --no-resume"
        )


def key_of(subject: Subject, windows: Tensor) -> str:
    """All that the bytes of a pass depend on."""
    digest = hashlib.sha256(subject.plan.digest.encode())
    digest.update(json.dumps(windows.tolist()).encode())
    return digest.hexdigest()


def check_stop(stop: StopRequest) -> None:
    """Raise Stopped if `stop` was set."""
    if stop.signal_number is not None:
        raise Stopped("stopped by a signal; run the same command again to go on", stop.signal_number)


def release_freed_memory(device: Device) -> None:
    """Give the system what allocators keep of a layer that is done: it would add to the next one's peak."""
    give_back(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Use `count` threads for a matrix product, whatever the caller's setting: its last bits may depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def repeatable(threads: int, device: Device) -> Iterator[None]:
    """Compute the same bits each time: on `threads` threads, on a GPU by deterministic algorithms where torch has any.

    A resumed run and `verify` count on it. What torch has no such algorithm for it computes as ever.
    """
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    with fixed_threads(threads), warnings.catch_warnings():
        if device.is_cpu:
            yield
            return
        warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a pass over memory that is about to be written
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fills
            torch.use_deterministic_algorithms(enabled, warn_only=warns)


@contextmanager
def repeatable_attention(device: Device) -> Iterator[None]:
    """Have attention differentiated in the same order each time: a GPU's fused kernels add up as threads come."""
    with nullcontext() if device.is_cpu else sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def telling_of_memory(device: Device) -> Iterator[None]:
    """Raise ResourceError where a device runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remedy = "Free some, give a shorter --calibration-sequence-length, or use --device cpu, and run again"
        raise ran_out(device.name, error, remedy) from error


Work = Callable[[Passing, int, nn.Module, Stream], Sequence[Result]]


def through_layers(
    walk: Walk, windows: Tensor, files: LayerFiles, disk: int, on_bytes: OnBytes, work: Work
) -> None:
    """Have the one stream of `files` pass the layers that are not done yet, `work` taking it through each.

    `disk` are the bytes that `files` need in all. `on_bytes` is called with those of weights, first with what is done.
    """
    sizes = [
        sum(map(walk.source.stored_bytes, walk.layer_weights(number)))
        for number in range(len(walk.skeleton.layers))
    ]
    first = files.done
    on_bytes(sum(sizes[:first]))
    if first == len(sizes):
        return
    files.check_disk(disk)
    with files.streams() as (stream,):

        def keep(chosen: slice, entering: Tensor) -> None:
            if not first:
                stream.entering(0).write(chosen, entering)

        with walk.entered(windows, in_batches(windows, batch_of(windows.shape[1])), keep) as passing:
            for number in range(first, len(sizes)):
                with passing.layer(number) as module:
                    results = work(passing, number, module, stream)
                walk.source.check_unchanged()
                files.write(number, results)
                release_freed_memory(walk.device)
                on_bytes(sizes[number])
