"""The pass that chooses scales: what it measures is what a plain model does, and what it rescales computes the same."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from streamconv.calibration.equalized import Equalized, equalized_plan
from streamconv.calibration.equalizing import equalize
from streamconv.calibration.model import opened_targets
from streamconv.calibration.need import consumers_of, equalizing_need, pairs_need
from streamconv.calibration.subject import Subject
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.recorded import DIGESTS
from streamconv.equalization.awq import GRID
from streamconv.errors import ResourceError, Stopped, UnsupportedError
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.forward.weights import WeightSource
from streamconv.pipeline import build_job, prepare
from streamconv.planning.planner import build_plan
from streamconv.progress import StopRequest
from streamconv.storage.file_set import FileSet
from tests.calibration.subjects import LENGTH, TOKENS, layer_bytes, save_subject, so_far
from tests.forward.test_walk import SIZES, SLIDING
from tests.forward.texts import save_tokenizer
from tests.tiny import TOKENS as BATCH
from tests.tiny import edit_tensors, llama_config, read_tensors

MOE: dict[str, Any] = SIZES | {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
FAMILIES: Mapping[str, Any] = {
    "llama": llama_config(),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
    "gemma3_text": Gemma3TextConfig(**SIZES, **SLIDING, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "glm4": Glm4Config(**SIZES, head_dim=8),
}
MIXTURES: Mapping[str, Any] = {
    "mixtral": MixtralConfig(**MOE, num_local_experts=3),
    "qwen2_moe": Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=64),
    "qwen3_moe": Qwen3MoeConfig(**MOE, num_experts=4, head_dim=8, mlp_only_layers=[1]),
    "olmoe": OlmoeConfig(**MOE, num_experts=4),
    "glm4_moe": Glm4MoeConfig(
        **MOE,
        n_routed_experts=4,
        n_shared_experts=1,
        head_dim=8,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
    ),
}
# Matrices whose outputs are made loud below, with the first that another is divided for.
UP = re.compile(r".*\.(self_attn\.v_proj|(mlp|shared_experts?|experts\.\d+)\.(up_proj|w3))\.(weight|bias)")
LOUD = (3, 11)


def save_skewed(folder: Path, config: Any, factor: float = 50.0) -> Path:
    """Some channels of every input of a linear layer are `factor` times as large: what multiplies them is."""
    save_subject(folder, config, ("q_proj", "v_proj", "qkv_proj", "down_proj"))
    # Beside a config.json of some families, transformers would take a tokenizer for one of theirs.
    save_tokenizer(folder / "tokenizer")
    path = folder / "base" / "model.safetensors"
    put = {}
    for name, tensor in read_tensors(path).items():
        loud = tensor.clone()
        if UP.fullmatch(name):
            loud[list(LOUD)] *= factor
        elif name.endswith("gate_up_proj.weight"):
            loud[len(loud) // 2 :][list(LOUD)] *= factor
        elif name.endswith("qkv_proj.weight"):
            loud[48:][list(LOUD)] *= factor
        elif name.endswith(("input_layernorm.weight", "feedforward_layernorm.weight")) or (
            name.endswith("post_attention_layernorm.weight") and "gemma" not in config.model_type
        ):
            loud[list(LOUD)] = factor
        put[name] = loud
    edit_tensors(path, put=put)
    return folder


def subject_in(folder: Path, *, quant: str = "nf4", rounding: str = "nearest", **options: Any) -> Subject:
    job = build_job(
        folder / "base",
        folder / "adapter",
        quant=quant,
        rounding=rounding,
        rescale="awq",
        calibration=folder / "text.txt",
        calibration_tokens=TOKENS,
        calibration_sequence_length=LENGTH,
        **options,
    )
    subject = prepare(job).subject
    plan = replace(subject.plan, calibration=replace(subject.calibration, threads=1))
    return replace(subject, plan=plan, tokenizer=FileSet({}, folder=folder / "tokenizer"))


def rescaled(
    subject: Subject,
    folder: Path,
    look: Callable[[int], None] = lambda done: None,
    stop: StopRequest | None = None,
) -> Mapping[str, Equalized]:
    folder.mkdir(exist_ok=True)
    return equalize(subject, folder, so_far(look), stop or StopRequest())


def targets(
    subject: Subject, found: Mapping[str, Equalized] | None = None, dtype: str = "float32"
) -> dict[str, Tensor]:
    """What all weights are to be, dense, as `dtype`; rescaled by what was `found`."""
    options = replace(
        subject.plan.options, quant="none", group_size=None, dtype=dtype, rounding="auto", calibration=None
    )
    equalizers = equalized_plan(subject.plan, found).equalizers if found else {}
    plan = build_plan(subject.base, subject.adapter, options, subject.plan.device, equalizers)
    with WeightSource(plan, subject.plan.device, lambda _: None) as source:
        return {name: source.read(name) for name in source.names}


def live(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model with these weights."""
    place = folder / "live"
    place.mkdir(exist_ok=True)
    shutil.copy(folder / "base" / "config.json", place)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, place / "model.safetensors"
    )
    model, info = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, output_loading_info=True)
    if "experts" in str(list(weights)):
        model.set_experts_implementation(
            "eager"
        )  # torch multiplies groups of matrices in no more than float32
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    return model.eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(BATCH).logits
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_a_rescaled_model_computes_the_same(family: str, tmp_path: Path) -> None:
    """To the last bits of float32, with norms as they are stored, too: what that rounds is made up for."""
    folder = save_skewed(tmp_path, {**FAMILIES, **MIXTURES}[family])
    subject = subject_in(folder, quant="nf4" if family in FAMILIES else "w4a16")
    found = rescaled(subject, tmp_path / "work")
    plain, scaled = targets(subject), targets(subject, found)
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    alphas = [each.notes["alpha"] for each in found.values() if each.notes]
    assert changed <= found.keys()
    assert sum(alpha > 0 for alpha in alphas) > len(alphas) / 2
    assert all(name in changed for name, each in found.items() if each.notes.get("alpha", 0) > 0)
    expected = logits_of(live(tmp_path, plain, torch.float64))
    torch.testing.assert_close(
        logits_of(live(tmp_path, scaled, torch.float64)), expected, rtol=1e-5, atol=1e-5
    )
    stored = targets(subject, found, "bfloat16")
    scaled |= {name: tensor.float() for name, tensor in stored.items() if name.endswith("norm.weight")}
    torch.testing.assert_close(
        logits_of(live(tmp_path, scaled, torch.float64)), expected, rtol=1e-5, atol=1e-5
    )
    errors = [each.notes for each in found.values() if each.notes.get("unscaled_error")]
    assert all(each["relative_error"] <= each["unscaled_error"] for each in errors)
    assert sum(each["relative_error"] / each["unscaled_error"] for each in errors) < 0.9 * len(errors)
    experts = {name for name in plain if ".experts." in name}
    assert experts <= changed or family in FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_skewed(tmp_path_factory.mktemp("rescaled"), FAMILIES["qwen2"])


