"""Quantize a .gguf file by llama.cpp's own quantizer; see tools/llama_quantize."""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

FILE_TYPES = {
    name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_").lower(): number
    for name, number in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
}
# Block types, which --pure gives every matrix, whose file types have other names.
TYPES = FILE_TYPES | {
    "q3_k": FILE_TYPES["q3_k_s"],
    "q4_k": FILE_TYPES["q4_k_s"],
    "q5_k": FILE_TYPES["q5_k_s"],
    "mxfp4": FILE_TYPES["mxfp4_moe"],
}


def importances(path: Path) -> Any:
    """llama.cpp's table of importances: a float32 for each column of every weight, by its name in a .gguf."""
    kind, pointer = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
    found = {name: np.ascontiguousarray(each, dtype=np.float32) for name, each in load_file(path).items()}
    rows = [kind(name.encode(), each.ctypes.data_as(pointer), each.size) for name, each in found.items()]
    table = (kind * (len(rows) + 1))(*rows)  # ended by a nameless one
    table.kept = found  # the numbers live as long as what points to them
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("type", choices=sorted(TYPES), metavar="TYPE", help=" ".join(sorted(TYPES)))
    parser.add_argument("--pure", action="store_true", help="give every matrix the same block type")
    parser.add_argument("--importances", type=Path, help=".safetensors with a vector for each weight's name")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = TYPES[given.type], given.pure, given.threads
    if given.importances is not None:
        table = importances(given.importances)
        settings.imatrix = ctypes.cast(table, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    done = llama_cpp.llama_model_quantize(bytes(given.source), bytes(given.target), ctypes.byref(settings))
    if done != 0:
        raise SystemExit(f"llama.cpp did not make {given.target}; its message is above")


if __name__ == "__main__":
    main()
