"""The residual adapter from options to a verified output that PEFT opens: made, refused, stored, checked, replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import streamconv
from streamconv.calibration.residual_adapter import removed_share
from streamconv.errors import OptionError, ResourceError, VerificationError
from streamconv.output import publish
from streamconv.output.sidecars import RESIDUAL, RESIDUAL_CONFIG, RESIDUAL_TENSORS
from streamconv.output.verifier import Verified
from streamconv.pipeline import build_job, prepare, verification
from streamconv.pipeline.residual import ResidualAdapter, make_residual
from streamconv.pipeline.shown import plan_as_json, plan_as_text
from tests.cli.calls import succeed
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import llama_config, save_adapter, save_base

RANK = 4
TEXT: dict[str, Any] = {"calibration_tokens": 256, "calibration_sequence_length": 32}
ASKED: dict[str, Any] = {"quant": "nf4-dq", "merge_base": "nf4-dq", "residual_rank": RANK, "device": "cpu"}
MODULES = {
    f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base, so that 4-bit layers compute in float32."""
    folder = tmp_path_factory.mktemp("residual")
    save_tokenizer(save_base(folder / "base", llama_config(), dtype=torch.float32))
    lora = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", folder / "base", lora)
    write_text(folder / "text.txt", 300)
    return folder


def merged(folder: Path, out: Path, **options: Any) -> streamconv.Report:
    given = {"calibration": folder / "text.txt", **TEXT, **ASKED, **options}
    return streamconv.merge(folder / "base", folder / "adapter", out, **given)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> streamconv.Report:
    return merged(folder, tmp_path_factory.mktemp("made") / "out")


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# -- what is stored ----------------------------------------------------------------------------------------------------


