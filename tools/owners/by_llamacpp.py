"""llama.cpp's own quantizer, without importances, of a Llama's weights; see tools/owners/asked.py.

WEIGHTS are all tensors of the model, by transformers' names. They are written to a .gguf file in float32 with the
metadata of the template, quantized by llama.cpp, and decoded by gguf-py. Embeddings and the head get the types that
they have in the template.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from tools.owners.asked import Asked, Matrix, answer, questions
from tools.readers.quantize_gguf import TYPES

BLOCK_TYPES = ("q4_k", "q5_k")  # others of these names are mixes
TURNED = ("attn_q.weight", "attn_k.weight")
DENSE = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
STRUCTURE = ("GGUF.", "general.file_type", "general.quantization_version")


def answer_to(given: Asked) -> None:
    assert given.template is not None, "--template says what the file holds beside weights"
    template = gguf.GGUFReader(given.template)
    names = names_in_gguf(given, template)
    with tempfile.TemporaryDirectory(dir=given.out.parent) as folder:
        source, target = Path(folder) / "source.gguf", Path(folder) / "target.gguf"
        write(source, template, {names[name]: each for name, each in given.weights.items()})
        quantize(source, target, given.format.removeprefix("gguf:"), template)
        stored = {each.name: each for each in gguf.GGUFReader(target).tensors}
        others = {each.name: each.tensor_type for each in template.tensors}
        differ = [name for name, each in stored.items() if each.tensor_type != others.get(name)]
        values, taken = {}, 0
        for name, each in names.items():
            tensor = stored[each]
            dense = gguf.dequantize(tensor.data, tensor.tensor_type)
            values[name] = turned_back(dense, heads(template, each)) if each.endswith(TURNED) else dense
            taken += tensor.n_bytes if tensor.tensor_type not in DENSE else 0
        said = {name: f"{stored[name].tensor_type.name}, not {others[name].name}" for name in differ}
        print(json.dumps(said), file=sys.stderr)
        answer(given, ("llama-cpp-python", "gguf"), values, taken)


def names_in_gguf(given: Asked, template: gguf.GGUFReader) -> dict[str, str]:
    """Name in the file of every weight."""
    layers = int(template.fields["llama.block_count"].contents())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in given.weights}
    return {name: each for name, each in found.items() if each is not None}


def write(path: Path, template: gguf.GGUFReader, weights: dict[str, Matrix]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for field in template.fields.values():
        if not field.name.startswith(STRUCTURE) and field.name != gguf.Keys.General.ARCHITECTURE:
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    for name, weight in weights.items():
        writer.add_tensor(name, turned(weight, heads(template, name)) if name.endswith(TURNED) else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def heads(template: gguf.GGUFReader, name: str) -> int:
    of_keys = "_kv" if "attn_k" in name else ""
    return int(template.fields[f"llama.attention.head_count{of_keys}"].contents())


def turned(weight: Matrix, count: int) -> Matrix:
    """Rows of each head in llama.cpp's order of rotations: both halves of a pair beside each other."""
    shape = (count, 2, weight.shape[0] // count // 2, weight.shape[1])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


def turned_back(weight: Any, count: int) -> Any:
    shape = (count, weight.shape[0] // count // 2, 2, weight.shape[1])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


def quantize(source: Path, target: Path, kind: str, template: gguf.GGUFReader) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = TYPES[kind], 1
    settings.pure = kind in BLOCK_TYPES
    types = {each.name: int(each.tensor_type) for each in template.tensors}
    settings.token_embedding_type = types["token_embd.weight"]
    if "output.weight" in types:
        settings.output_tensor_type = types["output.weight"]
    done = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings))
    if done != 0:
        raise SystemExit(f"llama.cpp did not make {target}; its message is above")


if __name__ == "__main__":
    for each_question in questions(__doc__):
        answer_to(each_question)
