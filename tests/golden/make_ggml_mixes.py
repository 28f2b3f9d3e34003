"""Make tests/golden/ggml/mixes.json: types that llama.cpp's quantizer gives tensors of tiny models; see README.md.

python tests/golden/make_ggml_mixes.py tests/golden
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FILE_TYPES = {
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}


@dataclass(frozen=True)
class Case:
    architecture: str
    layers: int
    columns: int = 256
    experts: int = 0
    is_tied: bool = False
    key_heads: int = 2
    is_fused: bool = False
    without_values: tuple[int, ...] = ()
    is_short: bool = False  # values alone

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        matrix = (2, self.columns)
        yield "token_embd.weight", matrix
        yield "output_norm.weight", (self.columns,)
        if not self.is_tied:
            yield "output.weight", matrix
        for layer in range(self.layers):
            if self.is_short:
                yield f"blk.{layer}.attn_v.weight", matrix
                continue
            yield f"blk.{layer}.attn_norm.weight", (self.columns,)
            yield from self._attention(f"blk.{layer}.", layer)
            stacked = (2, *matrix) if self.experts else matrix
            end = "_exps" if self.experts else ""
            for part in ("gate", "up", "down"):
                yield f"blk.{layer}.ffn_{part}{end}.weight", stacked
            if self.experts:
                yield f"blk.{layer}.ffn_gate_inp.weight", matrix
                yield f"blk.{layer}.ffn_down_shexp.weight", matrix

    def _attention(self, start: str, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        matrix = (2, self.columns)
        if self.is_fused:
            yield f"{start}attn_qkv.weight", matrix
        else:
            yield f"{start}attn_q.weight", matrix
            if layer not in self.without_values:
                yield f"{start}attn_k.weight", matrix
                yield f"{start}attn_v.weight", matrix
        yield f"{start}attn_output.weight", matrix


CASES = {
    "llama, 13 layers": Case("llama", 13),
    "tied": Case("llama", 5, is_tied=True),
    "rows of 576": Case("llama", 9, columns=576, is_tied=True),
    "rows of 48": Case("llama", 2, columns=48),
    "70B": Case("llama", 80, is_short=True),
    "65B": Case("llama", 80, key_heads=4, is_short=True),
    "qwen2, 80 layers": Case("qwen2", 80, is_short=True),
    "8 experts": Case("llama", 16, experts=8),
    "4 experts": Case("qwen3moe", 16, experts=4),
    "fused": Case("phi3", 16, is_fused=True),
    "values in some layers": Case("llama", 16, without_values=(1, 2, 7, 15)),
}


def write_model(case: Case, path: Path) -> None:
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_block_count(case.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(case.columns)
    writer.add_feed_forward_length(case.columns)
    writer.add_head_count(4)
    writer.add_head_count_kv(case.key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if case.experts:
        writer.add_expert_count(case.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(case.columns)
    for name, shape in case.tensors():
        writer.add_tensor(name, np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_by(file_type: int, source: Path, out: Path) -> Mapping[str, str]:
    given = llama_cpp.llama_model_quantize_default_params()
    given.ftype, given.nthread = file_type, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), given) == 0
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(out).tensors}


def recorded(case: Case, folder: Path) -> Mapping[str, object]:
    """A letter a tensor, in the order of their names; `types` are what the letters stand for."""
    names = sorted(name for name, _ in case.tensors())
    types: list[str] = []
    mixes = {}
    for mix, number in FILE_TYPES.items():
        found = types_by(number, folder / "model.gguf", folder / "out.gguf")
        types.extend(sorted({*found.values()} - {*types}))
        mixes[mix] = "".join(chr(ord("a") + types.index(found[name])) for name in names)
    return {"types": types, "mixes": mixes}


def facts(case: Case) -> Mapping[str, object]:
    """What the types depend on; `axes` by name, which is without the layer for those that layers have."""
    axes = {name.split(".", 2)[-1] if "blk." in name else name: len(shape) for name, shape in case.tensors()}
    named = ("architecture", "layers", "experts", "columns", "key_heads", "without_values")
    return {**{name: getattr(case, name) for name in named}, "axes": axes}


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, case in CASES.items():
            write_model(case, folder / "model.gguf")
            lines.append(f"{json.dumps(title)}: {json.dumps({**facts(case), **recorded(case, folder)})}")
    made_with = {package: version(package) for package in ("gguf", "llama_cpp_python")}
    cases = ",\n".join(lines)
    out = Path(sys.argv[1]) / "ggml" / "mixes.json"
    out.write_text(f'{{"made_with": {json.dumps(made_with)}, "cases": {{\n{cases}\n}}}}\n')


if __name__ == "__main__":
    main()
