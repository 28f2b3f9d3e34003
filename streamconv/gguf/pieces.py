"""Weights of gpt-oss taken apart: its checkpoints have gate and up interleaved, all experts in one parameter [in, out].

    mlp.experts.gate_up_proj        [experts, in, 2 · inner]: columns 0, 2, ... are gate's, 1, 3, ... up's
    mlp.experts.gate_up_proj_bias   [experts, 2 · inner], alike
    mlp.experts.down_proj           [experts, inner, in]; down_proj_bias [experts, in]
    self_attn.sinks                 [heads]

GGUF files have them as [experts, out, in], one tensor each (`conversion/gpt_oss.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from streamconv.checkpoint.types import Shape

_EXPERTS = re.compile(r"(?P<module>.*\.mlp\.experts)\.(?P<part>gate_up|down)_proj(?P<bias>_bias)?")


@dataclass(frozen=True, slots=True)
class GgufPiece:
    """A part of a weight that is a part of a tensor: `name` as other models call such, `shape` as it is stored.

    `expert`: of those in the weight, None for all. `columns` are the weight's that it has. `is_turned`: rows of what is
    stored are columns of the weight, and turned as they are written. `stays`: in blocks that a GGUF file has, too, and
    nothing changes it.
    """

    name: str
    shape: Shape
    expert: int | None
    columns: range
    is_turned: bool
    stays: bool = False


_APART = re.compile(r"(?P<module>.*\.mlp\.experts)\.(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)")


@dataclass(frozen=True, slots=True)
class Whole:
    """Name of a weight of gpt-oss that a tensor is a part of. `is_up`: the second of two whose columns take turns."""

    name: str
    is_experts: bool = False
    is_paired: bool = False
    is_up: bool = False


def whole_of(name: str) -> Whole:
    """The weight that has the piece `name`, of all experts: `pieces_of` the other way."""
    found = _APART.fullmatch(name)
    if found is None:
        return Whole(name.removesuffix(".weight") if name.endswith(".sinks.weight") else name)
    is_down = found["part"] == "down"
    bias = "_bias" if found["kind"] == "bias" else ""
    whole = f"{found['module']}.{'down' if is_down else 'gate_up'}_proj{bias}"
    return Whole(whole, is_experts=not bias, is_paired=not is_down, is_up=found["part"] == "up")


def pieces_of(name: str, shape: Shape) -> Iterator[GgufPiece]:
    """Pieces of a weight of gpt-oss that is stored otherwise; none for one that is stored as it is."""
    if name.endswith(".self_attn.sinks"):
        yield GgufPiece(f"{name}.weight", shape, None, range(shape[-1]), is_turned=False)
    found = _EXPERTS.fullmatch(name)
    if found is None or len(shape) != (2 if found["bias"] else 3):
        return
    width = shape[-1]
    parts = {"down": range(width)}
    if found["part"] == "gate_up":
        parts = {"gate": range(0, width, 2), "up": range(1, width, 2)}
    for part, columns in parts.items():
        if found["bias"]:
            yield GgufPiece(
                f"{found['module']}.{part}_proj.bias",
                (shape[0], len(columns)),
                None,
                columns,
                is_turned=False,
            )
            continue
        for expert in range(shape[0]):
            called = f"{found['module']}.{expert}.{part}_proj.weight"
            yield GgufPiece(called, (len(columns), shape[1]), expert, columns, is_turned=True)
