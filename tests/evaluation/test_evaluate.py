"""Whole evaluations against plain loops of transformers, PEFT and bitsandbytes on the same tokens."""

from __future__ import annotations

import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

import streamconv
from streamconv import evaluation
from streamconv.errors import CheckpointError, InputError, OptionError, ResourceError
from streamconv.evaluation.budget import Budget
from streamconv.evaluation.measures import Divergence
from streamconv.evaluation.scoring import score
from streamconv.forward.memory import FIXED_BYTES
from streamconv.forward.weights import HOST_BYTES
from streamconv.planning import devices
from streamconv.progress import anonymous_bytes
from tests.forward.test_walk import SIZES, SLIDING
from tests.forward.texts import numbers, save_tokenizer, write_text
from tests.host_gpu import HostGpu
from tests.models import Sizes, write_base
from tests.tiny import (
    edit_json,
    gpt2_config,
    llama_config,
    save_adapter,
    save_base,
)

LENGTH, COUNT = 32, 5
WINDOWS = torch.tensor(numbers(LENGTH * COUNT)).view(COUNT, LENGTH)
LENGTHS: dict[str, Any] = {"sequence_length": LENGTH, "tokens": LENGTH * COUNT}
RELATIVE = 1e-3
FAMILIES: dict[str, Any] = {
    "llama": llama_config(),
    "llama, tied": llama_config(tied=True),
    "gpt2": gpt2_config(),
    "gemma3": Gemma3TextConfig(**SIZES, **SLIDING, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3),
}


def make(folder: Path, config: Any = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    base = save_base(folder, config or llama_config(), dtype=dtype)
    with torch.no_grad():
        save_tokenizer(base)
    return base


def log_likelihoods(model: Any) -> Tensor:
    """[sequence, token, vocabulary], in float64, of every predicted token."""
    with torch.no_grad():
        found: Tensor = model(WINDOWS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return found


def losses(logs: Tensor) -> Tensor:
    return cross_entropy(logs.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="none").view(COUNT, -1)


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


def check(found: streamconv.Evaluation, model: Any, relative: float = 1e-5) -> None:
    expected = losses(log_likelihoods(model))
    assert found.losses == pytest.approx(expected.mean(dim=1).tolist(), rel=relative)
    assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=relative)
    assert found.predicted_tokens == COUNT * (LENGTH - 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("evaluated") / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_a_plain_loop(family: str, tmp_path: Path, text: Path) -> None:
    base = make(tmp_path / "base", FAMILIES[family])
    check(streamconv.evaluate(base, data=text, **LENGTHS), open_model(base))


def test_in_bfloat16(base: Path, text: Path) -> None:
    """The same dtype computes the same, but for the head's logits, which are compared in float32."""
    found = streamconv.evaluate(base, data=text, dtype="bfloat16", **LENGTHS)
    check(found, open_model(base, torch.bfloat16), RELATIVE)


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "fp4", "int8"])
def test_quantized_checkpoints_are_what_they_dequantize_to(
    base: Path, tmp_path: Path, text: Path, quant: str
) -> None:
    streamconv.convert(base, tmp_path / "out", quant=quant)
    streamconv.convert(tmp_path / "out", tmp_path / "dense", quant="float32")
    found = streamconv.evaluate(tmp_path / "out", data=text, **LENGTHS)
    check(found, open_model(tmp_path / "dense"))
    assert found.target == f"{quant}, dequantized"
    assert found.perplexity != streamconv.evaluate(base, data=text, **LENGTHS).perplexity


def test_a_4bit_checkpoint_as_bitsandbytes_runs_it(base: Path, tmp_path: Path, text: Path) -> None:
    streamconv.convert(base, tmp_path / "out", quant="nf4-dq")
    model = open_model(tmp_path / "out")
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    check(streamconv.evaluate(tmp_path / "out", data=text, **LENGTHS), model, RELATIVE)


