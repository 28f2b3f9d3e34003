"""GGUF files of every block type that llama.cpp's own quantizer makes, and hashes of what gguf-py decodes them to.

    python tests/golden/make_gguf.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

WIDTH = 256  # what K types and I types have in one block
ROWS: Mapping[str, tuple[int, int]] = {
    "token_embd.weight": (4, WIDTH),
    "blk.0.attn_q.weight": (4, WIDTH),
    "blk.0.attn_k.weight": (3, WIDTH),
    "blk.0.attn_v.weight": (3, WIDTH),
    "blk.0.attn_output.weight": (4, WIDTH),
    "blk.0.ffn_gate.weight": (3, WIDTH),
    "blk.0.ffn_up.weight": (3, WIDTH),
    "blk.0.ffn_down.weight": (4, 2 * WIDTH),
    "output.weight": (4, WIDTH),
}
# llama.cpp's number of a file type, all of whose tensors are then asked to have the one block type.
FILE_TYPES = {
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0,
    "q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q2_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "q3_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "q5_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_S,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "iq1_s": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ1_S,
    "iq1_m": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ1_M,
    "iq2_xxs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XXS,
    "iq2_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XS,
    "iq2_s": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_M,
    "iq3_xxs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_XXS,
    "iq3_s": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S,
    "iq4_nl": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "tq1_0": llama_cpp.LLAMA_FTYPE_MOSTLY_TQ1_0,
    "tq2_0": llama_cpp.LLAMA_FTYPE_MOSTLY_TQ2_0,
    "mxfp4": llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
}
# llama.cpp makes these with importances only; all are one here.
WITH_IMPORTANCES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")


def main(out: Path) -> None:
    folder = out / f"llama-cpp-python-{version('llama-cpp-python')}"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "f32.gguf"
    write_source(source)
    for name, number in FILE_TYPES.items():
        quantize(source, folder / f"{name}.gguf", number, with_importances=name in WITH_IMPORTANCES)
    expected = {name: decoded(folder / f"{name}.gguf") for name in FILE_TYPES}
    versions = {name: version(name) for name in ("gguf", "llama-cpp-python", "numpy")}
    (folder / "expected.json").write_text(json.dumps({"made_with": versions, **expected}, indent=1) + "\n")


def write_source(path: Path) -> None:
    """A llama without a vocabulary, which the quantizer does not look for, and with a few rows of each weight."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    random = np.random.default_rng(0)
    for name, shape in ROWS.items():
        writer.add_tensor(name, drawn(name, shape, random))
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, 1 + 0.1 * random.standard_normal(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def drawn(
    name: str, shape: tuple[int, int], random: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Normal values, with what grids stumble over: zeros as far as a block goes, one great value, very small ones."""
    values = 0.05 * random.standard_normal(shape, np.float32)
    if "attn_k" in name:
        values[0] = 0
        values[1, :32] = 0
    elif "attn_q" in name:
        values[0, :64] *= 2**-9
        values[1] *= 2**-20
    elif "ffn_up" in name:
        values[0, 7] = 3
        values[1, 40] = -3
    elif "ffn_gate" in name:
        values[0] = abs(values[0]) + 0.05
        values[1] = -abs(values[1]) - 0.05
    elif "ffn_down" in name:
        values[:2] = values[:2].astype(np.float16)
        values[3] = values[3, 0]
    return values


def quantize(source: Path, target: Path, file_type: int, *, with_importances: bool) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = file_type, True, 1
    with importances() if with_importances else no_importances() as pointer:
        settings.imatrix = pointer
        done = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings))
    if done != 0:
        raise SystemExit(f"llama.cpp could not make {target}; its message is above")


@contextmanager
def importances() -> Iterator[Any]:
    """An importance of one for every column of every weight, ended by a nameless entry."""
    kind = llama_cpp.llama_model_imatrix_data
    ones = {name: (ctypes.c_float * columns)(*[1.0] * columns) for name, (_, columns) in ROWS.items()}
    table = (kind * (len(ones) + 1))(
        *(
            kind(name.encode(), ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), len(data))
            for name, data in ones.items()
        )
    )
    yield ctypes.cast(table, ctypes.POINTER(kind))


@contextmanager
def no_importances() -> Iterator[Any]:
    yield None


def decoded(path: Path) -> dict[str, dict[str, str]]:
    """The type of every tensor, and the SHA-256 of the little-endian float32 that gguf-py decodes it to, row-major."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        values = gguf.dequantize(tensor.data, kind).astype("<f4")
        found[tensor.name] = {"type": kind.name, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
