"""A rescaled merge that is killed in any of its three passes and run again gives the same bytes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.forward.texts import save_tokenizer, write_text
from tests.hostile.commands import Commands
from tests.hostile.test_kill import check_final_names, spread, tree
from tests.hostile.test_kill_calibrated import Case, check_flips, ends
from tests.tiny import llama_config, save_adapter, save_base

POINTS = 5


@pytest.fixture(scope="module")
def case(model_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("rescaled")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    text = write_text(folder / "text.txt", 200)
    paths = ("--base", base, "--adapter", folder / "adapter", "--calibration", text)
    options = ("--quant", "nf4", "--rescale", "awq", "--rounding", "search", "--device", "cpu")
    sizes = ("--calibration-tokens", "160", "--calibration-sequence-length", "32")
    case = Case(model_commands, tuple(map(str, ("merge", *paths, *options, *sizes))))
    done = case.run(folder / "out")
    assert done.code == 0, done.text
    return Case(model_commands, case.arguments, done.calls, tree(folder / "out"))


def layers(out: Path) -> int:
    """How many are done, in both passes over the text."""
    return len([*(out / ".streamconv").glob("*/layer-*.safetensors")])


def test_killed_anywhere_and_run_again_the_folder_is_the_same(case: Case, tmp_path: Path) -> None:
    assert case.complete is not None
    named = ends(case)
    assert len(named) == 4  # two layers, in two passes
    # In the midst of each pass, and from there to the end.
    points = [named[0], named[1], named[2], *list(spread(len(case.calls) - named[2], POINTS - 2))[1:]]
    points[3:] = [named[2] + at for at in points[3:]]
    for number, at in enumerate(points):
        out, done = tmp_path / str(at), sum(end < at for end in named)
        killed = case.run(out, at, tears=number % 2 == 0)
        assert killed.code == -signal.SIGKILL
        check_final_names(out, case.complete)
        if at <= named[-1]:
            assert layers(out) == done
        again = case.run(out)
        assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
        # What was done is not done again.
        assert sum(call.startswith("replace layer-") for call in again.calls) == len(named) - done


def test_a_bit_of_a_stopped_rescaling_flips(case: Case, tmp_path: Path) -> None:
    check_flips(case, tmp_path, ends(case)[0] + 1, [(2, 0.9), (4, 0.5)])
    check_flips(case, tmp_path, ends(case)[2] + 1, [(-2, 0.02)])


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_any_bit_of_a_stopped_rescaling_flips(case: Case, tmp_path: Path) -> None:
    for at in [1 + each for each in ends(case)]:
        check_flips(case, tmp_path, at, [(number, place) for number in range(12) for place in (0.01, 0.6)])
