"""What the tests of several methods do with an adapter: refusals, other bases, what is held, what is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from torch.profiler import ProfilerActivity, profile

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.adapters.base import Adapter as Found
from streamconv.adapters.base import Update
from streamconv.checkpoint.reader import TensorReader
from tests.adapters.methods import CONFIG
from tests.parity.opening import relative_difference, tensors
from tests.tiny import edit_json, load_base, save_adapter


def merge_on_other_bases(folder: Path, base: Path, config: PeftConfig) -> None:
    """A base in bfloat16 gives PEFT's float32 merge, rounded once; one in nf4 what its own values give.

    `base` is float32; what its merge is, `merge_as_peft` compares with PEFT.
    """
    streamconv.convert(base, folder / "bf16", dtype="bfloat16")
    streamconv.convert(base, folder / "nf4", quant="nf4")
    streamconv.convert(folder / "nf4", folder / "of-nf4", quant="none", dtype="float32")
    for name, dense in (("bf16", folder / "bf16"), ("nf4", folder / "of-nf4")):
        wide = folder / f"{name}-wide"
        load_base(dense).float().save_pretrained(wide)
        adapter = save_adapter(folder / f"{name}-adapter", wide, config)
        expected = adapter.live.merge_and_unload().state_dict()
        out = folder / f"{name}-out"
        quant, dtype = ("keep", "auto") if name == "bf16" else ("none", "float32")
        streamconv.merge(folder / name, adapter.path, out, quant=quant, dtype=dtype)
        bound = 2.0**-8 if name == "bf16" else 1e-5
        for key, tensor in tensors(out).items():
            assert relative_difference(tensor.float(), expected[key]) < bound, (name, key)


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def check_fields(base: Path, adapter: Path, config: type[PeftConfig], error: type[Exception]) -> None:
    """Every field that PEFT's config has is known, and another one is refused."""
    peft_type = config().peft_type.value
    assert {field.name for field in dataclasses.fields(config)} <= set(ADAPTERS[peft_type].fields)
    edit_json(adapter / CONFIG, use_another=True)
    refuse(base, adapter, error, "the field 'use_another'")


def held(found: Found) -> list[tuple[Update, int]]:
    """Every update with the most bytes that were held at once while it was prepared."""
    with TensorReader() as reader:
        return [
            (
                update,
                _peak_bytes(update, {role: reader.load(part).float() for role, part in update.parts.items()}),
            )
            for update in found.updates
        ]


def _peak_bytes(update: Update, parts: dict[str, torch.Tensor]) -> int:
    return peak_bytes(lambda: update.prepare(parts, torch.device("cpu")))


def peak_bytes(work: Callable[[], object]) -> int:
    """Greatest sum of allocations, less what was given back, of all operations in `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    del kept
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
