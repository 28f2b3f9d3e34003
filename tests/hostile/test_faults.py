"""Calls to the system that fail: the exit says why, no wrong byte has a final name, and the next run makes the rest.

A few faults of each kind, in Python; `tools/faults` lets the kernel fail some thousands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.forward.texts import save_tokenizer, write_text
from tests.hostile.commands import Commands, Outcome
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import llama_config, save_adapter, save_base
from tools.fault_calls import Fault, role
from tools.fault_judge import Ended, Made, judge, judge_again, tree

WATERMARK_BYTES = 5_000
NOTHING = Made({})
SIZES = Sizes(hidden=64, inner=96, layers=1, vocabulary=64)
# Functions of `os`, errors, and where in a run: 0 is the first call, 1 the last. A plus: in all from then on.
READING = {
    "open": "EIO 0, EACCES 0.2, EMFILE 0.5, EIO 0.7, EIO 1, ENOSPC 0.6+",
    "preadv": "EIO 0, EIO 0.5, short 0.3, short 0+, end 0.6, EIO 1+",
    "stat": "EIO 0, EIO 0.3, EACCES 0.6, EIO 0.9+",
    "lstat": "EIO 0",
    "fstat": "EIO 0, EIO 0.5, EIO 1",
    "scandir": "EIO 0, EIO 1",
    "statvfs": "EIO 0, EIO 1",
}
WRITING = {
    "write": "ENOSPC 0, EIO 0.5, ENOSPC 1, short 0.5, short 0+",
    "pwrite": "EIO 0, ENOSPC 0.4, EDQUOT 0.8, short 0.5, short 0+, EIO 1",
    "fsync": "EIO 0, ENOSPC 0.5, EDQUOT 0.8, EIO 1",
    "fdatasync": "EIO 0, ENOSPC 1",
    "replace": "EIO 0, ENOSPC 0.5, EACCES 0.8, EIO 1",
    "unlink": "EIO 0, EROFS 0.5, EACCES 0.9+",
    "mkdir": "ENOSPC 0, EACCES 1",
    "rmdir": "EIO 0",
    "close": "EIO 0, EIO 0.3, ENOSPC 0.5, EDQUOT 0.8, EIO 1",
    "flock": "ENOLCK 0, EAGAIN 0",
}
QUANTIZING = {
    "preadv": "EIO 0.9",
    "pwrite": "ENOSPC 0.3",
    "write": "EIO 0.5",
    "replace": "ENOSPC 0.3",
    "close": "EIO 0.4",
}
CALIBRATING = {"open": "EIO 0.8", "pwrite": "ENOSPC 0.3", "unlink": "EIO 0.7"}


@dataclass(frozen=True)
class Case:
    """A command without its --out, and what it makes undisturbed."""

    commands: Commands
    name: str
    inputs: Path
    arguments: tuple[str, ...]
    made: Made

    def run(self, out: Path, **settings: object) -> Outcome:
        return self.commands.run(*self.arguments, "-o", out, watermark_bytes=WATERMARK_BYTES, **settings)

    def undisturbed(self, out: Path) -> Case:
        done = self.run(out)
        assert done.code == 0, done.text
        return Case(self.commands, self.name, self.inputs, self.arguments, Made(tree(out)))

    def check(self, fault: Fault, folder: Path) -> str | None:
        """What is wrong with a run with the fault, and the one after it."""
        out = folder / str(fault)
        ended = self.run(out, of=(fault.call,), fault=fault.error, at=fault.at, onward=fault.onward)
        assert ended.hits, f"{fault} did not come"
        roles = [role(hit, {str(out): "output", str(self.inputs): "input"}) for hit in ended.hits]
        problems = judge(fault, _ended(ended), tree(out), self.made, roles)
        again = self.run(out)
        problems += judge_again(_ended(again), tree(out), self.made)
        said = "\n".join((*ended.text.splitlines()[-8:], again.text))
        return f"{fault}: {problems} {ended.hits[0]}\n{said}" if problems else None


def _ended(outcome: Outcome) -> Ended:
    return Ended(outcome.code, outcome.text, outcome.seconds, outcome.hits)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_base(folder / "base", SIZES.shapes, shards=2)
    write_adapter(folder / "adapter", SIZES.shapes)
    return folder


def command(inputs: Path, *options: str) -> tuple[str, ...]:
    paths = ("--base", str(inputs / "base"), "--adapter", str(inputs / "adapter"))
    return ("merge", *paths, "--device", "cpu", *options)


@pytest.fixture(scope="module")
def bf16(commands: Commands, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case(commands, "bf16", small, command(small, "--max-ram", "98MiB"), NOTHING)
    return case.undisturbed(tmp_path_factory.mktemp("bf16") / "out")


@pytest.fixture(scope="module")
def nf4(commands: Commands, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case(commands, "nf4-dq", small, command(small, "--quant", "nf4-dq", "--max-ram", "98MiB"), NOTHING)
    return case.undisturbed(tmp_path_factory.mktemp("nf4") / "out")


@pytest.fixture(scope="module")
def calibrated(model_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("model")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    text = write_text(folder / "text.txt", 70)
    tokens = ("--calibration-tokens", "64", "--calibration-gradient-tokens", "32")
    options = ("--quant", "nf4-dq", "--merge-base", "nf4-dq", "--calibration", str(text), *tokens)
    line = command(folder, *options, "--calibration-sequence-length", "32")
    case = Case(model_commands, "calibrated", folder, line, NOTHING)
    return case.undisturbed(tmp_path_factory.mktemp("calibrated") / "out")


def faults(case: Case, kinds: Mapping[str, str], out: Path) -> Iterator[Fault]:
    """Those named in a table; how often a function is called is seen in a run that does not fail."""
    calls = Counter(call.split()[0] for call in case.run(out, of=tuple(kinds)).calls)
    assert calls.keys() == kinds.keys()
    for name, places in kinds.items():
        for error, place in map(str.split, places.split(", ")):
            at = 1 + int(float(place.removesuffix("+")) * (calls[name] - 1))
            yield Fault(case.name, name, error, at, place.endswith("+"))


def check_all(case: Case, kinds: Mapping[str, str], tmp_path: Path) -> None:
    before = tree(case.inputs)
    wrong = [case.check(fault, tmp_path) for fault in faults(case, kinds, tmp_path / "undisturbed")]
    assert len(wrong) >= len(kinds)
    text = "\n".join(each for each in wrong if each)
    assert not text, text
    assert tree(case.inputs) == before


@pytest.mark.parametrize("kinds", [READING, WRITING], ids=["reading", "writing"])
def test_a_call_fails_while_weights_are_merged(bf16: Case, kinds: Mapping[str, str], tmp_path: Path) -> None:
    check_all(bf16, kinds, tmp_path)


def test_a_call_fails_while_weights_are_quantized(nf4: Case, tmp_path: Path) -> None:
    check_all(nf4, QUANTIZING, tmp_path)


def test_a_call_fails_while_codes_are_chosen(calibrated: Case, tmp_path: Path) -> None:
    check_all(calibrated, CALIBRATING, tmp_path)
