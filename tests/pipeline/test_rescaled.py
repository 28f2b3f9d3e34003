"""Rescaled merges from options to a verified output that stock loaders open: refused, stored, reported, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

import streamconv
from streamconv.errors import OptionError, UnsupportedError, VerificationError
from streamconv.formats import find_weights
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.output.sidecars import RESIDUAL
from streamconv.pipeline import Prepared, build_job, prepare
from streamconv.pipeline.shown import plan_as_json, plan_as_text
from streamconv.planning.plan import Rewrite
from streamconv.planning.scales import FRESH
from tests.checkpoint.files import index_of
from tests.cli.calls import succeed
from tests.formats.stored import decoded
from tests.forward.test_walk import SIZES
from tests.forward.texts import save_tokenizer, write_text
from tests.parity.opening import open_model, tensors
from tests.tiny import edit_tensors, read_tensors, save_adapter, save_base

TEXT: dict[str, Any] = {"calibration_tokens": 256, "calibration_sequence_length": 32}
GROUPS: dict[str, Any] = {"quant": "w4a16", "group_size": 32}
LAYER = "model.layers.0"
LOUD = (3, 11)


@dataclass(frozen=True)
class Inputs:
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def options(self) -> dict[str, Any]:
        return {"calibration": self.folder / "text.txt", **TEXT, "rescale": "awq", "device": "cpu", **GROUPS}

    def prepare(self, **options: Any) -> Prepared:
        return prepare(build_job(self.base, self.adapter, **{**self.options, **options}))

    def merge(self, out: Path, **options: Any) -> streamconv.Report:
        return streamconv.merge(self.base, self.adapter, out, **{**self.options, **options})

    def verify(self, out: str, **options: Any) -> Any:
        return streamconv.verify(
            out, full=True, base=self.base, adapter=self.adapter, device="cpu", **options
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A float32 base, whose loaders compute in float32, with a few large inputs before every linear layer."""
    folder = tmp_path_factory.mktemp("rescaled")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    base = save_base(folder / "base", config, dtype=torch.float32)
    stored = read_tensors(base / "model.safetensors")
    for name, tensor in stored.items():
        if "layernorm" in name or "v_proj" in name or "up_proj" in name:
            tensor[list(LOUD)] *= 10
    edit_tensors(base / "model.safetensors", put=stored)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    write_text(folder / "text.txt", 600)
    return Inputs(folder)