@pytest.fixture(scope="module")
def whole(folder: Path) -> Mapping[str, Equalized]:
    return rescaled(subject_in(folder), folder / "whole")


def test_scales_are_those_of_what_enters_the_layers(folder: Path, whole: Mapping[str, Equalized]) -> None:
    """a of the paper by hooks on a whole model of the targets; α is chosen from it by `find_scales`."""
    windows = read_windows(
        folder / "text.txt", load_tokenizer(folder / "tokenizer"), TOKENS // LENGTH, LENGTH
    )
    model = live(folder, targets(subject_in(folder)))
    pairs = {
        "input_layernorm": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.o_proj",
        "post_attention_layernorm": "mlp.up_proj",
        "mlp.up_proj": "mlp.down_proj",
    }
    for number in range(SIZES["num_hidden_layers"]):
        for producer, consumer in pairs.items():
            seen: list[Tensor] = []
            layer = model.model.layers[number]
            hook = layer.get_submodule(consumer).register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0].double().abs().flatten(0, 1))
            )
            with torch.no_grad():
                model(windows)
            hook.remove()
            a = torch.cat(seen).mean(0)
            if producer == "self_attn.v_proj":
                a = a.view(2, 2, 8).mean(1).flatten()
            made = whole[f"model.layers.{number}.{producer}.weight"]
            assert made.notes["alpha"] in GRID
            s = a ** made.notes["alpha"]
            s /= (s.max() * s.min()).sqrt()
            role = "columns" if "norm" in producer else "rows"
            divided = loaded(made, role).double()
            # A norm is divided by what storing it as bfloat16 left of that.
            torch.testing.assert_close(1 / divided, s, rtol=2**-7 if "norm" in producer else 1e-4, atol=0)


