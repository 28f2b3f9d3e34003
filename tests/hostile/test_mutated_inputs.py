"""Any field of any small file changed: the plan is made or refused, and what is planned can be carried out."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import InputError, OptionError, StreamconvError, VerificationError
from streamconv.pipeline import build_job, check_contents, prepare
from streamconv.pipeline.inspection import inspect
from tests.hostile import stranger
from tests.hostile.stranger import LONGEST, Change

READ_ONLY = ("fp8", "modelopt", "mlx", "nvfp4")
QUANTS = ("keep", "none", "nf4-dq", "int8", "w4a16")
# Fields of config.json that are read somewhere: put in anywhere, so that they are met with in odd places, too.
FIELDS = (
    *("architectures", "auto_map", "compression_config", "dtype", "eos_token_id", "id2label", "layer_types"),
    *("model_type", "num_hidden_layers", "num_attention_heads", "quantization", "quantization_config"),
    *("quant_method", "text_config", "tie_word_embeddings", "torch_dtype", "vocab_size", "_name_or_path"),
    *("bits", "group_size", "format", "config_groups", "weights", "sparsity_config", "load_in_4bit"),
    *("bnb_4bit_compute_dtype", "modules_to_not_convert", "ignore", "desc_act", "sym", "dynamic", "fmt"),
    *("weight_block_size", "version", "checkpoint_format", "num_kv_shared_layers", "use_sliding_window"),
)
ADAPTER_FIELDS = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"),
    *("target_parameters", "exclude_modules", "layer_replication", "trainable_token_indices", "bias", "r"),
    *(
        "init_lora_weights",
        "fan_in_fan_out",
        "auto_mapping",
        "task_type",
        "base_model_name_or_path",
        "revision",
    ),
    *(
        "eva_config",
        "corda_config",
        "loftq_config",
        "megatron_config",
        "peft_version",
        "lora_bias",
        "peft_type",
    ),
)
TOKENIZER_FIELDS = ("added_tokens_decoder", "chat_template", "auto_map", "eos_token", "extra_special_tokens")
# File by folder, and fields that may be put in.
FILES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("adapter", stranger.ADAPTER_CONFIG): ADAPTER_FIELDS,
    ("sharded", stranger.INDEX): (),
    **{
        (folder, name): TOKENIZER_FIELDS
        for folder in ("llama", "adapter")
        for name in (
            "tokenizer_config.json",
            "tokenizer.json",
            "special_tokens_map.json",
            "added_tokens.json",
        )
    },
    ("llama", "generation_config.json"): ("eos_token_id",),
    **{(folder, "preprocessor_config.json"): () for folder in ("llama", "adapter")},
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One file of one folder, changed, and the options it is merged with."""

    base: str
    folder: str
    name: str
    change: Change
    quant: str
    tokenizer: str

    def __str__(self) -> str:
        where = ".".join(map(str, self.change.path))
        return f"{self.folder}/{self.name}: {where} {self.change.what} ({self.base}, {self.quant}, {self.tokenizer})"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stranger.fill(tmp_path_factory.mktemp("stranger"))


def draw(inputs: Path, seed: int) -> Trial:
    chance = random.Random(seed)
    if chance.random() < 0.55:
        base = folder = chance.choice(("llama", *stranger.WRITTEN, *READ_ONLY))
        name, extra = stranger.CONFIG, tuple(FIELDS)
        content = json.loads((inputs / folder / name).read_text())
        if folder == "llama":
            content = chance.choice([content, *stranger.configs().values()])
    else:
        folder, name = chance.choice([*FILES, *[("adapter", stranger.ADAPTER_CONFIG)] * 6])
        base, extra = ("llama" if folder == "adapter" else folder), FILES[folder, name]
        content = json.loads((inputs / folder / name).read_text())
        if name == stranger.ADAPTER_CONFIG and chance.random() < 0.3:
            content["peft_type"] = chance.choice(sorted(ADAPTERS))
    quant = "none" if base in READ_ONLY else chance.choice(QUANTS)
    tokenizer = chance.choice(("auto", "auto", "base", "adapter"))
    return Trial(base, folder, name, stranger.change(content, chance, extra), quant, tokenizer)


def refusal(call: Any) -> StreamconvError | None:
    """The refusal that `call` ends with, short and for a person; anything else it raises is a defect."""
    try:
        call()
    except StreamconvError as error:
        found = error
    else:
        return None
    assert isinstance(found, InputError | OptionError | VerificationError), found
    assert 20 < len(str(found)) < LONGEST
    return found


def examine(inputs: Path, trial: Trial, out: Path, runs: bool) -> None:
    """Inspect, plan and, if `runs`, merge with one file changed, which is put back afterwards."""
    path = inputs / trial.folder / trial.name
    before = path.read_bytes()
    path.write_text(trial.change.text)
    began = time.monotonic()
    try:
        for folder in {trial.base, trial.folder}:
            refusal(lambda folder=folder: json.dumps(inspect(inputs / folder)))
        options: dict[str, Any] = {"quant": trial.quant, "tokenizer": trial.tokenizer}
        places = inputs / trial.base, inputs / "adapter"
        refused = refusal(lambda: check_contents(prepare(build_job(*places, **options))))
        assert time.monotonic() - began < 5
        if refused is None and runs:
            shutil.rmtree(out, ignore_errors=True)
            late = refusal(lambda: streamconv.merge(*places, out, **options))
            # Numbers of an adapter's config may make values that no type holds, or that rounding takes away.
            assert late is None or trial.name == stranger.ADAPTER_CONFIG, late
    finally:
        path.write_bytes(before)


@settings(max_examples=120)
@given(st.integers(0, 2**32))
def test_a_changed_field_is_planned_or_refused(inputs: Path, seed: int) -> None:
    examine(inputs, draw(inputs, seed), inputs / "out", runs=False)


@settings(max_examples=12)
@given(st.integers(0, 2**32))
def test_what_is_planned_can_be_carried_out(inputs: Path, seed: int) -> None:
    examine(inputs, draw(inputs, seed), inputs / "out", runs=True)


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(0, 20_000, 1000))
def test_many_changed_fields(inputs: Path, first: int) -> None:
    for seed in range(first, first + 1000):
        examine(inputs, draw(inputs, seed), inputs / "out", runs=seed % 5 == 0)
