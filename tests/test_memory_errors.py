"""What counts as an accelerator that ran out of memory."""

from __future__ import annotations

import pytest
import torch

from streamconv.memory_errors import is_out_of_memory, ran_out

LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError(
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"
    ),  # of pinned memory, streams
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
OTHERS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nan out of memory CUDA error beneath"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError(),
    MemoryError("out of memory"),
    ValueError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", LACKS, ids=str)
def test_an_accelerator_without_memory_is_known_by_class_or_words(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_faults_and_memory_of_the_host_are_something_else(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried 2 GiB.", "CUDA out of memory. Tried 2 GiB\nMore."]
)
def test_it_is_told_in_its_first_line_with_what_to_do(text: str) -> None:
    error = torch.OutOfMemoryError(text)
    told = ran_out("cuda:0", error, "Use --device cpu")
    assert str(told) == "cuda:0 ran out of memory: CUDA out of memory. Tried 2 GiB. Use --device cpu"
    assert told.__cause__ is error