def loaded(made: Equalized, role: str) -> Tensor:
    with TensorReader() as reader:
        return reader.load(made.factors[role])


def test_norms_come_out_as_they_were_counted_on(folder: Path, whole: Mapping[str, Equalized]) -> None:
    """Stored in bfloat16, old over new is exactly what consumers are multiplied by."""
    subject = subject_in(folder)
    before, after = (
        read_tensors(folder / "base" / "model.safetensors"),
        targets(subject, whole, "bfloat16"),
    )
    name, consumer = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    quotient = before[name].double() / after[name].double()
    assert after[name].dtype == torch.bfloat16
    torch.testing.assert_close(loaded(whole[consumer], "columns").double(), quotient, rtol=1e-6, atol=0)


def test_errors_of_outputs_fall_clearly_where_inputs_are_skewed(whole: Mapping[str, Equalized]) -> None:
    notes = [each.notes for each in whole.values() if each.notes]
    assert len(notes) == 4 * SIZES["num_hidden_layers"]
    ratios = [each["relative_error"] / each["unscaled_error"] for each in notes]
    assert max(ratios) < 0.9
    assert sum(ratios) / len(ratios) < 0.7


@pytest.mark.parametrize("at", [0, 1])
def test_stopped_it_goes_on_to_the_same_bytes(
    folder: Path, whole: Mapping[str, Equalized], tmp_path: Path, at: int
) -> None:
    subject, stop = subject_in(folder), StopRequest()
    total = equalizing_need(subject).read
    size = total // SIZES["num_hidden_layers"]

    def look(done: int) -> None:
        assert 0 <= done <= total
        if done >= at * size:
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Stopped):
        rescaled(subject, tmp_path, look, stop)
    assert len(layer_bytes(tmp_path)) == at
    seen: list[int] = []
    rescaled(subject, tmp_path, seen.append)
    assert seen[0] == at * size
    assert layer_bytes(tmp_path) == layer_bytes(folder / "whole")
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"}
    assert left == {"calibration.json", DIGESTS}


def test_disk_is_what_was_planned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_in(folder)
    used: list[int] = []

    def look(done: int) -> None:
        del done
        used.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    with opened_targets(subject, consumers_of(subject)) as walk:
        need = pairs_need(walk, subject)
    rescaled(subject, tmp_path, look)
    assert 2 * 4 * TOKENS * 32 < max(used) <= need.disk
    scales = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert subject.plan.equalizer_bytes < scales < 2 * subject.plan.equalizer_bytes + 3 * 4096
    monkeypatch.setattr("streamconv.calibration.layer_files.free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"of the calibration need .* more"):
        rescaled(subject, tmp_path / "other")


def test_a_model_that_is_not_as_its_family_says(folder: Path, tmp_path: Path) -> None:
    """The table is looked up by name; which layers really share an input is seen when they run."""
    subject = subject_in(folder)
    pairs = subject.equalization.pairs
    more = replace(pairs[0], consumers=(*pairs[0].consumers, *pairs[1].consumers))
    equalization = replace(subject.equalization, pairs=(more, *pairs[2:]))
    calibration = replace(subject.calibration, equalization=equalization)
    changed = replace(subject, plan=replace(subject.plan, calibration=calibration))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight, .* do not read one input"):
        rescaled(changed, tmp_path / "wrong")
    assert not layer_bytes(tmp_path / "wrong")


def test_experts_that_do_not_read_what_their_router_does(tmp_path: Path) -> None:
    subject = subject_in(save_skewed(tmp_path, MIXTURES["qwen3_moe"]), quant="w4a16")
    pairs = subject.equalization.pairs
    (norm,) = [pair for pair in pairs if pair.producer.endswith("0.post_attention_layernorm.weight")]
    down = tuple(name.replace("up_proj", "down_proj") for name in norm.consumers)
    equalization = replace(subject.equalization, pairs=(replace(norm, consumers=down),))
    calibration = replace(subject.calibration, equalization=equalization)
    changed = replace(subject, plan=replace(subject.plan, calibration=calibration))
    with pytest.raises(UnsupportedError, match=r"gate\.weight, .* do not read one input"):
        rescaled(changed, tmp_path / "wrong")