# PEFT asks transformers in the old way.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_it_and_logits_are_those_of_codes_and_factors(made: streamconv.Report) -> None:
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        # In eval mode, bitsandbytes packs codes anew on some CPUs, and scales as bf16.
        alone: Any = AutoModelForCausalLM.from_pretrained(made.out).train()
        without = alone(tokens).logits
        theirs = PeftModel.from_pretrained(alone, Path(made.out) / RESIDUAL).train()(tokens).logits
        ours = by_hand(made.out)(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (without - ours).abs().max() > 100 * (theirs - ours).abs().max()


def by_hand(out: str) -> Any:
    """The output with Q + B A in place of the layers that have factors, and Q in place of the other packed ones."""
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    factors = load_file(Path(out) / RESIDUAL_TENSORS)
    for path, module in [*model.named_modules()]:
        if not hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
            continue
        weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        if path in MODULES:
            name = f"base_model.model.{path}"
            down, up = (factors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
            weight = weight + up.float() @ down.float()
        dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        dense.weight.data = weight
        model.set_submodule(path, dense)
    return model


def test_it_says_what_it_is(made: streamconv.Report) -> None:
    config = json.loads((Path(made.out) / RESIDUAL_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, RANK, "LORA")
    assert set(config["target_modules"]) == MODULES
    tensors = load_file(Path(made.out) / RESIDUAL_TENSORS)
    assert len(tensors) == 2 * len(MODULES)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(min(tensor.shape) == RANK for tensor in tensors.values())


def test_without_it_the_model_is_as_ever(made: streamconv.Report) -> None:
    """Beside config.json, transformers would load an adapter unasked."""
    model: Any = AutoModelForCausalLM.from_pretrained(made.out)
    assert not getattr(model, "_hf_peft_config_loaded", False)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_report_manifest_and_card_tell_of_it(made: streamconv.Report) -> None:
    path = Path(made.out) / RESIDUAL_TENSORS
    assert made.residual is not None
    assert {key: made.residual[key] for key in ("rank", "weights", "bytes")} == {
        "rank": RANK,
        "weights": len(MODULES),
        "bytes": path.stat().st_size,
    }
    notes = made.calibrated.values()
    before, after = (sum(each[key] for each in notes) for key in ("loss", "repaired_loss"))
    assert made.residual["removed"] == pytest.approx(1 - after / before)
    assert 0.1 < made.residual["removed"] < 1
    manifest = json.loads((Path(made.out) / "streamconv.json").read_text())
    assert manifest["residual"] == made.residual
    assert {RESIDUAL_CONFIG, RESIDUAL_TENSORS} <= set(manifest["files"])
    assert manifest["fingerprint"]["calibration"]["options"]["residual_rank"] == RANK
    card = (Path(made.out) / "README.md").read_text()
    assert "| residual adapter | rank 4, " in card
    assert 'PeftModel.from_pretrained(model, "residual")' in card
    assert json.loads((Path(made.out) / "streamconv-recipe.json").read_text())["residual-rank"] == RANK


def test_the_plan_tells_of_it_and_counts_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"calibration": folder / "text.txt", **TEXT, **ASKED}
    given["calibration_gradient_tokens"] = 0
    plans = [
        prepare(build_job(folder / "base", folder / "adapter", **{**given, "residual_rank": rank}))
        for rank in (0, RANK)
    ]
    without, with_it = (each.plan for each in plans)
    factors = 2 * RANK * sum(step.rows + step.columns for step in with_it.calibrated)
    assert with_it.residual_bytes == factors
    assert with_it.digest != without.digest
    assert with_it.passes
    assert without.passes
    assert with_it.passes_need.disk - without.passes_need.disk == factors
    assert with_it.passes_need.ram - without.passes_need.ram == factors // 2  # those of a layer
    monkeypatch.setattr("streamconv.rounding.residual.working_bytes", lambda *_: 2**29)
    with pytest.raises(ResourceError, match="--max-ram 537 MB is too small"):
        prepare(build_job(folder / "base", folder / "adapter", **given, max_ram="512MiB"))
    assert f"residual  adapter of rank {RANK} for 4 weights" in plan_as_text(plans[1])
    assert plan_as_json(plans[0])["residual"] is None
    assert plan_as_json(plans[1])["residual"] == {"rank": RANK, "bytes": factors, "lossless_unmerged": True}


@pytest.mark.parametrize(
    ("options", "loses"),
    [
        ({}, False),
        ({"merge_base": "original"}, True),
        ({"merge_base": "nf4"}, True),
        ({"quant": "nf4"}, True),
    ],
)
def test_it_says_where_not_to_merge_would_lose_nothing(
    folder: Path, options: Mapping[str, Any], loses: bool
) -> None:
    """T is the base's own codes and the adapter."""
    given: dict[str, Any] = {"calibration": folder / "text.txt", **TEXT, **ASKED, **options}
    prepared = prepare(build_job(folder / "base", folder / "adapter", **given))
    assert ("not to merge loses nothing" in plan_as_text(prepared)) is not loses


def test_a_finished_run_reports_the_same_again(made: streamconv.Report, folder: Path) -> None:
    again = merged(folder, Path(made.out))
    assert (again.residual, again.seconds) == (made.residual, 0)


def test_the_command_asks_for_the_same(made: streamconv.Report, folder: Path) -> None:
    inputs = (
        "--base",
        folder / "base",
        "--adapter",
        folder / "adapter",
        "--calibration",
        folder / "text.txt",
    )
    text = ("--calibration-tokens", "256", "--calibration-sequence-length", "32", "--merge-base", "nf4-dq")
    result = ("--quant", "nf4-dq", "--residual-rank", f"{RANK}", "--device", "cpu", "-o", made.out)
    shown = succeed("merge", *inputs, *text, *result).stdout
    assert "was complete already" in shown
    assert f"{made.out}/residual: an adapter of rank 4, " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "none", "merge_base": "original"}, "the output is not quantized, so it has none"),
        ({"quant": "int8"}, "calibration text cannot be used for int8"),
        ({"residual_rank": -1}, "--residual-rank -1 is negative"),
        ({"residual_rank": 32}, r"--residual-rank 32 is too high: model\.layers\.0\.\S+ is 32 x 72"),
    ],
)
def test_refusals(folder: Path, options: Mapping[str, Any], message: str) -> None:
    given: dict[str, Any] = {"calibration": folder / "text.txt", **TEXT, **ASKED, **options}
    with pytest.raises(OptionError, match=message):
        prepare(build_job(folder / "base", folder / "adapter", **given))


def test_without_text_it_says_what_to_do(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"--residual-rank 4 repairs .* give one with --calibration FILE"):
        build_job(folder / "base", folder / "adapter", **ASKED)


