"""Make tests/golden/ggml: weights as ggml quantizes them, digests of what gguf-py decodes; see README.md.

python tests/golden/make_ggml_blocks.py tests/golden
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file

ROWS, COLUMNS = 2, 512
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
READ = (
    *("F32", "F16", "BF16", *WRITTEN, "Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "IQ4_NL", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
ELEMENTS = 1 << 14  # a type is decoded from as many bytes as hold these


def weights() -> NDArray[np.float16]:
    """Heavy tails, and what quantizers stumble over: zeros, a constant, one sign alone, an outlier, tiny numbers."""
    drawn = np.random.default_rng(0).standard_t(4, (ROWS, COLUMNS)) * 0.02
    drawn[0, :32], drawn[0, 32:64] = 0, 0.01
    drawn[0, 256:288] = np.abs(drawn[0, 256:288])
    drawn[0, 288:320] = -np.abs(drawn[0, 288:320])
    drawn[1, 5] = 0.4
    drawn[1, 64:96] *= 1e-3
    return drawn.astype(np.float16)


def quantizer() -> Any:
    """`ggml_quantize_chunk` of the library that xllamacpp carries."""
    (library,) = Path(xllamacpp.__file__).parent.glob("*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    whole, place = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, place, place, whole, whole, whole, place]
    function.restype = ctypes.c_size_t
    return function


def quantized(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((ROWS, COLUMNS // elements * size), np.uint8)
    written = quantizer()(int(kind), values.ctypes.data, out.ctypes.data, 0, ROWS, COLUMNS, None)
    assert written == out.nbytes
    return out


def digest(name: str) -> str:
    """SHA-256 of the values of bytes that are themselves a digest of the name; every NaN is the same one."""
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    count = ELEMENTS // elements
    raw = np.frombuffer(hashlib.shake_256(name.lower().encode()).digest(count * size), np.uint8)
    with np.errstate(all="ignore"):
        values = dequantize(raw.reshape(count, size), kind).reshape(-1).copy()
    values[np.isnan(values)] = np.nan
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()


def main() -> None:
    folder = Path(sys.argv[1]) / "ggml"
    folder.mkdir(exist_ok=True)
    values = weights()
    whole = values.astype(np.float32)
    tensors = {name.lower(): quantized(whole, name) for name in WRITTEN}
    save_file({"weights": values, **tensors}, folder / "blocks.safetensors")
    made_with = {package: version(package) for package in ("gguf", "xllamacpp", "numpy")}
    digests = {name.lower(): digest(name) for name in READ}
    record = {"made_with": made_with, "decoded": digests}
    (folder / "decoded.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
