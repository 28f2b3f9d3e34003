"""Commands of the fault sweep, and their tiny inputs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig

from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import VOCABULARY, llama_config, save_adapter, save_base
from tools.fault_judge import Tree

# With this budget a tile is 64 KiB, so that even these small weights are read and written in parts.
BUDGET = "98MiB"
WATERMARK_BYTES = 20_000
REPOSITORY = "me/model"
SIXTEEN, FOUR = "bf16", "nf4-dq"
NAMES = (SIXTEEN, FOUR, "gptq", "also", "calibrated", "overwrite", "resume", "push")


@dataclass(frozen=True, slots=True)
class Command:
    """A command line without its output folder.

    `before` is copied to the output folder first; `outputs` are the subfolders that hold a model each; `complete` and
    `old` are the trees that may stand there with a config.json: those of an undisturbed run and of `before`. `warm` are
    further options for a run in the process that is forked.
    """

    name: str
    arguments: tuple[str, ...]
    before: Path | None = None
    outputs: tuple[str, ...] = ("",)
    warm: tuple[str, ...] = ()
    complete: Tree | None = None
    old: Tree | None = None

    @property
    def pushes(self) -> bool:
        return self.arguments[0] == "push"

    def line(self, out: Path) -> tuple[str, ...]:
        return self.arguments if self.pushes else (*self.arguments, "-o", str(out))

    def prepare(self, out: Path) -> None:
        if self.before is not None:
            shutil.copytree(self.before, out, symlinks=True)

    def completed(self, complete: Tree) -> Command:
        """The same command, which knows what it makes."""
        return replace(self, complete=complete)


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


def write_inputs(folder: Path) -> None:
    """A Llama of 3 shards and about 250 kB in 16 bit and a smaller one, a LoRA for each, and a text."""
    base = save_base(folder / "base", llama(), dtype=torch.bfloat16, max_shard_size="100kB")
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    small = save_base(folder / "small", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(small)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "small-adapter", small, lora)
    write_text(folder / "text.txt", 70)


def write_old(folder: Path) -> None:
    """Another model with the same names of files, one more shard, a template and notes of the user's own."""
    save_base(folder, llama(), dtype=torch.bfloat16, max_shard_size="100kB", seed=7)
    save_tokenizer(folder)
    (folder / "model-00004-of-00004.safetensors").write_bytes(b"left by a still older one")
    (folder / "notes.txt").write_text("the user's own")


def commands(inputs: Path) -> Mapping[str, Command]:
    """All commands by name, on the inputs in `inputs`; none knows yet what it makes."""
    paths = ("--base", str(inputs / "base"), "--adapter", str(inputs / "adapter"), "--device", "cpu")
    small = ("--base", str(inputs / "small"), "--adapter", str(inputs / "small-adapter"), "--device", "cpu")
    merge = ("merge", *paths, "--max-ram", BUDGET)
    four = ("--quant", FOUR, "--merge-base", FOUR)
    text = ("--calibration", str(inputs / "text.txt"), "--calibration-tokens", "64")
    calibrated = (*text, "--calibration-gradient-tokens", "32", "--calibration-sequence-length", "32")
    made = [
        Command(SIXTEEN, merge),
        Command(FOUR, (*merge, *four, "--max-shard-size", "30kB")),
        Command("gptq", (*merge, "--quant", "gptq", "--group-size", "32", "--max-shard-size", "40kB")),
        Command(
            "also",
            ("merge", *paths, "--max-ram", "99MiB", "--also", FOUR, "--also", "int8"),
            outputs=("", FOUR, "int8"),
        ),
        Command(
            "calibrated",
            ("merge", *small, *four, *calibrated),
            warm=("--calibration-gradient-tokens", "0"),
        ),
        Command("overwrite", (*merge, "--overwrite"), inputs / "old"),
        Command("resume", merge, inputs / "stopped"),
        Command("push", ("push", str(inputs / "model"), REPOSITORY)),
    ]
    return {each.name: each for each in made}
