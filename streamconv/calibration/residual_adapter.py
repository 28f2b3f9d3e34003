"""The residual adapter as PEFT reads it: two files in a folder of their own beside the weights.

In the folder of the weights themselves, transformers would load it unasked. Names of tensors and keys of the config
are those of PEFT (`peft/utils/save_and_load.py`, `peft/tuners/lora/config.py`); lora_alpha is r, so that B A counts as
it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamconv.adapters.source import PREFIX
from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import StoredTensor, TensorSpec
from streamconv.checkpoint.writer import ShardWriter, remove_file
from streamconv.rounding.residual import Residual

_CHUNK_BYTES = 8 * 2**20
_A, _B = ".lora_A.weight", ".lora_B.weight"


def factor_tensors(module: str, found: Residual) -> Mapping[str, Tensor]:
    """The factors for the linear layer at the path `module`, in host memory, under PEFT's names."""
    return {
        f"{PREFIX}{module}{_A}": found.down.cpu(),
        f"{PREFIX}{module}{_B}": found.up.cpu(),
    }


def removed_share(notes: Iterable[Mapping[str, float]]) -> float | None:
    """Share of the loss of all calibrated weights that the adapter removes; None where there is none."""
    pairs = [(each["loss"], each["repaired_loss"]) for each in notes if "loss" in each]
    before = sum(loss for loss, _ in pairs)
    return 1 - sum(loss for _, loss in pairs) / before if before else None


def adapter_config(rank: int, tensors: Iterable[str]) -> bytes:
    """Content of adapter_config.json for tensors of these names; of weights without any it says nothing."""
    modules = sorted(name.removeprefix(PREFIX).removesuffix(_A) for name in tensors if name.endswith(_A))
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        # Whole paths: what was not calibrated has no factors, and may end in the same name.
        "target_modules": modules,
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def write_adapter(path: Path, tensors: Iterable[StoredTensor]) -> str:
    """Write adapter_model.safetensors to `path`, anew, in chunks; its SHA-256. Durable when this returns."""
    stored = sorted(tensors, key=lambda tensor: tensor.name)
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in stored]
    header = build_header(specs, {"format": "pt"})
    remove_file(path)
    size = len(header) + sum(spec.nbytes for spec in specs)
    chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
    with TensorReader() as reader, ShardWriter.create(path, header, size) as writer:
        for tensor in stored:
            for start in range(0, tensor.nbytes, _CHUNK_BYTES):
                length = min(_CHUNK_BYTES, tensor.nbytes - start)
                reader.read_into(tensor, start, tensor_bytes(chunk[:length]))
                writer.write(tensor_bytes(chunk[:length]))
        return writer.finish()
