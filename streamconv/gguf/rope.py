"""Rotary embeddings of a config as pairs of a GGUF header and as tensors of factors.

transformers 5 keeps them in `rope_parameters`, before it `rope_theta` and `rope_scaling` did; where layers differ, an
object for each kind of layer (`full_attention`, `sliding_attention`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.gguf_header import GgufValue, Pairs, f32, text, u32
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import F32
from streamconv.gguf.fields import Fields

_THETA = 10000.0
_EXACT = (
    "llama.cpp rounds the bounds between fast and slow rotations of yarn to whole dimensions, which this model does"
    " not: its logits will differ a little from those of transformers, as they do with llama.cpp's own converter"
)


Known = tuple[TensorSpec, bytes]
"""A tensor whose bytes are known from the config."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Pairs without the architecture before their keys, and tensors that stand beside the weights.

    `notes` are sentences on what llama.cpp computes a little otherwise, for people.
    """

    pairs: Pairs
    tensors: tuple[Known, ...] = ()
    notes: tuple[str, ...] = ()


def rope_fields(config: Fields, kind: str = "full_attention") -> Fields:
    """The parameters of layers of a kind; the same of all, where a config does not tell them apart."""
    found = config.inner("rope_parameters") or config.inner("rope_scaling")
    if found is None:
        return Fields(config.where, {}, "rope_parameters.")
    return found.inner(kind) or found


def theta(config: Fields, rope: Fields) -> float:
    return rope.number("rope_theta", config.number("rope_theta", _THETA))


def rotary(config: Fields, dimensions: int, *, has_factors: bool) -> Rotary:
    """Rotary embedding of `dimensions` of a head. `has_factors`: the architecture's loader reads `rope_freqs`.

    Raises UnsupportedError for a kind that llama.cpp does not compute.
    """
    rope = rope_fields(config)
    pairs = {"rope.freq_base": f32(theta(config, rope))}
    name = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.text(name, "default").lower()
    if kind == "default":
        return Rotary(pairs)
    if kind == "linear":
        return Rotary(
            pairs | {"rope.scaling.type": text("linear"), "rope.scaling.factor": f32(rope.number("factor"))}
        )
    if kind == "yarn":
        notes = () if rope.values.get("truncate", True) is not False else (_EXACT,)
        return Rotary(pairs | _yarn(config, rope), notes=notes)
    if kind == "llama3" and has_factors:
        factors = _llama3(config, rope, theta(config, rope), dimensions)
        return Rotary(pairs, (_tensor("rope_freqs.weight", factors),))
    raise rope.refuse(name, "llama.cpp does not compute such rotary embeddings for this architecture")


def long_rotary(config: Fields, dimensions: int, before: int) -> Rotary:
    """Rotary embedding of Phi-3: by default as others', or with factors for contexts up to `before` and for longer."""
    rope = rope_fields(config)
    name = "rope_type" if rope.has("rope_type") else "type"
    if rope.text(name, "default").lower() not in ("longrope", "su"):
        return rotary(config, dimensions, has_factors=False)
    longer, shorter = rope.numbers("long_factor"), rope.numbers("short_factor")
    if not len(longer) == len(shorter) == dimensions // 2:
        raise rope.refuse(name, f"it must have {dimensions // 2} factors for the dimensions of a head")
    scale = config.positive("max_position_embeddings") / before
    factor = math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0
    if rope.has("attention_factor"):
        factor = rope.number("attention_factor")
    pairs = {
        "rope.freq_base": f32(theta(config, rope)),
        "rope.scaling.type": text("longrope"),
        "rope.scaling.attn_factor": f32(factor),
    }
    tensors = (_tensor("rope_factors_long.weight", longer), _tensor("rope_factors_short.weight", shorter))
    return Rotary(pairs, tensors)


def _yarn(config: Fields, rope: Fields) -> dict[str, GgufValue]:
    factor = rope.number("factor")
    before = rope.positive("original_max_position_embeddings", config.positive("max_position_embeddings"))
    pairs = {
        "rope.scaling.type": text("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(before),
    }
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        if rope.has(name) and (
            name != "attention_factor" or not math.isclose(rope.number(name), usual, rel_tol=1e-4)
        ):
            raise rope.refuse(name, "llama.cpp takes the factor of attention from that of the context")
    for name in ("beta_fast", "beta_slow"):
        if rope.has(name):
            pairs[f"rope.scaling.yarn_{name}"] = f32(rope.number(name))
    return pairs


def _llama3(config: Fields, rope: Fields, base: float, dimensions: int) -> list[float]:
    """Divisors of frequencies: 1 for fast ones, `factor` for slow ones, between them a blend.

    transformers' `_compute_llama3_parameters` (`modeling_rope_utils.py`).
    """
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    before = rope.positive(
        "original_max_position_embeddings", config.positive("original_max_position_embeddings", 8192)
    )
    if not 0 < low < high or factor <= 0:
        raise rope.refuse(
            "low_freq_factor", "it must be above 0 and less than high_freq_factor, the factor above 0"
        )
    return llama3_factors(factor, low, high, before, base, dimensions)


def llama3_factors(
    factor: float, low: float, high: float, before: int, base: float, dimensions: int
) -> list[float]:
    """Divisors of frequencies, one for every two of a head's dimensions; `before`: positions that were trained."""
    found = []
    for place in range(0, dimensions, 2):
        turns = before * base ** (-place / dimensions) / (2 * math.pi)  # in the context that was trained
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - share) / factor + share))
    return found


def _tensor(name: str, values: Sequence[float]) -> Known:
    return TensorSpec(name, F32, (len(values),)), struct.pack(f"<{len(values)}f", *values)