@pytest.fixture(scope="module")
def made(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> streamconv.Report:
    return inputs.merge(tmp_path_factory.mktemp("made") / "out", rounding="nearest")


# -- what is planned and refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": "smooth"}, "--rescale smooth is not known; use one of none, awq"),
        ({"calibration": None}, "--rescale awq scales weights by what goes through the layers; give a text"),
        (
            {"quant": "none", "group_size": None},
            "--rescale awq makes weights easier to round, but the output is",
        ),
        ({"quant": "int8", "group_size": None}, "calibration text cannot be used for int8"),
        ({"rounding": "nearest", "residual_rank": 4}, "knows neither --preserve-delta nor --residual-rank"),
        ({"rounding": "nearest", "rescale": "none"}, "or rescale weights by it with --rescale awq"),
        ({"rounding": "search", "also": ["nf4"]}, "calibrates one output of a run"),
    ],
)
def test_refusals(inputs: Inputs, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        inputs.prepare(**options)


@pytest.mark.parametrize("quant", ["fp8", "fp8-block"])
def test_fp8_is_rescaled_but_where_static_activations_were_measured_before(
    inputs: Inputs, tmp_path: Path, quant: str
) -> None:
    base = Path(streamconv.convert(inputs.base, tmp_path / "base", quant=quant, device="cpu").out)
    options = {**inputs.options, "quant": "keep", "group_size": None, "rounding": "nearest"}
    made = streamconv.merge(base, inputs.adapter, tmp_path / "out", **options)
    assert len(made.rescaled) == 8
    scale = {f"{LAYER}.self_attn.q_proj.input_scale": torch.ones(1)}
    edit_tensors(base / "model.safetensors", put=scale)
    with pytest.raises(
        UnsupportedError, match=r"q_proj.input_scale beside it, measured of activations before"
    ):
        streamconv.merge(base, inputs.adapter, tmp_path / "again", **options)


def test_a_family_that_is_not_known(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", PhiConfig(**SIZES))
    save_tokenizer(base)
    text = write_text(tmp_path / "text.txt", 600)
    job = build_job(base, quant="nf4", rescale="awq", calibration=text, **TEXT)
    with pytest.raises(UnsupportedError, match=r"the model type 'phi' can .* it knows llama, mistral, qwen2"):
        prepare(job)


def test_the_plan_says_what_is_rescaled(inputs: Inputs) -> None:
    prepared = inputs.prepare(rounding="nearest")
    plan = prepared.plan
    assert plan.calibrated == ()
    assert len(plan.equalizers) == 2 * 9
    text = plan_as_text(prepared)
    assert "rescale   awq: 18 weights in 8 pairs, as llama has them" in text
    assert "text.txt: 256 tokens in sequences of 32, for scales alone" in text
    pairs = plan_as_json(prepared)["calibration"]["pairs"]
    assert pairs[1] == {
        "divided": f"{LAYER}.self_attn.v_proj.weight",
        "multiplied": [f"{LAYER}.self_attn.o_proj.weight"],
    }
    assert [each.name for each in plan.passes] == ["equalize"]
    assert plan.passes_need.disk > 2 * 4 * 256 * 64 + plan.equalizer_bytes
    without = prepare(build_job(inputs.base, inputs.adapter, **GROUPS, rounding="nearest", device="cpu")).plan
    assert plan.digest != without.digest
    assert without.equalizers == {}
    assert plan.memory.ram >= without.memory.ram


def test_of_several_outputs_it_is_for_the_calibrated_one(inputs: Inputs) -> None:
    main, other = inputs.prepare(also=["nf4"]).plans
    alone = prepare(
        build_job(inputs.base, inputs.adapter, quant="nf4", device="cpu", max_shard_size=None)
    ).plan
    assert main.equalizers
    assert other.equalizers == {}
    assert other.digest == alone.digest


def test_whatever_the_base_all_that_is_rescaled_is_rounded_anew(inputs: Inputs) -> None:
    """On its own grid, too: there it no longer lies."""
    for merge_base in ("original", "nf4"):
        options = {"quant": "nf4", "group_size": None, "merge_base": merge_base, "rounding": "stochastic"}
        steps = {
            placed.step.name: placed.step
            for shard in inputs.prepare(**options).plan.shards
            for placed in shard.steps
        }
        scaled = [step for step in steps.values() if isinstance(step, Rewrite) and step.equalizer]
        assert len(scaled) == 18
        assert all(step.scales == FRESH for step in scaled)
        assert all(
            (step.merge_base is not None) == (merge_base == "nf4") for step in scaled if step.encoder.grid
        )


# -- what is stored ----------------------------------------------------------------------------------------------


def test_stock_loaders_see_what_we_see(made: streamconv.Report, inputs: Inputs) -> None:
    """w4a16 through compressed-tensors on the CPU: logits of the decoded weights, and the perplexity of `eval`."""
    windows = read_windows(inputs.folder / "text.txt", load_tokenizer(inputs.base), 8, 32)
    theirs = open_model(Path(made.out))
    by_hand: Any = AutoModelForCausalLM.from_pretrained(inputs.base).eval()
    values = {weight.name: decoded(weight).float() for weight in find_weights(index_of(Path(made.out)))}
    by_hand.load_state_dict(values)
    with torch.no_grad():
        found, expected = theirs(windows).logits, by_hand(windows).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    losses = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    text = inputs.folder / "text.txt"
    ours = streamconv.evaluate(made.out, data=text, sequence_length=32, tokens=256, device="cpu")
    assert math.log(ours.perplexity) == pytest.approx(float(losses), rel=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_outputs_err_less_than_without(
    inputs: Inputs, made: streamconv.Report, tmp_path: Path, rounding: str
) -> None:
    """KL from the unmerged model, on other text, where a few inputs are large."""
    rescaled = made if rounding == "nearest" else inputs.merge(tmp_path / "scaled", rounding=rounding)
    text: dict[str, Any] = (
        {} if rounding == "nearest" else {"calibration": inputs.folder / "text.txt", **TEXT}
    )
    plain = streamconv.merge(
        inputs.base, inputs.adapter, tmp_path / "plain", rounding=rounding, device="cpu", **GROUPS, **text
    )
    recipes = [
        json.loads((Path(out) / "streamconv-recipe.json").read_text()) for out in (rescaled.out, plain.out)
    ]
    assert [recipe["rounding"] for recipe in recipes] == [rounding, rounding]
    assert [recipe.get("rescale") for recipe in recipes] == ["awq", None]
    held_out = write_text(tmp_path / "held-out.txt", 900)
    held_out.write_text(" ".join(held_out.read_text().split()[600:]))
    kl = []
    for out in (rescaled.out, plain.out):
        found = streamconv.evaluate(
            out,
            data=held_out,
            reference=inputs.base,
            reference_adapter=inputs.adapter,
            sequence_length=32,
            tokens=256,
            device="cpu",
        )
        assert found.comparison is not None
        kl.append(found.comparison.kl)
    assert kl[0] < 0.8 * kl[1]


def test_what_is_kept_of_the_update_is_measured_where_it_was_rounded(
    inputs: Inputs, made: streamconv.Report
) -> None:
    """Update and base rescaled alike: <Q - B', D'> / ||D'||² with B' and D' of the scales that the output shows."""
    before, after = tensors(inputs.base), tensors(Path(made.out))
    name = f"{LAYER}.self_attn.q_proj"
    lora = tensors(inputs.adapter)
    down, up = (lora[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    delta = 2 * up @ down  # PEFT's alpha of 8, and rank 4
    norm = f"{LAYER}.input_layernorm.weight"
    scales = before[norm].double() / after[norm].double()
    (stored,) = [w for w in find_weights(index_of(Path(made.out))) if w.name == f"{name}.weight"]
    moved = decoded(stored).double() - before[f"{name}.weight"].double() * scales
    delta = delta * scales
    expected = float((moved * delta).sum() / delta.square().sum())
    assert made.kept_by_weight[f"{name}.weight"] == pytest.approx(expected, rel=1e-4)


def test_what_stays_in_16_bit_is_multiplied_as_well(inputs: Inputs, tmp_path: Path) -> None:
    """So it is with k_proj, which reads what was divided for the others."""
    out = inputs.merge(tmp_path / "out", rounding="nearest", ignore=["k_proj", "o_proj"]).out
    before, after = tensors(inputs.base), tensors(Path(out))
    norm, name = f"{LAYER}.input_layernorm.weight", f"{LAYER}.self_attn.k_proj.weight"
    assert not torch.equal(before[norm], after[norm])
    torch.testing.assert_close(
        (after[name] * after[norm]).double(), before[name].double() * before[norm], rtol=1e-5, atol=0
    )
    # Nobody is left to be eased by dividing the values.
    assert torch.equal(before[name.replace("k_", "o_")], after[name.replace("k_", "o_")])


# PEFT asks transformers in the old way.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_residual_adapter_is_that_of_the_rescaled_weights(inputs: Inputs, tmp_path: Path) -> None:
    options = {"quant": "nf4", "group_size": None, "rounding": "feedback"}
    found = inputs.merge(tmp_path / "out", **options, residual_rank=8)
    assert found.residual is not None
    windows = read_windows(inputs.folder / "text.txt", load_tokenizer(inputs.base), 8, 32)
    target: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(inputs.base), inputs.adapter
    ).eval()
    # In eval mode, bitsandbytes packs codes anew on some CPUs, and scales as bf16.
    alone: Any = AutoModelForCausalLM.from_pretrained(found.out).train()
    with torch.no_grad():
        wanted = target(windows).logits
        without = alone(windows).logits - wanted
        repaired = (
            PeftModel.from_pretrained(alone, Path(found.out) / RESIDUAL).train()(windows).logits - wanted
        )
    assert repaired.norm() < 0.8 * without.norm()


# -- what is told and checked -----------------------------------------------------------------------------------


def test_report_manifest_card_and_recipe_tell_of_it(made: streamconv.Report) -> None:
    producers = {
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
    }
    assert set(made.rescaled) == producers
    assert made.calibrated == {}
    for notes in made.rescaled.values():
        assert 0 < notes["alpha"] < 1
        assert notes["relative_error"] < notes["unscaled_error"]
    manifest = json.loads((Path(made.out) / "streamconv.json").read_text())
    assert manifest["rescaled"] == made.rescaled
    assert manifest["fingerprint"]["calibration"]["rescale"] == "awq"
    assert "| rescaling | awq, 8 pairs of weights" in (Path(made.out) / "README.md").read_text()
    recipe = json.loads((Path(made.out) / "streamconv-recipe.json").read_text())
    assert (recipe["rescale"], recipe["rounding"]) == ("awq", "nearest")


def test_a_finished_run_reports_the_same_again(made: streamconv.Report, inputs: Inputs) -> None:
    again = inputs.merge(Path(made.out), rounding="nearest")
    assert (again.rescaled, again.seconds) == (made.rescaled, 0)


def test_the_command_tells_of_it(made: streamconv.Report, inputs: Inputs) -> None:
    given = ("--base", inputs.base, "--adapter", inputs.adapter, "--device", "cpu", "-o", made.out)
    text = ("--calibration", inputs.folder / "text.txt", "--calibration-tokens", "256")
    how = ("--calibration-sequence-length", "32", "--quant", "w4a16", "--group-size", "32")
    shown = succeed("merge", *given, *text, *how, "--rounding", "nearest", "--rescale", "awq").stdout
    errors = [
        math.sqrt(sum(each[key] ** 2 for each in made.rescaled.values()) / 8)
        for key in ("relative_error", "unscaled_error")
    ]
    assert f"8 pairs of weights rescaled: nearest rounding changes what they feed by {errors[0]:.1%}" in shown
    assert f" where it was {errors[1]:.1%}" in shown


def test_the_recipe_asks_for_the_same(made: streamconv.Report, inputs: Inputs) -> None:
    recipe = Path(made.out) / "streamconv-recipe.json"
    inputs_given = ("--base", inputs.base, "--adapter", inputs.adapter, "--device", "cpu")
    text = ("--calibration", inputs.folder / "text.txt")
    plan = json.loads(succeed("plan", "--recipe", recipe, *inputs_given, *text, "--json").stdout)
    assert plan["digest"] == json.loads((Path(made.out) / "streamconv.json").read_text())["digest"]
    printed = json.loads(
        succeed("merge", "--recipe", recipe, *inputs_given, *text, "-o", "x", "--print-recipe").stdout
    )
    assert printed["rescale"] == "awq"


def test_with_the_text_all_bytes_are_made_again(made: streamconv.Report, inputs: Inputs) -> None:
    assert inputs.verify(made.out, calibration=inputs.folder / "text.txt").exact
    with pytest.raises(
        OptionError, match=r"was rescaled by its calibration text, .* give it with --calibration"
    ):
        inputs.verify(made.out)


def test_another_scale_is_noticed(
    made: streamconv.Report, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(magnitudes: Tensor, alpha: float) -> Tensor:
        return torch.full_like(magnitudes, 1.0 + alpha, dtype=torch.float32)

    monkeypatch.setattr("streamconv.equalization.awq.candidate", other)
    with pytest.raises(VerificationError, match="differs from what base, adapter and options give"):
        inputs.verify(made.out, calibration=inputs.folder / "text.txt")