def test_nothing_to_repair_is_no_share() -> None:
    assert removed_share([{"loss": 0.0, "repaired_loss": 0.0}, {}]) is None
    assert removed_share([{"loss": 3.0, "repaired_loss": 1.0}, {"loss": 1.0, "repaired_loss": 1.0}]) == 0.5


# -- what interrupts and replaces it ----------------------------------------------------------------------------------


def test_interrupted_while_it_is_published(
    made: streamconv.Report, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left = tmp_path / "out", [RESIDUAL_TENSORS, RESIDUAL_CONFIG, "config.json"]

    def interrupted(given: Any) -> Any:
        def act(*arguments: Any) -> None:
            if left and out / left[0] in arguments:
                raise KeyboardInterrupt
            given(*arguments)

        return act

    for name in ("publish",):
        monkeypatch.setattr(publish, name, interrupted(getattr(publish, name)))
    while left:
        with pytest.raises(KeyboardInterrupt):
            merged(folder, out)
        assert not (out / left.pop(0)).exists()
    assert merged(folder, out).resumed
    assert contents(out) == contents(Path(made.out))


def test_another_model_takes_it_away(made: streamconv.Report, folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    (out / RESIDUAL / "notes.txt").write_text("mine")
    for _ in range(2):
        streamconv.merge(folder / "base", folder / "adapter", out, overwrite=True)
        assert [path.name for path in out.glob(f"{RESIDUAL}/*")] in (["notes.txt"], [])
        (out / RESIDUAL / "notes.txt").unlink(missing_ok=True)
    assert not (out / RESIDUAL).exists()


def test_a_link_in_its_place_is_not_followed(made: streamconv.Report, folder: Path, tmp_path: Path) -> None:
    out, elsewhere = Path(shutil.copytree(made.out, tmp_path / "out")), tmp_path / "elsewhere"
    (out / RESIDUAL).rename(elsewhere)
    (out / RESIDUAL).symlink_to(elsewhere)
    streamconv.merge(folder / "base", folder / "adapter", out, overwrite=True)
    assert not (out / RESIDUAL).is_symlink()
    assert not (out / RESIDUAL).exists()
    assert len([*elsewhere.iterdir()]) == 2


# -- what verify finds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RESIDUAL_TENSORS, RESIDUAL_CONFIG])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_what_was_done_to_it_is_noticed(made: streamconv.Report, tmp_path: Path, name: str, how: str) -> None:
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    raw = bytearray((out / name).read_bytes())
    raw[-2] ^= 1
    (out / name).unlink() if how == "removed" else (out / name).write_bytes(raw)
    with pytest.raises(VerificationError, match=f"{name} was {how}"):
        streamconv.verify(out)


def test_with_the_text_it_is_made_again(
    made: streamconv.Report, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bytes that are stated, and of others it says so."""
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    raw = bytearray((out / RESIDUAL_TENSORS).read_bytes())
    raw[-2] ^= 1
    (out / RESIDUAL_TENSORS).write_bytes(raw)
    again: list[ResidualAdapter | None] = []

    def watched(*given: Any) -> ResidualAdapter | None:
        again.append(make_residual(*given))
        return again[0]

    monkeypatch.setattr(verification, "make_residual", watched)
    monkeypatch.setattr(verification, "verify_output", lambda *_: Verified(1, 1, 1, exact=False))
    given: dict[str, Any] = {name: folder / name for name in ("base", "adapter")}
    with pytest.raises(VerificationError, match=r"adapter_model\.safetensors differs from what base"):
        streamconv.verify(out, full=True, **given, calibration=folder / "text.txt", device="cpu")
    manifest = json.loads((out / "streamconv.json").read_text())
    assert again[0] is not None
    assert manifest["files"][RESIDUAL_TENSORS] == again[0].entry


def test_a_base_alone_can_have_one(folder: Path, tmp_path: Path) -> None:
    found = streamconv.convert(
        folder / "base",
        tmp_path / "out",
        quant="nf4",
        calibration=folder / "text.txt",
        residual_rank=2,
        device="cpu",
        **TEXT,
    )
    assert found.residual is not None
    assert found.residual["weights"] == 14
    assert len(load_file(Path(found.out) / RESIDUAL_TENSORS)) == 28
