"""A checkpoint of any size with the layer widths of Llama 3 8B, normal random values, and a LoRA adapter for it.

Dense and seeded: no holes that a file system could skip, the same bytes from the same seed and torch version.
Memory stays at a few blocks, whatever the size.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.dtypes import BF16
from streamconv.sizes import parse_size

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEY_VALUE_HEADS = 4096, 14336, 128256, 32, 8
KEY_VALUE = HIDDEN * KEY_VALUE_HEADS // HEADS
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
BLOCK_ELEMENTS = 2**24
WEIGHT_STD = 0.02  # LlamaConfig.initializer_range


def weights(layers: int) -> list[TensorSpec]:
    """Return every tensor of the model, in the order in which it uses them."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return [TensorSpec(name, BF16, shape) for name, shape in shapes.items()]


def layers_for(size: int) -> int:
    """Return how many layers make a checkpoint of about `size` bytes; at least one."""
    fixed = total_bytes(weights(0))
    return max(1, round((size - fixed) / (total_bytes(weights(1)) - fixed)))


def total_bytes(tensors: Sequence[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def make(out: Path, layers: int, max_shard_bytes: int, rank: int, seed: int) -> None:
    """Write `adapter` and `base` into the folder `out`; `base` appears last, and only when complete."""
    for unfinished in (out / "adapter", out / "base.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    write_adapter(out / "adapter", layers, rank, seed + 1)
    write_checkpoint(out / "base.partial", layers, max_shard_bytes, seed)
    (out / "base.partial").rename(out / "base")


def write_checkpoint(out: Path, layers: int, max_shard_bytes: int, seed: int) -> None:
    """Write config, shards and index to the new folder `out`."""
    out.mkdir(parents=True)
    tensors = weights(layers)
    shards = list(split(tensors, max_shard_bytes))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    random = torch.Generator().manual_seed(seed)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(out / name, shard, random)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    (out / "config.json").write_text(json.dumps(_config(layers), indent=2))


def split(tensors: Sequence[TensorSpec], max_bytes: int) -> Iterator[list[TensorSpec]]:
    """Yield runs of `tensors` of at most `max_bytes`, a single larger tensor alone."""
    shard: list[TensorSpec] = []
    for tensor in tensors:
        if shard and total_bytes(shard) + tensor.nbytes > max_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_adapter(out: Path, layers: int, rank: int, seed: int) -> None:
    """Write a LoRA adapter on all linear layers, as PEFT would, with no zero in it, to the new folder `out`."""
    out.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=random) * columns**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=random) * WEIGHT_STD
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [name.rpartition(".")[2] for name in LINEARS]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    config.inference_mode = True  # as PEFT stores it
    config.save_pretrained(out)


def _write_shard(path: Path, tensors: Sequence[TensorSpec], random: torch.Generator) -> None:
    normal = torch.empty(BLOCK_ELEMENTS)
    stored = torch.empty(BLOCK_ELEMENTS, dtype=BF16.torch)
    with path.open("wb") as file:
        file.write(build_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            elements = tensor.nbytes // BF16.itemsize
            mean = 1.0 if len(tensor.shape) == 1 else 0.0
            for start in range(0, elements, BLOCK_ELEMENTS):
                block = stored[: min(BLOCK_ELEMENTS, elements - start)]
                block.copy_(normal[: len(block)].normal_(mean, WEIGHT_STD, generator=random))
                file.write(block.view(torch.uint8).numpy().data)


def _config(layers: int) -> dict[str, object]:
    """Llama 3 8B's config.json, with `layers` layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/make_checkpoint", description=__doc__)
    parser.add_argument("out", type=Path, help="new folder; gets base/ and adapter/")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, help="decoder layers, 436 MB each, beside 2.1 GB of embeddings")
    size.add_argument("--size", type=parse_size, default=parse_size("6GB"), help="rounded to whole layers")
    parser.add_argument("--max-shard-size", type=parse_size, default=parse_size("5GB"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    layers = options.layers or layers_for(options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "base").exists():
        parser.error(f"{options.out / 'base'} is already there; remove it or name another folder")
    needed, free = total_bytes(weights(layers)), shutil.disk_usage(options.out).free
    if needed > free:
        parser.error(
            f"{options.out} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose a --size"
        )
    make(options.out, layers, options.max_shard_size, options.rank, options.seed)
    print(f"{options.out}: {layers} layers, {needed / 1e9:.2f} GB, adapter of rank {options.rank}")


if __name__ == "__main__":
    main()
