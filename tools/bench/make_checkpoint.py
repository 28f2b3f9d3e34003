"""A checkpoint of any size with the layer widths of a real model, normal values, and a LoRA adapter for it.

Seeded, and written as fast as the disk takes it: all weights are cut from one block of 64 MiB of random values, no
two pieces from the same place, so that a file system finds no hole to skip and no page to share. Memory stays at two
such blocks, whatever the size.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from peft import LoraConfig

from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16, F32, Dtype
from streamconv.sizes import parse_size
from tools.bench.models import MODELS, WEIGHT_STD, Model, total_bytes

SHARD = "model-{:05d}-of-{:05d}.safetensors"
PIECE = 2**25  # elements
PLACES = 2**16  # where a piece may begin in the block


def make(out: Path, model: Model, max_shard_bytes: int, rank: int, seed: int) -> None:
    """Write `adapter` and `base` into the folder `out`; `base` appears last, and only when complete."""
    for unfinished in (out / "adapter", out / "base.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    write_adapter(out / "adapter", model, rank, seed + 1)
    write_checkpoint(out / "base.partial", model, max_shard_bytes, seed)
    (out / "base.partial").rename(out / "base")


def write_checkpoint(out: Path, model: Model, max_shard_bytes: int, seed: int) -> None:
    """Write config, shards and index to the new folder `out`."""
    random = torch.Generator().manual_seed(seed)
    block = torch.empty(PIECE + PLACES).normal_(0, WEIGHT_STD, generator=random).to(BF16.torch)
    places = count()
    for name, shard in start_checkpoint(out, model, max_shard_bytes):
        with (out / name).open("wb") as file:
            file.write(build_header(shard, {"format": "pt"}))
            for tensor in shard:
                for piece in _pieces(tensor, block, places):
                    file.write(piece.view(torch.uint8).numpy().data)


def start_checkpoint(out: Path, model: Model, max_shard_bytes: int) -> list[tuple[str, list[TensorSpec]]]:
    """Write config and index to the new folder `out`; return its shards, by name, for the caller to write."""
    out.mkdir(parents=True)
    tensors = model.tensors
    shards = list(split(tensors, max_shard_bytes))
    named = [(SHARD.format(number, len(shards)), shard) for number, shard in enumerate(shards, start=1)]
    weight_map = {tensor.name: name for name, shard in named for tensor in shard}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    (out / "config.json").write_text(json.dumps(model.config, indent=2))
    return named


def split(tensors: Sequence[TensorSpec], max_bytes: int) -> Iterator[list[TensorSpec]]:
    """Yield runs of `tensors` of at most `max_bytes`, a single larger tensor alone."""
    shard: list[TensorSpec] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _pieces(tensor: TensorSpec, block: torch.Tensor, places: Iterator[int]) -> Iterator[torch.Tensor]:
    """The values of `tensor`; those of a norm lie about 1."""
    elements = tensor.nbytes // BF16.itemsize
    for start in range(0, elements, PIECE):
        place = next(places) % PLACES
        piece = block[place : place + min(PIECE, elements - start)]
        yield piece + 1 if len(tensor.shape) == 1 else piece


def write_adapter(out: Path, model: Model, rank: int, seed: int, dtype: Dtype = F32) -> None:
    """Write a LoRA adapter on all linear layers, as PEFT would, with no zero in it, to the new folder `out`."""
    out.mkdir(parents=True)
    specs, scales = [], []
    for layer in range(model.layers):
        for name, (rows, columns) in model.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            specs.append(TensorSpec(f"{prefix}.lora_A.weight", dtype, (rank, columns)))
            specs.append(TensorSpec(f"{prefix}.lora_B.weight", dtype, (rows, rank)))
            scales += [columns**-0.5, WEIGHT_STD]
    random = torch.Generator().manual_seed(seed)
    longest = max(math.prod(spec.shape) for spec in specs)
    block = torch.empty(longest + PLACES).normal_(generator=random)
    with (out / "adapter_model.safetensors").open("wb") as file:
        file.write(build_header(specs, {"format": "pt"}))
        for number, (spec, scale) in enumerate(zip(specs, scales, strict=True)):
            place = number % PLACES
            values = (block[place : place + math.prod(spec.shape)] * scale).to(dtype.torch)
            file.write(values.view(torch.uint8).numpy().data)
    modules = sorted({name.rpartition(".")[2] for name in model.linears})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    config.inference_mode = True  # as PEFT stores it
    config.save_pretrained(out)


def check_disk(folder: Path, needed: int) -> None:
    """End the program if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(
            f"{folder} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose a smaller size"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/make_checkpoint", description=__doc__)
    parser.add_argument("out", type=Path, help="new folder; gets base/ and adapter/")
    parser.add_argument("--model", choices=MODELS, default="llama-8b", help="whose widths; default llama-8b")
    parser.add_argument("--size", type=parse_size, default=parse_size("6GB"), help="rounded to whole layers")
    parser.add_argument("--max-shard-size", type=parse_size, default=parse_size("5GB"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model = MODELS[options.model].of_size(options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "base").exists():
        parser.error(f"{options.out / 'base'} is already there; remove it or name another folder")
    check_disk(options.out, model.nbytes)
    make(options.out, model, options.max_shard_size, options.rank, options.seed)
    print(
        f"{options.out}: {model.layers} layers, {model.nbytes / 1e9:.2f} GB, adapter of rank {options.rank}"
    )


if __name__ == "__main__":
    main()
