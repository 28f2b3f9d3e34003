"""A device in use: how products are computed, what its failures become, and what it has afterwards."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from streamconv.errors import ResourceError
from streamconv.planning.devices import Device
from streamconv.progress import anonymous_bytes
from streamconv.running.device_use import full_precision, give_back, in_use

CPU = Device("cpu", "CPU")
GPUS = Device("cuda:0", "H100", ("cuda:1",))
BACKENDS: Any = torch.backends


def settings() -> tuple[str, ...]:
    """Precision of products by every way that torch has to say it."""
    holders = (
        BACKENDS,
        BACKENDS.cuda.matmul,
        BACKENDS.mkldnn.matmul,
        BACKENDS.cudnn.conv,
        BACKENDS.cudnn.rnn,
    )
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:
        whole = "mixed"
    return (whole, *(holder.fp32_precision for holder in holders))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.fp32_precision, BACKENDS.cuda.matmul.fp32_precision = before[1], before[2]
    BACKENDS.mkldnn.matmul.fp32_precision = before[3]
    assert settings() == before


def is_exact() -> bool:
    """Whether torch may round factors nowhere, as its own kernels ask."""
    return (
        torch.get_float32_matmul_precision() == "highest"
        and not BACKENDS.cuda.matmul.allow_tf32
        and not BACKENDS.cudnn.allow_tf32
        and BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    )


def older() -> None:
    torch.set_float32_matmul_precision("medium")


def newer() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def of_all() -> None:
    BACKENDS.fp32_precision = "tf32"


@pytest.mark.parametrize("choose", [lambda: None, older, newer, of_all])
def test_products_are_exact_inside_and_as_they_were_afterwards(choose: Any) -> None:
    choose()
    before = settings()
    with full_precision():
        assert is_exact()
        with full_precision():
            pass
        assert is_exact()
    assert settings() == before


def test_what_a_container_has_set_does_not_count() -> None:
    script = (
        "import torch; from streamconv.running.device_use import full_precision\n"
        "print(torch.backends.cuda.matmul.allow_tf32, end=' ')\n"
        "with full_precision(): print(torch.backends.cuda.matmul.allow_tf32)"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert found.stdout == "True False\n"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Caches that are emptied, in order, by GPU."""
    found: list[str] = []

    @contextmanager
    def on(name: str) -> Iterator[None]:
        found.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("device"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: found.append("host"), raising=False)
    return found


def test_memory_is_given_back_on_every_gpu_and_on_the_host(calls: list[str]) -> None:
    with in_use(GPUS):
        assert not calls
    assert calls == ["cuda:0", "device", "cuda:1", "device", "host"]
    give_back(CPU)
    assert len(calls) == 5


def test_cuda_that_did_not_come_up_is_left_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    give_back(GPUS)
    assert not calls


def test_a_device_that_fails_is_told_of_and_its_caches_may_fail_too(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    with (
        pytest.raises(
            ResourceError, match=r"^cuda:0 \(H100\) failed: CUDA error: an illegal .*use --device cpu"
        ),
        in_use(GPUS),
    ):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nDetails.")
    assert calls == ["cuda:0"]


def test_memory_that_runs_out_anywhere_is_told_of() -> None:
    with pytest.raises(ResourceError, match="cuda:0 ran out of memory: CUDA error: CUBLAS_"), in_use(GPUS):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    with pytest.raises(RuntimeError, match="a bug"), in_use(GPUS):
        raise RuntimeError("a bug")


def test_pinned_memory_counts_where_a_gpu_is_used() -> None:
    """What CUDA pins is shared memory to the system, as this is."""
    alone, both = anonymous_bytes(), anonymous_bytes(pinned=True)
    with mmap.mmap(-1, 64 * 2**20) as held:  # shared and anonymous
        held.write(b"x" * len(held))
        assert anonymous_bytes() - alone < 16 * 2**20
        assert anonymous_bytes(pinned=True) - both > 56 * 2**20
