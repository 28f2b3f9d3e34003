"""Whole comparisons of tiny models: the numbers are those of `evaluate`, of a plain loop, and of the files."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors import safe_open
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

import streamconv
from streamconv import comparison
from streamconv.checkpoint.writer import free_bytes
from streamconv.comparison import Compared, Speed, running
from streamconv.comparison.loading import measure
from streamconv.comparison.speed import Opened, measure_speed
from streamconv.comparison.store import Store
from streamconv.errors import (
    InputError,
    OptionError,
    OutputError,
    ResourceError,
    Stopped,
    VerificationError,
)
from streamconv.evaluation import Evaluation, EvaluationOptions
from streamconv.evaluation.scoring import run_evaluation
from streamconv.output.journal import Journal, is_owned
from streamconv.progress import OnProgress, StopRequest
from tests.forward.texts import numbers, save_tokenizer, write_text
from tests.hub_stub import Hub
from tests.hubs import hub
from tests.tiny import llama_config, save_adapter, save_base

__all__ = ["hub"]

LENGTH, COUNT = 32, 3
CALIBRATION: dict[str, Any] = {
    "calibration_tokens": 160,
    "calibration_sequence_length": 32,
    "calibration_gradient_tokens": 32,
}
EVALUATION: dict[str, Any] = {"sequence_length": LENGTH, "tokens": LENGTH * COUNT, "greedy_tokens": 2}
CHOSEN = "base,unmerged-F,unmerged-T,16bit-T,nearest-T,feedback-T,int8-F"


@dataclass(frozen=True)
class Models:
    base: Path
    adapter: Path
    text: Path

    def compare(self, out: Path, strategies: str | None = "base,nearest-T", **options: Any) -> Compared:
        given = {"data": self.text, "speed": False, "device": "cpu", **EVALUATION, **options}
        return streamconv.compare(self.base, self.adapter, out, strategies=strategies, **given)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("compared")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(folder / "adapter", base, lora).path
    return Models(base, adapter, write_text(folder / "text.txt"))


@pytest.fixture(scope="module")
def kept(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """With every model still there."""
    out = tmp_path_factory.mktemp("kept") / "out"
    return models.compare(out, CHOSEN, calibration=models.text, keep=True, **CALIBRATION)


def evaluated(models: Models, **subject: Any) -> streamconv.Evaluation:
    reference: dict[str, Any] = {
        "reference": models.base,
        "reference_adapter": models.adapter,
        "reference_merge_base": "nf4-dq",
    }
    return streamconv.evaluate(data=models.text, device="cpu", **subject, **reference, **EVALUATION)


def of_model(kept: Compared, name: str) -> Path:
    return Path(kept.out) / "models" / name


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_every_row_is_done(kept: Compared) -> None:
    assert [row.name for row in kept.rows] == CHOSEN.split(",")
    assert [(row.status, row.failure) for row in kept.rows] == [("done", None)] * len(kept.rows)
    assert kept.exit_code == 0


@pytest.mark.parametrize("name", CHOSEN.split(","))
def test_numbers_are_those_of_an_evaluation(name: str, models: Models, kept: Compared) -> None:
    unmerged: dict[str, dict[str, Any]] = {
        "base": {"base": models.base},
        "unmerged-F": {"base": models.base, "adapter": models.adapter},
        "unmerged-T": {"base": models.base, "adapter": models.adapter, "merge_base": "nf4-dq"},
    }
    found = evaluated(models, **unmerged.get(name, {"model": of_model(kept, name)}))
    numbers = kept.row(name).numbers
    assert numbers is not None
    assert found.comparison is not None
    assert found.comparison.greedy is not None
    assert numbers.losses == found.losses
    assert numbers.perplexity == found.perplexity
    assert numbers.kl_by_sequence == found.comparison.kl_by_sequence
    assert numbers.kl.value == pytest.approx(found.comparison.kl)
    assert numbers.top1_agreement == found.comparison.top1_agreement
    assert numbers.greedy_identical == found.comparison.greedy.identical
    assert kept.reference.losses == found.comparison.reference_losses
    gap = numbers.perplexity_difference
    assert gap.value == pytest.approx(found.perplexity - found.comparison.reference_perplexity, abs=1e-9)
    assert gap.low <= gap.value <= gap.high


def test_perplexity_and_kl_are_those_of_a_plain_loop(models: Models, kept: Compared, tmp_path: Path) -> None:
    streamconv.merge(models.base, models.adapter, tmp_path / "T", quant="float32", merge_base="nf4-dq")
    streamconv.convert(of_model(kept, "feedback-T"), tmp_path / "Q", quant="float32")
    windows = torch.tensor(numbers(LENGTH * COUNT)).view(COUNT, LENGTH)
    logs = []
    for folder in ("T", "Q"):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            logs.append(model(windows).logits[:, :-1].double().log_softmax(-1))
    loss = cross_entropy(logs[1].flatten(0, 1), windows[:, 1:].flatten())
    kl = kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1).mean()
    found = kept.row("feedback-T").numbers
    assert found is not None
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.kl.value == pytest.approx(float(kl), rel=1e-3)
    assert found.top1_agreement == pytest.approx(
        float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean())
    )


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  no mapping
    return total


def test_bits_are_those_of_the_tensors(models: Models, kept: Compared, tmp_path: Path) -> None:
    weights = tensor_bytes(models.base) // 2  # bfloat16
    assert kept.weights == weights
    streamconv.convert(models.base, tmp_path / "nf4-dq", quant="nf4-dq")
    adapter = tensor_bytes(models.adapter)
    expected = {
        "base": tensor_bytes(models.base),
        "unmerged-F": tensor_bytes(models.base) + adapter,
        "unmerged-T": tensor_bytes(tmp_path / "nf4-dq") + adapter,
        **{name: tensor_bytes(of_model(kept, name)) for name in CHOSEN.split(",")[3:]},
    }
    for name, nbytes in expected.items():
        found = kept.row(name).numbers
        assert found is not None
        assert found.tensor_bytes == nbytes, name
        assert found.bits_per_weight == 8 * nbytes / weights
        assert found.size_bytes > nbytes


def test_what_is_kept_of_the_update_is_what_the_merge_says(models: Models, kept: Compared) -> None:
    for name in CHOSEN.split(","):
        found = kept.row(name).numbers
        assert found is not None
        path = of_model(kept, name) / "streamconv.json"
        said = json.loads(path.read_text())["kept_delta"] if path.exists() else None
        assert found.kept_delta == said
        assert (found.merge_seconds is not None) == path.exists()


def test_the_command_of_a_row_makes_its_model(models: Models, kept: Compared, tmp_path: Path) -> None:
    assert kept.row("feedback-T").command == (
        f"streamconv merge --base {models.base} --adapter {models.adapter} --calibration {models.text} "
        "--calibration-sequence-length 32 --calibration-tokens 160 --calibration-gradient-tokens 32 "
        "--merge-base nf4-dq --quant nf4-dq --rounding feedback --device cpu --max-ram 4GiB -o merged"
    )
    streamconv.merge(models.base, models.adapter, tmp_path / "int8", quant="int8", device="cpu")
    ours = of_model(kept, "int8-F") / "model.safetensors"
    assert (tmp_path / "int8" / "model.safetensors").read_bytes() == ours.read_bytes()


def test_files_say_the_same(kept: Compared) -> None:
    out = Path(kept.out)
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(kept.as_json()))
    for name in ("comparison.md", "comparison.html"):
        text = (out / name).read_text()
        assert all(row.name in text for row in kept.rows)


def test_another_reference(models: Models, tmp_path: Path) -> None:
    found = models.compare(tmp_path / "out", "unmerged-F,unmerged-T", reference="F")
    first, second = (row.numbers for row in found.rows)
    assert first is not None
    assert second is not None
    assert abs(first.kl.value) < 1e-9 < second.kl.value
    assert found.reference.losses == first.losses


def test_a_base_that_is_quantized(models: Models, tmp_path: Path) -> None:
    base = tmp_path / "nf4"
    streamconv.convert(models.base, base, quant="nf4")
    found = replace(models, base=base).compare(tmp_path / "out", "unmerged-T,nearest-T,nearest-F,feedback-T")
    rows = {row.name: row for row in found.rows}
    assert found.quantized == "nf4"
    assert rows["unmerged-T"].numbers is not None
    assert abs(rows["unmerged-T"].numbers.kl.value) < 1e-9
    assert (rows["nearest-T"].quant, rows["nearest-T"].status) == ("nf4", "done")
    assert "the base is itself nf4" in str(rows["nearest-F"].reason)
    assert rows["feedback-T"].status == "left out"
    with pytest.raises(OptionError, match="--reference F is the update on the 16-bit base"):
        replace(models, base=base).compare(tmp_path / "other", reference="F")


# -- going on --------------------------------------------------------------------------------------------------------


def never(*given: object) -> None:
    raise AssertionError(given)


def judging_the_reference_or(
    fail: Callable[[], None],
) -> Callable[[EvaluationOptions, OnProgress], Evaluation]:
    """An evaluation of the reference; of anything else, `fail`."""

    def judge(asked: EvaluationOptions, on_progress: OnProgress) -> Evaluation:
        if asked.subject != asked.reference:
            fail()
        return run_evaluation(asked, on_progress)

    return judge


def test_what_is_done_is_not_done_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = models.compare(out)
    assert not (out / "models").exists()
    assert not [*(out / ".comparison" / "reference").glob("*")]
    with monkeypatch.context() as patched:
        patched.setattr(running, "run", never)
        patched.setattr(running, "run_evaluation", never)
        again = models.compare(out)
    assert again.rows == first.rows
    more = models.compare(out, "base,nearest-T,nearest-F")
    assert more.rows[:2] == first.rows
    assert more.row("nearest-F").numbers is not None
    other = write_text(tmp_path / "other.txt", 300)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "run", never)
        changed = models.compare(out, data=other)
    assert changed.row("base").numbers != first.row("base").numbers
    assert changed.row("nearest-T").status == "failed"


def test_a_signal_stops_it_and_it_goes_on(models: Models, tmp_path: Path) -> None:
    stop, titles = StopRequest(), []
    options = options_of(models, tmp_path / "out", "base,nearest-T,nearest-F")

    def step(title: str) -> None:
        titles.append(title)
        if title == "[2/3] nearest-T: evaluating":
            stop.signal_number = 2

    with pytest.raises(Stopped, match="run the same command again") as caught:
        comparison.run_options(options, step, lambda done, total: None, stop)
    assert caught.value.exit_code == 130
    assert not (tmp_path / "out" / "comparison.json").exists()
    before = len(titles)
    found = comparison.run_options(options, titles.append, lambda done, total: None, StopRequest())
    assert titles[before:] == [
        "[2/3] nearest-T: evaluating",
        "[3/3] nearest-F: merging",
        "[3/3] nearest-F: evaluating",
    ]
    numbers = found.row("nearest-T").numbers
    assert numbers is not None
    assert numbers.merge_seconds  # of the merge that was finished before
    assert found.rows[2].numbers is not None


def options_of(models: Models, out: Path, strategies: str) -> Any:
    given = {name: value.default for name, value in _parameters().items() if value.default is not value.empty}
    given |= {"data": models.text, "strategies": strategies, "speed": False, "device": "cpu", **EVALUATION}
    return comparison.build_options(models.base, models.adapter, out, **given)


def _parameters() -> dict[str, Any]:
    from inspect import signature

    found = dict(signature(streamconv.compare).parameters)
    return {name: value for name, value in found.items() if not name.startswith("on_")}


def test_kept_models_are_made_again_if_they_are_gone(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models.compare(out)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "run_evaluation", never)
        found = models.compare(out, keep=True)
    assert (out / "models" / "nearest-T" / "config.json").exists()
    assert found.row("nearest-T").status == "done"


def test_what_an_earlier_run_kept_stays(models: Models, tmp_path: Path) -> None:
    out, other = tmp_path / "out", write_text(tmp_path / "other.txt", 300)
    models.compare(out, "nearest-T", keep=True, greedy_tokens=0)
    config = out / "models" / "nearest-T" / "config.json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "run", never)
        models.compare(out, "nearest-T", greedy_tokens=0)
    assert config.exists()
    models.compare(out, "nearest-T,nearest-F", data=other, greedy_tokens=0)
    assert config.exists()
    assert not (out / "models" / "nearest-F").exists()


def test_options_that_change_under_a_name(models: Models, tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.yaml"
    for quant in ("nf4", "fp4"):
        mine.write_text(f"mine: --quant {quant}")
        found = models.compare(out, str(mine), keep=True, greedy_tokens=0)
        assert (found.exit_code, found.row("mine").quant) == (0, quant)
        manifest = json.loads((out / "models" / "mine" / "streamconv.json").read_text())
        assert manifest["quant"] == quant


# -- what goes wrong -------------------------------------------------------------------------------------------------


def failing(name: str, error: Exception) -> Callable[..., Any]:
    """`run` that fails for one strategy after it has left something."""

    def run(prepared: Any, folder: Path, *rest: Any) -> Any:
        if folder.name == name:
            folder.mkdir(parents=True)
            (folder / "left").write_text("over")
            raise error
        return REAL_RUN(prepared, folder, *rest)

    return run


REAL_RUN = vars(running)["run"]


def test_a_strategy_that_fails_is_told_and_the_next_goes_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(running, "run", failing("nearest-T", ResourceError("the disk is full")))
        found = models.compare(out, "nearest-T,nearest-F")
    row = found.row("nearest-T")
    assert row.failure is not None
    assert (row.status, row.failure.error, row.failure.stage) == ("failed", "ResourceError", "merging")
    assert (found.exit_code, row.failure.message) == (5, "the disk is full")
    assert found.row("nearest-F").status == "done"
    assert not (out / "models" / "nearest-T").exists()
    assert "the disk is full" in (out / "comparison.html").read_text()
    assert found.advice[0].name == "nearest-F"
    again = models.compare(out, "nearest-T,nearest-F")
    assert (again.exit_code, again.row("nearest-T").status) == (0, "done")


def full_disk() -> ResourceError:
    error = ResourceError("the disk is full")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (ResourceError("--max-ram is too small"), True),
        (full_disk(), False),
        (VerificationError("it is not what the plan says"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_finished_merge_is_not_lost_with_its_evaluation(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, stays: bool
) -> None:
    out = tmp_path / "out"
    steps: list[str] = []

    def fail() -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(running, "run_evaluation", judging_the_reference_or(fail))
        found = models.compare(out, "nearest-T", greedy_tokens=0)
    failure = found.row("nearest-T").failure
    assert failure is not None
    assert failure.stage == "evaluating"
    assert (out / "models" / "nearest-T" / "config.json").exists() is stays
    again = models.compare(out, "nearest-T", on_step=steps.append, greedy_tokens=0)
    assert steps == ["[1/1] nearest-T: merging"] * (not stays) + ["[1/1] nearest-T: evaluating"]
    numbers = again.row("nearest-T").numbers
    assert numbers is not None
    assert numbers.merge_seconds
    assert not (out / "models").exists()


def test_what_others_need_the_room_of_goes(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        monkeypatch.setattr(running, "free_bytes", lambda path: 100)
        raise ResourceError("--max-ram is too small")

    monkeypatch.setattr(running, "run_evaluation", judging_the_reference_or(fail))
    models.compare(out, "nearest-T,nearest-F", greedy_tokens=0)
    assert not (out / "models" / "nearest-T").exists()
    assert (out / "models" / "nearest-F").exists()  # the last: nobody needs its room


def test_a_merge_that_failed_midway_goes_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(prepared: Any, folder: Path, *rest: Any) -> None:
        with Journal(folder, prepared.plan.fingerprint, resume=True):
            raise ResourceError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(running, "run", fail)
        models.compare(out, "nearest-T", greedy_tokens=0)
    assert is_owned(out / "models" / "nearest-T")
    assert models.compare(out, "nearest-T", greedy_tokens=0).exit_code == 0


def test_a_bug_costs_only_its_own_row(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run", failing("nearest-T", ValueError("no such thing")))
    found = models.compare(tmp_path / "out", "nearest-T,nearest-F")
    failure = found.row("nearest-T").failure
    assert failure is not None
    assert (failure.error, failure.exit_code) == ("ValueError", 1)
    assert "Traceback" in failure.message
    assert found.row("nearest-F").status == "done"


def test_a_strategy_that_cannot_be_planned(models: Models, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine: --quant none --rounding nearest")
    found = models.compare(tmp_path / "out", f"base,{mine}")
    failure = found.row("mine").failure
    assert failure is not None
    assert (failure.stage, failure.error, found.exit_code) == ("planning", "OptionError", 2)
    assert "the output is not quantized" in failure.message


def test_the_disk_is_looked_at_before(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "free_bytes", lambda path: 100)
    with pytest.raises(ResourceError, match=r"for the largest output.*100 B free"):
        models.compare(tmp_path / "out")
    with pytest.raises(ResourceError, match="for all outputs, which --keep keeps"):
        models.compare(tmp_path / "out", keep=True)


def test_places_that_are_not_its_own(models: Models, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="overlap, and inputs are never written to"):
        models.compare(models.base / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            OutputError, match=r"not empty \(notes.txt\) and holds no comparison; choose another --out$"
        ):
            models.compare(tmp_path / "other", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    models.compare(tmp_path / "out", "base")
    adapter = save_adapter(
        tmp_path / "adapter", models.base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(OutputError, match="the comparison of another base or adapter"):
        replace(models, adapter=adapter.path).compare(tmp_path / "out", "base")
    (tmp_path / "out" / "models" / "old").mkdir(parents=True)
    found = replace(models, adapter=adapter.path).compare(tmp_path / "out", "base", overwrite=True)
    assert found.row("base").status == "done"
    assert not (tmp_path / "out" / "models").exists()


def test_two_at_a_time(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(path: Path) -> int:
        """Free space, which is asked for when the folder is taken."""
        monkeypatch.undo()
        with pytest.raises(OutputError, match="is in use by another run"):
            models.compare(tmp_path / "out", "base")
        asked.append(path)
        return free_bytes(path)

    asked: list[Path] = []
    monkeypatch.setattr(running, "free_bytes", another)
    models.compare(tmp_path / "out", "base")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "W"}, "--reference W is not known; use T"),
        ({"merge_base": "original"}, "--merge-base original is not known; give the format"),
        ({"max_bits": 0}, "--max-bits 0 is no number of bits"),
        ({"speed_tokens": 0}, "--speed-tokens 0 is too few"),
        ({"tokens": 5}, "--tokens 5 is less than one sequence"),
        ({"tokens": 63}, "--tokens 63 is one sequence of 32.*; give 64 or more"),
        ({"dtype": "auto"}, "--dtype"),
        ({"calibration_tokens": 64}, "add --calibration FILE"),
    ],
)
def test_contradictions(models: Models, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        models.compare(tmp_path / "out", **options)


def test_a_text_that_is_not_there(models: Models, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file"):
        models.compare(tmp_path / "out", data=tmp_path / "nowhere.txt")


def test_without_the_extra(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs transformers and accelerate.*streamconv\[eval\]"):
        models.compare(tmp_path / "out")


# -- speed -----------------------------------------------------------------------------------------------------------


def test_what_is_opened(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Opened] = []

    def note(what: Opened, tokens: int, device: str, *rest: object) -> Speed:
        opened.append(what)
        return Speed(1000 * len(opened), None, 1.0, 2.0, tokens, device, None)

    monkeypatch.setattr(running, "measure_speed", note)
    out = tmp_path / "out"
    first = models.compare(out, "base,unmerged-F,unmerged-T,nearest-T", speed=True)
    base, adapter = str(models.base), str(models.adapter)
    assert [(each.model, each.adapter) for each in opened] == [
        (base, None),
        (base, adapter),
        (base, adapter),
        (str(out / "models" / "nearest-T"), None),
    ]
    assert [each.load_in is not None for each in opened] == [False, False, True, False]
    assert dict(opened[2].load_in or {})["bnb_4bit_use_double_quant"] is True
    assert [
        row.numbers and row.numbers.speed and row.numbers.speed.load_peak_bytes for row in first.rows
    ] == [
        1000,
        2000,
        3000,
        4000,
    ]
    assert models.compare(out, "base,unmerged-F,unmerged-T,nearest-T", speed=True).rows == first.rows
    assert models.compare(out, "base,nearest-T").rows == (first.rows[0], first.rows[3])
    assert len(opened) == 4
    # Of other tokens, speed alone is measured anew, and one is not shown beside the other.
    monkeypatch.setattr(running, "run_evaluation", never)
    quick = models.compare(out, "base,nearest-T", speed=True, speed_tokens=8)
    assert [row.numbers and row.numbers.speed and row.numbers.speed.tokens for row in quick.rows] == [8, 8]
    assert len(opened) == 6
    assert [row.numbers and row.numbers.speed for row in models.compare(out, "base,nearest-T").rows] == [
        None,
        None,
    ]
    assert not (out / "models").exists()


def test_numbers_are_noted_before_a_model_is_loaded(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> Speed:
        raise OSError("no process can be started")

    monkeypatch.setattr(running, "measure_speed", fail)
    failure = (
        models.compare(tmp_path / "out", "nearest-T", speed=True, greedy_tokens=0).row("nearest-T").failure
    )
    assert failure is not None
    assert failure.stage == "loading"
    monkeypatch.setattr(running, "run", never)
    monkeypatch.setattr(running, "run_evaluation", never)
    assert models.compare(tmp_path / "out", "nearest-T", greedy_tokens=0).row("nearest-T").status == "done"


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it
def test_models_of_the_hub_are_opened_where_they_were_judged(
    models: Models, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/base", models.base)
    hub.repos["org/base"].refs["v2"] = commit
    hub.add("me/lora", models.adapter, prefix="last/")
    opened: list[Opened] = []

    def note(what: Opened, tokens: int, device: str, *rest: object) -> Speed:
        opened.append(what)
        return Speed(1000, None, 1.0, 2.0, tokens, device, None)

    monkeypatch.setattr(running, "measure_speed", note)
    streamconv.compare(
        "org/base@v2",
        "hf://me/lora",
        tmp_path / "out",
        data=models.text,
        strategies="unmerged-F",
        reference="F",
        adapter_subfolder="last",
        device="cpu",
        **EVALUATION,
    )
    (found,) = opened
    assert Path(found.model) == tmp_path / "cache" / "models--org--base" / "snapshots" / commit
    asked = {**asdict(found), "device": "cpu", "tokens": 2}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert measure(asked)["problem"] is None


def test_a_process_loads_and_decodes(models: Models, tmp_path: Path) -> None:
    found = measure_speed(
        Opened(str(models.base), adapter=str(models.adapter)), 3, "cpu", tmp_path, lambda: None
    )
    assert found.problem is None
    assert (found.tokens, found.device) == (3, "cpu")
    assert found.tokens_per_s is not None
    assert found.load_peak_bytes is not None
    assert found.tokens_per_s > 0
    assert 0 < found.load_peak_bytes < 10**9


def test_a_process_that_is_stopped_ends(models: Models, tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped("stopped", 2)

    (tmp_path / "thesis.txt").write_text("precious")
    for name in ("speed-asked.json", "speed.json", "speed.log"):
        (tmp_path / name).symlink_to("thesis.txt")
    with pytest.raises(Stopped):
        measure_speed(Opened(str(models.base)), 3, "cpu", tmp_path, stop)
    assert (tmp_path / "thesis.txt").read_text() == "precious"  # links are replaced, not followed


def test_a_model_that_does_not_open_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = {
        "model": str(tmp_path),
        "adapter": None,
        "load_in": None,
        "device": "cpu",
        "tokens": 2,
    }
    found = measure(asked)
    assert list(found) == ["problem"]
    assert found["problem"].startswith("not opened: ValueError: ")


def test_an_adapter_that_lies_in_an_output_is_part_of_it(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a residual adapter does: it is counted, and run beside the model."""

    def run(prepared: Any, folder: Path, *rest: Any) -> Any:
        report = REAL_RUN(prepared, folder, *rest)
        target = folder / "residual"
        target.mkdir()
        for path in models.adapter.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return report

    with monkeypatch.context() as patched:
        patched.setattr(running, "run", run)
        found = models.compare(tmp_path / "out", "nearest-T", keep=True).row("nearest-T").numbers
    folder = Store(tmp_path / "out").model("nearest-T")
    again = evaluated(models, base=folder, adapter=folder / "residual")
    assert found is not None
    assert found.losses == again.losses
    assert found.tensor_bytes == tensor_bytes(folder) + tensor_bytes(models.adapter)
