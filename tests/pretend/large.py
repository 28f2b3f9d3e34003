"""Calibration of one decoder layer on the pretend GPU at the shapes of large models, of which it has no values.

Bytes on the device are those of the package's own calls in their own order, beside what its plan says. Weights are a
file of holes. A batch of text is enough: further ones take the same memory. Of a weight's columns, the first and the
last are gone through: what all take, they take in turn.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from streamconv.calibration import layers, moments, need
from streamconv.kernels import TORCH, Kernels
from streamconv.kernels.in_torch import TorchKernels
from streamconv.pipeline import Job, prepare
from streamconv.planning import calibration as planning
from streamconv.planning.options import Calibration, MergeOptions
from streamconv.progress import StopRequest
from streamconv.rounding import columns, layer, metric, scales
from streamconv.rounding.layer import Layer
from tests.forward.texts import save_tokenizer, write_text
from tests.models import write_adapter
from tests.pretend.backward import walked_backward
from tests.pretend.device import CUDA, without_values
from tests.pretend.found import Found, noted, start
from tests.tiny import VOCABULARY

LENGTH = 2048


@dataclass(frozen=True)
class Shapes:
    """Widths of a model of Llama's kind."""

    name: str
    hidden: int
    inner: int
    heads: int
    groups: int

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        layer, narrow = "model.layers.0", self.hidden // self.heads * self.groups
        square, outward = (self.hidden, self.hidden), (self.inner, self.hidden)
        return {
            "model.embed_tokens.weight": (VOCABULARY, self.hidden),
            f"{layer}.input_layernorm.weight": (self.hidden,),
            f"{layer}.self_attn.q_proj.weight": square,
            f"{layer}.self_attn.k_proj.weight": (narrow, self.hidden),
            f"{layer}.self_attn.v_proj.weight": (narrow, self.hidden),
            f"{layer}.self_attn.o_proj.weight": square,
            f"{layer}.mlp.gate_proj.weight": outward,
            f"{layer}.mlp.up_proj.weight": outward,
            f"{layer}.mlp.down_proj.weight": outward[::-1],
            f"{layer}.post_attention_layernorm.weight": (self.hidden,),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (VOCABULARY, self.hidden),
        }


LLAMA_70B = Shapes("Llama-3-70B", 8192, 28672, 64, 8)
NARROW = Shapes("a layer of 2048 by 7168", 2048, 7168, 16, 4)


@dataclass(frozen=True)
class LargeKind:
    shapes: Shapes
    quant: str
    sides: int
    residual_rank: int = 0
    length: int = LENGTH

    @property
    def name(self) -> str:
        more = f", residual {self.residual_rank}" if self.residual_rank else ""
        more += f", sequences of {self.length}" if self.length != LENGTH else ""
        sides = ("one side", "both sides")[self.sides - 1]
        return f"{self.shapes.name} calibrated to {self.quant} on {sides}{more}, full cells"


# With short sequences, what choosing takes is more than what the layer itself does.
SHORT_LARGE = (LargeKind(NARROW, "nf4-dq", 1, length=512),)
ALL_LARGE = (
    *SHORT_LARGE,
    *(
        LargeKind(NARROW, quant, sides)
        for quant in ("nf4-dq", "w4a16", "awq-asym", "fp8", "mlx4")
        for sides in (1, 2)
    ),
    *(LargeKind(LLAMA_70B, quant, 1) for quant in ("nf4-dq", "w4a16", "awq-asym", "fp8")),
    LargeKind(LLAMA_70B, "nf4-dq", 2),
)


def write_holes(folder: Path, shapes: Shapes) -> Path:
    """A base in bfloat16 whose weights are a hole in its file."""
    folder.mkdir()
    header, end = {}, 0
    for name, shape in shapes.weights.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    packed = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.truncate(8 + len(packed) + end)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.groups,
        "max_position_embeddings": LENGTH,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return folder


def calibrated_layer(kind: LargeKind, folder: Path) -> Found:
    """Bytes on the device beside the plan's."""
    name = kind.shapes.name
    base = folder / f"base of {name}"
    if not base.exists():
        write_holes(base, kind.shapes)
        write_adapter(folder / f"adapter of {name}", kind.shapes.weights, targets=("q_proj",), rank=8)
        write_text(folder / "large.txt", 4 * LENGTH)
    calibration = Calibration(
        str(folder / "large.txt"),
        tokens=LENGTH,
        sequence_length=kind.length,
        gradient_tokens=LENGTH * (kind.sides - 1),
        residual_rank=kind.residual_rank,
    )
    options = MergeOptions(
        quant=kind.quant, min_kept=0.0, calibration=calibration, max_ram_bytes=2**37, max_vram_bytes=2**37
    )
    with _few_columns():
        prepared = prepare(Job(str(base), str(folder / f"adapter of {name}"), options, "cuda"))
        planned = need.calibrating_need(prepared.subject).vram
        for step in prepared.plan.calibrated:  # what is looked up in tables has values
            assert step.encoder.grid is not None
            step.encoder.grid.prepare(CUDA)
        place = folder / "calibration"
        place.mkdir(exist_ok=True)
        start()
        with without_values(), walked_backward():
            layers.calibrate(prepared.subject, place, lambda nbytes: None, StopRequest())
    for each in place.iterdir():
        each.unlink()
    found = noted(Found(kind.name, same=True))
    found.planned = planned
    return found


@contextmanager
def _few_columns() -> Iterator[None]:
    """Have weights of any width be chosen from one batch, and go through the first and last of their parts alone."""
    panels = layer.panels

    def outermost(each: Layer) -> list[slice]:
        found = panels(each)
        return [found[0], *found[1:][-1:]]

    with ExitStack() as patches:
        for module, name, value in (
            (planning, "TOKENS_AN_INPUT", 1e-6),
            (moments, "TOKENS_AN_INPUT", 1e-6),
            (layer, "panels", outermost),
            (columns, "panels", outermost),
            (columns, "PANEL", 1024),
            (
                columns,
                "kernels_for",
                _settling_nothing,
            ),  # compiled loops on the host have room for a panel alone
            (scales, "shared", _first_shared),
            (TorchKernels, "quantize_columns", _settle_nothing),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield


def _first_shared(each: Layer, work: Callable[[slice], Tensor], most: int = 4096) -> list[Tensor]:
    """Results for all rows, of which only the first are worked out; others are as large."""
    first, *rest = metric.stretches(each.rows, min(most, 4096))
    found = work(first)
    size = len(found) // (first.stop - first.start)
    return [found, *(found.new_empty(size * (one.stop - one.start), *found.shape[1:]) for one in rest)]


def _settling_nothing(device: torch.device) -> Kernels:
    del device
    return TORCH


def _settle_nothing(*given: object) -> None:
    """Stand in for what keeps no memory; a mock would keep what it was given."""