def with_adapter(base: Path, adapter: Path) -> Any:
    """The adapter live on its base, as PEFT runs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(open_model(base), adapter).eval()


LORAS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "embedding, head, saved": LoraConfig(
        r=4, target_modules=["embed_tokens", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", LORAS)
def test_an_unmerged_model_is_that_of_peft(kind: str, base: Path, tmp_path: Path, text: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, LORAS[kind])
    found = streamconv.evaluate(base=base, adapter=adapter.path, data=text, **LENGTHS)
    check(found, with_adapter(base, adapter.path))
    assert "original 16-bit base" in found.target


def test_an_unmerged_model_on_the_rounded_base(base: Path, tmp_path: Path, text: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, LORAS["lora"])
    found = streamconv.evaluate(base=base, adapter=adapter.path, merge_base="nf4-dq", data=text, **LENGTHS)
    streamconv.convert(base, tmp_path / "4bit", quant="nf4-dq")
    streamconv.convert(tmp_path / "4bit", tmp_path / "rounded", quant="none")
    check(found, with_adapter(tmp_path / "rounded", adapter.path))
    on_4bit = streamconv.evaluate(base=tmp_path / "4bit", adapter=adapter.path, data=text, **LENGTHS)
    assert on_4bit.losses == pytest.approx(found.losses, rel=1e-6)


# -- against a reference -------------------------------------------------------------------------------------------


def test_a_reference(base: Path, tmp_path: Path, text: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, LORAS["lora"])
    streamconv.merge(base, adapter.path, tmp_path / "merged", quant="nf4", rounding="nearest")
    found = streamconv.evaluate(
        tmp_path / "merged", reference=base, reference_adapter=adapter.path, data=text, **LENGTHS
    )
    streamconv.convert(tmp_path / "merged", tmp_path / "dense", quant="none")
    reference = log_likelihoods(with_adapter(base, adapter.path))
    model = log_likelihoods(open_model(tmp_path / "dense"))
    kl = kl_div(model, reference, log_target=True, reduction="none").sum(-1)
    same = (model.argmax(-1) == reference.argmax(-1)).double()
    assert found.comparison is not None
    assert found.comparison.kl_by_sequence == pytest.approx(kl.mean(dim=1).tolist(), rel=1e-3, abs=1e-6)
    assert found.comparison.top1_by_sequence == pytest.approx(same.mean(dim=1).tolist())
    assert found.comparison.reference_losses == pytest.approx(
        losses(reference).mean(dim=1).tolist(), rel=1e-5
    )
    assert found.losses == pytest.approx(losses(model).mean(dim=1).tolist(), rel=1e-5)
    assert 1e-4 < found.comparison.kl < 10


def test_greedy_continuations(base: Path, tmp_path: Path, text: Path) -> None:
    streamconv.convert(base, tmp_path / "4bit", quant="nf4")
    streamconv.convert(tmp_path / "4bit", tmp_path / "dense", quant="none")
    found = streamconv.evaluate(tmp_path / "4bit", reference=base, greedy_tokens=6, data=text, **LENGTHS)
    ours, theirs = (continuation(open_model(folder)) for folder in (tmp_path / "dense", base))
    first = [row.nonzero()[0].item() if row.any() else None for row in ours != theirs]
    assert found.comparison is not None
    greedy = found.comparison.greedy
    assert greedy is not None
    assert greedy.first_differing == tuple(first)
    assert greedy.identical == first.count(None) / COUNT
    assert any(place is not None for place in first)
    assert 1 <= greedy.passes <= 6


def continuation(model: Any) -> Tensor:
    """Six tokens after the first half of every window, each the most likely one."""
    tokens = WINDOWS[:, : LENGTH // 2]
    with torch.no_grad():
        for _ in range(6):
            following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens[:, -6:]


def test_a_model_is_like_itself(base: Path, text: Path) -> None:
    found = streamconv.evaluate(base, reference=base, greedy_tokens=4, data=text, **LENGTHS)
    assert found.comparison is not None
    assert abs(found.comparison.kl) < 1e-9
    assert found.comparison.top1_agreement == 1
    assert found.comparison.greedy is not None
    assert found.comparison.greedy.identical == 1


def test_a_reference_that_is_kept_answers_the_same(base: Path, tmp_path: Path, text: Path) -> None:
    """To the last bit, and without being walked again, whichever model is compared with it."""
    streamconv.convert(base, tmp_path / "4bit", quant="nf4")
    cache = tmp_path / "kept"
    asked: dict[str, Any] = {"data": text, "reference": base, "greedy_tokens": 4, **LENGTHS}
    plain = streamconv.evaluate(tmp_path / "4bit", **asked)
    first = streamconv.evaluate(tmp_path / "4bit", reference_cache=cache, **asked)
    again = streamconv.evaluate(tmp_path / "4bit", reference_cache=cache, **asked)
    assert plain.comparison == first.comparison == again.comparison
    assert plain.losses == first.losses == again.losses
    layers = sum(path.stat().st_size for path in base.glob("*.safetensors")) // 2
    assert first.bytes_read - again.bytes_read > 2 * layers
    other = streamconv.evaluate(base, reference_cache=cache, **asked)
    assert other.comparison is not None
    assert abs(other.comparison.kl) < 1e-9
    (states,) = cache.glob("*.states")
    (draft,) = cache.glob("*-greedy-4.json")
    damages: Sequence[tuple[Path, Callable[[bytes], bytes]]] = (
        (states, lambda content: content[:-1]),
        (states, lambda content: content[:-1] + bytes([content[-1] ^ 64])),
        (draft, lambda content: content.replace(b"[", b"[1, ", 1)),
    )
    for path, damage in damages:
        path.write_bytes(damage(path.read_bytes()))
        cut = streamconv.evaluate(tmp_path / "4bit", reference_cache=cache, **asked)
        assert (cut.comparison, len([*cache.glob("*.states")])) == (plain.comparison, 1)
    shorter = asked | {"tokens": LENGTH * 3}
    assert streamconv.evaluate(base, reference_cache=cache, **shorter).sequences == 3
    assert len([*cache.glob("*.states")]) == 2


def test_weights_that_change_while_they_are_judged(base: Path, tmp_path: Path, text: Path) -> None:
    """Nothing is told of them, and nothing kept."""
    model = shutil.copytree(base, tmp_path / "model")

    def touch(done: int, total: int) -> None:
        if 0 < done < total:
            os.utime(model / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was in use"):
        streamconv.evaluate(
            model, data=text, reference=model, reference_cache=tmp_path / "kept", on_progress=touch, **LENGTHS
        )
    assert not [*(tmp_path / "kept").glob("*")]


def test_vocabularies_of_two_sizes(base: Path, tmp_path: Path, text: Path) -> None:
    other = make(tmp_path / "other", Qwen2Config(**SIZES | {"vocab_size": 50}))
    with pytest.raises(InputError, match="vocabulary of 40 and the reference one of 50"):
        streamconv.evaluate(base, reference=other, data=text, **LENGTHS)


# -- memory --------------------------------------------------------------------------------------------------------


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most memory, above what there was before, while this is open."""
    before, found, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def test_a_model_larger_than_the_memory(tmp_path: Path, text: Path, base: Path) -> None:
    sizes = Sizes(hidden=512, inner=2048, layers=16)
    large = write_base(tmp_path / "large", sizes.shapes)
    config = LlamaConfig(
        vocab_size=700, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(large)
    save_tokenizer(large)
    streamconv.evaluate(base, data=text, **LENGTHS)  # imports what is imported once
    budget = 160 * 2**20
    with peak() as found:
        result = streamconv.evaluate(large, data=text, max_ram=budget, **LENGTHS)
    assert 4 * sum(math.prod(shape) for shape in sizes.shapes.values()) > 1.5 * budget
    assert found[0] < budget
    assert result.planned_ram_bytes <= budget
    check(result, open_model(large))
    with pytest.raises(ResourceError, match=r"--max-ram is too small.*need \d+MiB"):
        streamconv.evaluate(large, data=text, max_ram="140MiB", **LENGTHS)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    found = HostGpu()
    real = devices.resolve_device
    monkeypatch.setattr(
        "streamconv.pipeline.preparation.resolve_device",
        lambda name: real(name) if name == "cpu" else found,
    )
    return found


def test_memory_of_a_gpu_and_of_the_host_are_planned_apart(base: Path, text: Path, gpu: HostGpu) -> None:
    on_cpu = streamconv.evaluate(base, data=text, device="cpu", **LENGTHS)
    found = streamconv.evaluate(base, data=text, device="cuda", **LENGTHS)
    assert found.losses == pytest.approx(on_cpu.losses, rel=1e-5)
    fixed = FIXED_BYTES + HOST_BYTES
    states = COUNT * LENGTH * 32 * 4
    assert found.planned_ram_bytes == fixed + 2 * states  # those of a batch, which is all, and of all
    with pytest.raises(ResourceError, match="--max-ram is too small to evaluate"):
        streamconv.evaluate(base, data=text, device="cuda", max_ram="150MiB", **LENGTHS)
    with pytest.raises(ResourceError, match="--max-vram is too small"):
        streamconv.evaluate(base, data=text, device="cuda", max_vram="60MiB", **LENGTHS)


def test_a_gpu_whose_memory_is_taken_is_left_to_others(
    base: Path, text: Path, gpu: HostGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def short(device: devices.Device, needed: int) -> dict[str, str]:
        asked.append(needed)
        return {} if device.is_cpu else {"cuda:0": "cuda:0 has 1 GB of memory free, and 2 GB are planned"}

    monkeypatch.setattr("streamconv.evaluation.scoring.short_of_memory", short)
    both: dict[str, Any] = {"data": text, "reference": base, **LENGTHS}
    found = streamconv.evaluate(base, **both)
    assert found.comparison is not None
    assert found == replace(
        streamconv.evaluate(base, device="cpu", **both),
        seconds=found.seconds,
        peak_ram_bytes=found.peak_ram_bytes,
    )
    assert asked[0] > 0
    with pytest.raises(
        ResourceError, match="--device cuda was asked for, but cuda:0 has 1 GB of memory free"
    ):
        streamconv.evaluate(base, device="cuda", **both)


def test_only_sums_come_back_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here from a device that has no numbers: nothing else could."""
    where = torch.device("meta")
    walk = SimpleNamespace(
        device=SimpleNamespace(torch=where),
        hidden=8,
        dtype=torch.float32,
        run=lambda *_: None,
        logits=lambda *_: iter([(range(50), slice(0, COUNT), torch.empty(COUNT, LENGTH, 50, device=where))]),
    )
    walks: Any = [walk, walk]
    found = score(walks, WINDOWS, Budget(COUNT, 64, 2**20, 0))
    assert isinstance(found, Divergence)
    assert found.reference.targets.device == where


# -- what cannot be meant ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "nothing to evaluate"),
        ({"base": "b"}, "MODEL and --base are both given"),
        ({"adapter": "a"}, "--adapter needs --base"),
        ({"greedy_tokens": 3}, "add --reference"),
        ({"reference_adapter": "a"}, "add --reference"),
        ({"reference_cache": "c"}, "add --reference"),
        ({"greedy_tokens": 300, "reference": "r"}, "--greedy-tokens 300 must be between 0 and 256"),
        ({"sequence_length": 4}, "--sequence-length 4 is too short"),
        ({"tokens": 100}, "--tokens 100 is less than one sequence of 512"),
        ({"dtype": "auto"}, "--dtype"),
        ({"dtype": "int8"}, "--dtype int8 is not known"),
        ({"sequence_length": 128, "tokens": 1280}, "more than the 64 positions"),
        ({"merge_base": "nf4"}, "there is no adapter"),
    ],
)
def test_contradictions(base: Path, text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        streamconv.evaluate(**{"model": base, "data": text} | options)


def test_a_model_without_a_tokenizer(base: Path, tmp_path: Path, text: Path) -> None:
    save_base(tmp_path / "base", llama_config())
    with pytest.raises(InputError, match="has no tokenizer beside its weights"):
        streamconv.evaluate(tmp_path / "base", data=text, **LENGTHS)


def test_without_the_extra(base: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs transformers and accelerate.*streamconv\[eval\]"):
        streamconv.evaluate(base, data=text, **LENGTHS)


def test_a_config_transformers_does_not_take(base: Path, tmp_path: Path, text: Path) -> None:
    other = make(tmp_path / "other")
    edit_json(other / "config.json", num_attention_heads="many")
    with pytest.raises(InputError, match="cannot build the model"):
        streamconv.evaluate(other, data=text, **LENGTHS)
