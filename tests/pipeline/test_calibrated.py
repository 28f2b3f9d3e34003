"""Calibrated merges from options to a verified output: what is chosen, refused, stored, reported and checked."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import streamconv
from streamconv.checkpoint.index import read_index
from streamconv.errors import (
    InputError,
    OptionError,
    ResourceError,
    StreamconvError,
    VerificationError,
)
from streamconv.formats import find_weights
from streamconv.output.journal import WORK_FOLDER
from streamconv.output.verifier import Verified
from streamconv.pipeline import Prepared, build_job, prepare
from streamconv.pipeline.shown import about, plan_as_json, plan_as_text
from streamconv.planning.plan import Access
from streamconv.storage.data_sets import data_set_of
from streamconv.storage.local import open_folder
from tests.cli.calls import run, succeed
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import llama_config, read_tensors, save_adapter, save_base

TEXT: dict[str, Any] = {"calibration_tokens": 256, "calibration_sequence_length": 32}
ON_GRID: dict[str, Any] = {"quant": "nf4-dq", "merge_base": "nf4-dq"}
VERIFIED = Verified(1, 1, 1, exact=False)
ADAPTED = {
    f"model.layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "mlp.down_proj")
}


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path
    text: Path

    def prepare(self, adapter: bool = True, **options: Any) -> Prepared:
        given = {"calibration": self.text, **TEXT, "device": "cpu", **options}
        return prepare(build_job(self.base, self.adapter if adapter else None, **given))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("calibrated")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    return Inputs(base, folder / "adapter", write_text(folder / "text.txt", 300))


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def made(
    inputs: Inputs, progress: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> streamconv.Report:
    return streamconv.merge(
        inputs.base,
        inputs.adapter,
        tmp_path_factory.mktemp("made") / "out",
        calibration=inputs.text,
        device="cpu",
        on_progress=lambda done, total: progress.append((done, total)),
        **TEXT,
        **ON_GRID,
    )


def calibrated(prepared: Prepared) -> set[str]:
    return {step.name for step in prepared.plan.calibrated}


# -- what is chosen ------------------------------------------------------------------------------------------------


def test_on_its_own_grid_only_what_is_updated_is_calibrated(inputs: Inputs) -> None:
    prepared = inputs.prepare(**ON_GRID)
    assert calibrated(prepared) == ADAPTED
    assert prepared.plan.rounding is not None
    assert prepared.plan.rounding.name == "feedback"
    assert all(step.access is Access.CALIBRATED for step in prepared.plan.calibrated)
    assert {step.rounding.name for step in prepared.plan.calibrated if step.rounding} == {"adaptive"}


def test_off_the_grid_all_linear_layers_of_decoder_layers_are(inputs: Inputs) -> None:
    for adapter in (True, False):
        names = calibrated(inputs.prepare(adapter, quant="nf4"))
        assert len(names) == 14
        assert all(name.startswith("model.layers.") for name in names)


def test_the_update_is_preserved_where_that_is_asked_for(inputs: Inputs) -> None:
    def preserved(**options: Any) -> float:
        plan = inputs.prepare(**options).plan
        assert plan.calibration is not None
        assert plan.calibration.options is not None
        return plan.calibration.options.preserve_delta

    assert preserved(**ON_GRID) == preserved(**ON_GRID, preserve_delta="auto") == 0
    assert preserved(**ON_GRID, preserve_delta="0.25") == 0.25


def test_sequences_are_as_long_as_the_model_allows(inputs: Inputs) -> None:
    plan = inputs.prepare(**ON_GRID, calibration_tokens=300, calibration_sequence_length=None).plan
    assert plan.calibration is not None
    assert (plan.calibration.sequence_length, plan.calibration.tokens) == (64, 256)


def test_of_several_outputs_the_first_that_can_is_calibrated(inputs: Inputs) -> None:
    plans = inputs.prepare(quant="none", also=("int8", "nf4-dq", "fp4")).plans
    assert [plan.calibration is not None for plan in plans] == [False, False, True, False]
    assert [plan.rounding.name if plan.rounding else None for plan in plans] == [
        None,
        "nearest",
        "feedback",
        "nearest",
    ]
    alone = inputs.prepare(
        quant="fp4", calibration=None, calibration_tokens=65536, calibration_sequence_length=None
    )
    assert plans[3].digest == alone.plan.digest


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "feedback", "calibration": None}, OptionError, "give one with --calibration FILE"),
        ({"rounding": "nearest"}, OptionError, "--rounding nearest has no use for calibration text"),
        ({"quant": "none"}, OptionError, "the output is not quantized; add --quant"),
        (
            {"quant": "int8"},
            OptionError,
            "cannot be used for int8, .* choose --quant nf4, nf4-dq, fp4, fp4-dq, w4a16",
        ),
        ({"calibration": None, "calibration_tokens": 99}, OptionError, "are about calibration text; add"),
        ({"preserve_delta": "much"}, OptionError, "--preserve-delta much must be auto or a number"),
        ({"preserve_delta": -1}, OptionError, "--preserve-delta -1 must be"),
        ({"calibration_tokens": 128}, OptionError, r"has 72 inputs, .* give 160 or more"),
        ({"calibration_gradient_tokens": -1}, OptionError, "-1 is negative; give 0 or more"),
        ({"calibration_tokens": 20}, OptionError, "is less than one sequence"),
        ({"calibration_sequence_length": 8}, OptionError, "is too short; give 16 or more"),
        ({"calibration_sequence_length": 65}, OptionError, "more than the 64 positions"),
        ({"calibration": "nowhere.txt"}, InputError, "--calibration nowhere.txt is no file"),
        ({"max_ram": "120MiB"}, ResourceError, r"--max-ram .* is too small to calibrate .* allow that much"),
        ({"rounding": "feedback", "also": ("fp4",)}, OptionError, "calibrates one output of a run"),
    ],
)
def test_refusals(
    inputs: Inputs, options: Mapping[str, Any], error: type[StreamconvError], message: str
) -> None:
    text: dict[str, Any] = (
        {} if options.get("calibration", inputs.text) is None else {"calibration": inputs.text, **TEXT}
    )
    with pytest.raises(error, match=message):
        prepare(build_job(inputs.base, inputs.adapter, **{**ON_GRID, **text, **options}))


def test_codes_that_all_stay_are_no_work_for_a_text(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.convert(inputs.base, tmp_path / "nf4", quant="nf4")
    with pytest.raises(OptionError, match="calibration text would change nothing"):
        prepare(build_job(tmp_path / "nf4", calibration=inputs.text, **TEXT))


def test_without_the_libraries_the_plan_says_so(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.pipeline.calibrating.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"calibration needs transformers and accelerate, .* \[eval\]|eval"):
        inputs.prepare(**ON_GRID)


def test_too_short_a_text_ends_the_run(inputs: Inputs, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", 200)
    with pytest.raises(InputError, match=r"has 200 tokens, .* --calibration-tokens 192"):
        streamconv.merge(inputs.base, inputs.adapter, tmp_path / "out", calibration=short, **TEXT, **ON_GRID)
    assert not (tmp_path / "out" / "config.json").exists()


# -- what makes a run the same ----------------------------------------------------------------------------------------


def test_all_that_changes_bytes_counts(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_text(tmp_path / "text.txt", 301)
    digests = [
        inputs.prepare(**ON_GRID).plan.digest,
        inputs.prepare(**ON_GRID, calibration=other).plan.digest,
        inputs.prepare(**ON_GRID, calibration_tokens=224).plan.digest,
        inputs.prepare(**ON_GRID, calibration_sequence_length=16).plan.digest,
        inputs.prepare(**ON_GRID, preserve_delta=0.5).plan.digest,
        inputs.prepare(**ON_GRID, calibration_gradient_tokens=0).plan.digest,
        inputs.prepare(**ON_GRID, calibration_gradient_tokens=64).plan.digest,
    ]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3, 4})
    digests.append(inputs.prepare(**ON_GRID).plan.digest)
    monkeypatch.setattr("transformers.__version__", "99.0")
    digests.append(inputs.prepare(**ON_GRID).plan.digest)
    assert len(set(digests)) == len(digests)


def test_where_the_text_lies_and_budgets_do_not(inputs: Inputs, tmp_path: Path) -> None:
    moved = Path(shutil.copy(inputs.text, tmp_path))
    expected = inputs.prepare(**ON_GRID).plan.digest
    others: tuple[dict[str, Any], ...] = (
        {"calibration": moved},
        {"max_ram": "2GiB"},
        {"calibration_tokens": 270},
    )
    for options in others:
        assert inputs.prepare(**{**ON_GRID, **options}).plan.digest == expected


# -- what is planned and told ------------------------------------------------------------------------------------------


def test_the_plan_tells_what_the_first_pass_needs(inputs: Inputs) -> None:
    prepared = inputs.prepare(**ON_GRID)
    need = prepared.plan.passes_need
    text = plan_as_text(prepared)
    assert "text.txt: 256 tokens in sequences of 32, gradients of 256, for 4 weights" in text
    assert "its pass needs" in text
    assert f"choosing codes takes about {about(need.seconds)}, by rates that are assumed" in text
    found = plan_as_json(prepared)
    assert found["calibration"]["need"]["ram"] == need.ram
    assert found["peak_ram_bytes"] == max(need.ram, prepared.plan.memory.ram)
    assert found["read_bytes"] > need.read > 0
    assert set(found["calibration"]["weights"]) == ADAPTED


def test_progress_goes_on_through_both_passes(
    made: streamconv.Report, progress: list[tuple[int, int]], inputs: Inputs
) -> None:
    (total,) = {total for _, total in progress}
    plan = inputs.prepare(**ON_GRID).plan
    assert [each.name for each in plan.passes] == ["calibrate"]
    assert total == plan.passes_need.read + made.bytes_written == progress[-1][0]
    assert progress == sorted(progress)


def test_the_report_and_the_manifest_tell_what_became_of_each_weight(
    made: streamconv.Report, inputs: Inputs
) -> None:
    assert made.rounding == "feedback"
    assert set(made.calibrated) == set(made.kept_by_weight) == ADAPTED
    for notes in made.calibrated.values():
        assert 0 < notes["relative_error"] < 0.2
        assert 0.5 < notes["kept_h"] < 1.5
    assert made.kept_delta is not None
    assert made.kept_delta > 0.8
    assert made.calibration is not None
    assert made.calibration["name"] == "text.txt"
    manifest = json.loads((Path(made.out) / "streamconv.json").read_text())
    assert manifest["calibration"] == manifest["fingerprint"]["calibration"] == made.calibration
    assert manifest["calibrated"] == made.calibrated
    assert str(inputs.text.parent) not in (Path(made.out) / "streamconv.json").read_text()
    assert "| calibration text | text.txt (SHA-256 " in (Path(made.out) / "README.md").read_text()
    assert not (Path(made.out) / WORK_FOLDER).exists()


def test_a_finished_run_reports_the_same_again(made: streamconv.Report, inputs: Inputs) -> None:
    again = streamconv.merge(
        inputs.base, inputs.adapter, made.out, calibration=inputs.text, device="cpu", **TEXT, **ON_GRID
    )
    assert (again.calibrated, again.kept_delta, again.seconds) == (made.calibrated, made.kept_delta, 0)


def test_the_recipe_makes_it_again(made: streamconv.Report, inputs: Inputs, tmp_path: Path) -> None:
    recipe = Path(made.out) / "streamconv-recipe.json"
    options = json.loads(recipe.read_text())
    assert (options["rounding"], options["min-kept"]) == ("feedback", 0.2)
    assert "calibration" not in options
    given = ("--recipe", recipe, "--base", inputs.base, "--adapter", inputs.adapter, "-o", tmp_path / "again")
    assert "--calibration FILE" in run("merge", *given).stderr
    plan = json.loads(
        succeed("plan", *given, "--calibration", inputs.text, "--device", "cpu", "--json").stdout
    )
    manifest = json.loads((Path(made.out) / "streamconv.json").read_text())
    assert plan["digest"] == manifest["digest"]
    printed = succeed("merge", *given, "--calibration", inputs.text, "--print-recipe").stdout
    assert json.loads(printed)["calibration"] == str(inputs.text)


# -- search, weighed by the text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"quant": "nf4"}, {"quant": "nf4-dq", "merge_base": "nf4-dq"}], ids=str)
def test_search_is_weighed_by_the_text(inputs: Inputs, tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"rounding": "search", "device": "cpu", **options}
    text = {"calibration": inputs.text, **TEXT}
    plan = inputs.prepare(**{**text, **given}).plan
    assert plan.rounding is not None
    assert (plan.rounding.name, plan.rounding.reason) == (
        "search",
        "asked for by name, with errors weighed by the text",
    )
    assert plan.calibration is not None
    assert plan.calibration.gradient_tokens == 0
    without = streamconv.merge(inputs.base, inputs.adapter, tmp_path / "without", **given)
    found = streamconv.merge(inputs.base, inputs.adapter, tmp_path / "with", **given, **text)
    assert found.calibrated.keys() == calibrated(inputs.prepare(**{**text, **given}))
    ours, others = (read_tensors(Path(each.out) / "model.safetensors") for each in (found, without))
    differ = {name for name in ours if not torch.equal(ours[name], others[name])}
    assert differ >= ADAPTED
    assert not [name for name in differ if "layers" not in name]
    errors = [each["relative_error"] for each in found.calibrated.values()]
    assert 0 < max(errors) < 0.2
    for data in (None, inputs.text):
        streamconv.verify(found.out, base=inputs.base, adapter=inputs.adapter, full=True, calibration=data)


@pytest.mark.parametrize("more", [{"preserve_delta": 0.3}, {"residual_rank": 2}], ids=str)
def test_search_knows_nothing_of_what_feedback_does(inputs: Inputs, more: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="--rounding search knows neither"):
        inputs.prepare(quant="nf4", rounding="search", **more)


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_transformers_opens_it_and_bitsandbytes_decodes_what_we_do(made: streamconv.Report) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(made.out, device_map="cpu")
    weights = {weight.name: weight for weight in find_weights(read_index(open_folder(made.out)))}
    tensors = read_tensors(Path(made.out) / "model.safetensors")
    for name in ADAPTED:
        parameter = model.get_submodule(name.removesuffix(".weight")).weight
        state = parameter.quant_state
        # As one row: with AVX-512, bitsandbytes 0.50.2 is wrong where blocks run across row ends.
        state.shape = torch.Size([1, math.prod(state.shape)])
        theirs = bnb.dequantize_4bit(parameter.data, state)
        weight = weights[name]
        side = {role: tensors[part.name] for role, part in weight.parts.items() if role != "weight"}
        raw = tensors[name].view(torch.uint8).flatten()
        ours = torch.empty(weight.shape)
        weight.decoder.decode(raw, range(weight.shape[0]), weight.decoder.scales(side), ours)
        assert torch.equal(ours, theirs.float().view(ours.shape))


# -- what verify finds -------------------------------------------------------------------------------------------------


def test_verified_without_the_text(made: streamconv.Report, inputs: Inputs) -> None:
    seen: list[tuple[int, int]] = []
    found = streamconv.verify(
        made.out,
        full=True,
        base=inputs.base,
        adapter=inputs.adapter,
        on_progress=lambda *told: seen.append(told),
    )
    assert (found.exact, found.calibrated) == (False, 4)
    check_progress(seen)
    # Each weight that is weighed moves it on.
    assert len({done for done, _ in seen[-5:]}) == 5
    shown = succeed("verify", made.out, "--full", "--base", inputs.base, "--adapter", inputs.adapter).stdout
    assert "but for 4 calibrated weights" in shown


def check_progress(seen: list[tuple[int, int]]) -> None:
    """From nothing to all, and what all is was known at the start."""
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[0][1]}
    assert (seen[0][0], seen[-1][0]) == (0, seen[0][1])


def test_verified_with_the_text_byte_by_byte(made: streamconv.Report, inputs: Inputs, tmp_path: Path) -> None:
    given: dict[str, Any] = {"full": True, "base": inputs.base, "adapter": inputs.adapter}
    seen: list[tuple[int, int]] = []
    found = streamconv.verify(
        made.out,
        **given,
        calibration=inputs.text,
        device="cpu",
        on_progress=lambda *told: seen.append(told),
    )
    assert (found.exact, found.calibrated) == (True, 0)
    check_progress(seen)
    listed = sum(path.stat().st_size for path in Path(made.out).rglob("*") if path.name != "streamconv.json")
    # Beyond rereading and comparing, the pass moves it on.
    steps = [done for done, _ in seen if done > listed]
    assert len(set(steps)) > 10
    assert seen[-1][1] > listed + made.bytes_written
    other = write_text(tmp_path / "other.txt", 301)
    with pytest.raises(InputError, match="is not the text"):
        streamconv.verify(made.out, **given, calibration=other)
    with pytest.raises(OptionError, match="for a full verification; add --full"):
        streamconv.verify(made.out, calibration=inputs.text)


@pytest.mark.parametrize("with_text", [False, True])
def test_other_codes_are_noticed(
    made: streamconv.Report, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_text: bool
) -> None:
    """Codes of another weight, with hashes to match: they decode well, and keep nothing of this update."""
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    shard = out / "model.safetensors"
    q, k = (f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "o_proj"))
    tensors = read_tensors(shard)
    raw = bytearray(shard.read_bytes())
    place = raw.find(tensors[q].numpy().tobytes())
    raw[place : place + tensors[q].numel()] = tensors[k].numpy().tobytes()
    shard.write_bytes(raw)
    monkeypatch.setattr("streamconv.pipeline.verification.verify_output", lambda *given: VERIFIED)
    text: dict[str, Any] = {"calibration": inputs.text, "device": "cpu"} if with_text else {}
    with pytest.raises(VerificationError, match=q):
        streamconv.verify(out, full=True, base=inputs.base, adapter=inputs.adapter, **text)


def test_an_output_without_text_takes_none(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "out", quant="nf4")
    given: dict[str, Any] = {"full": True, "base": inputs.base, "adapter": inputs.adapter}
    with pytest.raises(OptionError, match="made without calibration text"):
        streamconv.verify(tmp_path / "out", **given, calibration=inputs.text)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_beside_other_outputs_the_bytes_are_the_same(
    made: streamconv.Report, inputs: Inputs, tmp_path: Path
) -> None:
    report = streamconv.merge(
        inputs.base,
        inputs.adapter,
        tmp_path / "out",
        calibration=inputs.text,
        device="cpu",
        also=("none",),
        **TEXT,
        **ON_GRID,
    )
    assert report.shards == made.shards
    assert report.calibrated == made.calibrated
    assert report.also["none"].calibration is None


def test_the_gate_is_that_of_auto(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="survives feedback rounding"):
        streamconv.merge(
            inputs.base,
            inputs.adapter,
            tmp_path / "out",
            calibration=inputs.text,
            min_kept=1.0,
            preserve_delta=0,
            device="cpu",
            **TEXT,
            **ON_GRID,
        )
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_data_set_is_read_at_the_commit_it_was_planned_with(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = f"org/texts@{'0123456789' * 4}:test"
    monkeypatch.setattr("streamconv.pipeline.calibrating.find_spec", lambda _: object())
    monkeypatch.setattr("streamconv.pipeline.calibrating.pinned", lambda _: data_set_of(pinned))
    text = inputs.prepare(calibration="org/texts:test", **ON_GRID).plan.calibration
    assert text is not None
    assert (text.data, text.name, text.is_data_set) == (pinned, pinned, True)


@pytest.mark.parametrize(
    ("base", "quant"),
    [
        ("nf4", "nf4-dq"),
        ("fp4-dq", "fp4"),
        ("int8", "nf4"),
        ("nf4-dq", "fp4-dq"),
        ("fp8", "keep"),
        ("fp8-block", "keep"),
    ],
)
def test_every_base_that_can_be_read(inputs: Inputs, tmp_path: Path, base: str, quant: str) -> None:
    place = Path(streamconv.convert(inputs.base, tmp_path / "base", quant=base, device="cpu").out)
    given: dict[str, Any] = {"calibration": inputs.text, "device": "cpu"}
    made = streamconv.merge(place, inputs.adapter, tmp_path / "out", quant=quant, **given, **TEXT)
    assert made.rounding == "feedback"
    assert set(made.calibrated) >= ADAPTED
    assert all(0 < made.calibrated[name]["relative_error"] < 0.3 for name in ADAPTED)
    checked = streamconv.verify(made.out, full=True, base=place, adapter=inputs.adapter, **given)
    assert checked.exact


def test_integers_in_groups(inputs: Inputs, tmp_path: Path) -> None:
    """Off their grid and on it. down_proj has rows of 72, no whole groups, and stays in 16 bit."""
    given: dict[str, Any] = {"calibration": inputs.text, "calibration_gradient_tokens": 0, "device": "cpu"}
    options: dict[str, Any] = {"quant": "w8a16", "group_size": 32}
    eight = streamconv.merge(inputs.base, inputs.adapter, tmp_path / "8", **options, **given, **TEXT)
    options = {"quant": "w4a16", "group_size": 32}
    base = streamconv.convert(inputs.base, tmp_path / "base", **options, device="cpu").out
    four = streamconv.merge(base, inputs.adapter, tmp_path / "4", **given, **TEXT)
    expected = {name for name in ADAPTED if "q_proj" in name}
    for made, limit in ((eight, 0.02), (four, 0.3)):
        assert made.rounding == "feedback"
        assert set(made.calibrated) & ADAPTED == expected
        assert all(0 < made.calibrated[name]["relative_error"] < limit for name in expected)
    checked = streamconv.verify(
        four.out, full=True, base=base, adapter=inputs.adapter, calibration=inputs.text, device="cpu"
    )
    assert checked.exact
