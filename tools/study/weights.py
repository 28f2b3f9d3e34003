"""What merging and rounding do to every adapted weight of a bed: sizes, shares, distributions. No forward pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import safetensors.torch
import transformers
from torch import Tensor

from tools.study import grid
from tools.study.grid import OnGrid

OUTLIER = 6.0  # root mean squares


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted weight [out, in] of a bed: the original W, its nf4-dq form and the adapter's update D."""

    name: str
    weight: Tensor
    base: OnGrid
    delta: Tensor

    @property
    def target(self) -> Tensor:
        return self.base.values + self.delta


def layers(base: Path, base_nf4: Path, adapter: Path) -> Iterator[Layer]:
    """Every adapted weight: `base` in 16 bit, `base_nf4` the same in nf4-dq, LoRA `adapter`."""
    stored, packed = read_tensors(base), codes_of(base_nf4)
    for name, delta in deltas(adapter):
        yield Layer(name, stored[f"{name}.weight"].float(), packed[name], delta)


def deltas(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Module names and D = alpha / r B A (float32) of a plain LoRA adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = read_tensors(adapter)
    for key in sorted(stored):
        if key.endswith("lora_A.weight"):
            A, B = stored[key].float(), stored[key.replace("lora_A", "lora_B")].float()
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            yield name, config["lora_alpha"] / config["r"] * (B @ A)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def codes_of(folder: Path) -> dict[str, OnGrid]:
    """Every 4-bit weight of a checkpoint by module name, as transformers and bitsandbytes open it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: grid.unpack(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def describe(layer: Layer) -> dict[str, Any]:
    """Sizes of one weight, what nearest rounding of T makes of it, and its distribution before and after."""
    base, target = layer.base, layer.target
    nearest = grid.quantize(target)
    still = grid.nearest_codes(target, base.scales)
    moved, moved_alone = nearest.codes != base.codes, still != base.codes
    before = base.scales.flatten()[:: grid.BLOCK]
    return {
        "name": layer.name,
        "elements": target.numel(),
        "ratio": grid.ratio(layer.delta, base),
        "delta_square": _norm(layer.delta) ** 2,
        "delta_kurtosis": shape(layer.delta)["kurtosis"] - 3,
        "delta_to_weight": _norm(layer.delta) / _norm(base.values),
        "error_to_delta": _norm(layer.weight - base.values) / _norm(layer.delta),
        "kept": grid.kept(nearest.values, base.values, layer.delta),
        "kept_on_fixed_scales": grid.kept(grid.VALUES[still.long()] * base.scales, base.values, layer.delta),
        "changed": _share(moved),
        "changed_on_fixed_scales": _share(moved_alone),
        "scale_moved": ((nearest.scales.flatten()[:: grid.BLOCK] - before).abs() / before).mean().item(),
        "clamped": _share(grid.is_clamped(target, base.scales)),
        "shape_before": shape(base.values),
        "shape_of_target": shape(target),
        "shape_after": shape(nearest.values),
    }


def shape(weight: Tensor) -> dict[str, float]:
    """Kurtosis (3 for a normal distribution), largest magnitude in root mean squares, share beyond OUTLIER of them."""
    values = weight.double().flatten()
    centred = values - values.mean()
    rms = values.square().mean().sqrt()
    return {
        "kurtosis": (centred.pow(4).mean() / centred.square().mean().square()).item(),
        "largest": (values.abs().max() / rms).item(),
        "outliers": _share(values.abs() > OUTLIER * rms),
    }


def compare(adapted: Mapping[str, Layer], out: Path, target: str) -> dict[str, Any]:
    """Of a finished nf4-dq output: codes that differ from the base's, and the kept delta of every adapted weight."""
    found = codes_of(out)
    changed = {name: _share(found[name].codes != layer.base.codes) for name, layer in adapted.items()}
    kept = {
        name: grid.kept(found[name].values, layer.base.values if target == "T" else layer.weight, layer.delta)
        for name, layer in adapted.items()
    }
    size = {name: layer.delta.numel() for name, layer in adapted.items()}
    square = {name: _norm(layer.delta) ** 2 for name, layer in adapted.items()}
    return {
        "changed": _weighted(changed, size),
        "kept": _weighted(kept, square),
        "kept_by_weight": kept,
    }


def _weighted(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(values[name] * weights[name] for name in values) / sum(weights.values())


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()
