"""One walk through a saved model, and what transformers computes of the same tokens at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from streamconv.forward.skeleton import build_skeleton
from streamconv.forward.walk import Walk
from streamconv.forward.weights import WeightSource
from streamconv.pipeline import build_job, prepare
from streamconv.planning.devices import Device, resolve_device
from tests.tiny import VOCABULARY

WINDOWS = torch.arange(3 * 24).reshape(3, 24) * 7 % VOCABULARY
# Two batches of two lengths.
BATCH = 2
ON_CPU = resolve_device("cpu")


@contextmanager
def opened(folder: Path, read: list[int] | None = None, device: Device = ON_CPU) -> Iterator[Walk]:
    prepared = prepare(build_job(folder, quant="none", dtype="float32"))
    config = prepared.base.index.config
    counts = [] if read is None else read
    with WeightSource(prepared.plan, device, counts.append) as source:
        yield Walk(build_skeleton(config, str(folder), torch.float32), source, device)


def walked(walk: Walk, windows: Tensor = WINDOWS, height: int = 4096) -> Tensor:
    """Logits of all windows."""
    states = torch.empty(*windows.shape, walk.hidden)
    walk.run(windows, states, BATCH)
    found = torch.full((*windows.shape, walk.vocabulary), torch.nan)
    for rows, sequences, logits in walk.logits(windows, states, BATCH, height):
        found[sequences, :, rows.start : rows.stop] = logits
    return found


def at_once(folder: Path, windows: Tensor = WINDOWS) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(windows, use_cache=False).logits
    return found
