"""Fingerprint by which two runs are the same run: all that can change a byte of the output, and nothing else."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from streamconv.adapters.base import Adapter
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.planning.devices import Device
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import CalibrationPlan, Choice, ShardPlan
from streamconv.storage.base import Origin


def fingerprint(
    index: CheckpointIndex,
    adapter: Adapter | None,
    options: MergeOptions,
    rounding: Choice | None,
    calibration: CalibrationPlan | None,
    device: Device,
    shards: Sequence[ShardPlan],
) -> Mapping[str, Any]:
    """Plain data that prints as JSON. Budgets, tile sizes and paths are not in it: they change no byte."""
    return {
        "streamconv": version("streamconv"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": device.model,
        # Of a GPU alone, so that what was made on a CPU before this was noted is still known.
        **({} if device.is_cpu else {"float32": "ieee"}),
        "base": {
            shard.file.name: {
                "size": shard.file.size,
                "header": shard.header_sha256,
                "version": shard.file.version,
            }
            for shard in index.shards
        },
        # It says which weights are tied, transposed, or never quantized.
        "config": hashlib.sha256(json.dumps(dict(index.config), sort_keys=True).encode()).hexdigest(),
        "adapter": adapter.sha256 if adapter else None,
        # They stand in the output's card.
        "from": {
            "base": _commit(index.storage.origin),
            "adapter": _commits(adapter) if adapter else None,
        },
        # Rounding as it was chosen: what `auto` comes to may differ from version to version.
        "options": {**options.as_json(), "rounding": rounding.name if rounding else None},
        "calibration": calibration.as_json() if calibration else None,
        # Headers hold every output tensor's name, type, shape and place.
        "output": digests(shards),
    }


def digests(shards: Sequence[ShardPlan]) -> dict[str, str]:
    """SHA-256 of the header of each file."""
    return {shard.name: hashlib.sha256(shard.header).hexdigest() for shard in shards}


def _commits(adapter: Adapter) -> str | list[str | None] | None:
    """Commit of an adapter, or those of several."""
    if len(adapter.members) < 2:
        return _commit(adapter.origin)
    return [_commit(member.origin) for member in adapter.members]


def _commit(origin: Origin | None) -> str | None:
    return f"{origin.repo}@{origin.commit}" if origin else None
