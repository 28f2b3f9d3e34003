"""A calibrated merge that is killed in either pass and run again gives the same bytes; finished layers stay."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.forward.texts import save_tokenizer, write_text
from tests.hostile.commands import Commands, Outcome
from tests.hostile.test_changes import edit, replace
from tests.hostile.test_kill import Tree, check_final_names, spread, tree
from tests.tiny import llama_config, save_adapter, save_base

POINTS = 10
LAYERS = "calibration/layer-*.safetensors"


@dataclass(frozen=True)
class Case:
    """A command without its --out, and what it does and gives when nobody disturbs it."""

    commands: Commands
    arguments: tuple[str, ...]
    calls: tuple[str, ...] = ()
    complete: Tree | None = None

    def run(self, out: Path, at: int | None = None, **settings: object) -> Outcome:
        return self.commands.run(*self.arguments, "-o", out, at=at, watermark_bytes=5000, **settings)


@pytest.fixture(scope="module")
def case(model_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("calibrated")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    text = write_text(folder / "text.txt", 70)
    paths = ("--base", base, "--adapter", folder / "adapter", "--calibration", text)
    options = ("--quant", "nf4-dq", "--merge-base", "nf4-dq", "--device", "cpu")
    tokens = ("--calibration-tokens", "64", "--calibration-gradient-tokens", "32")
    sizes = (*tokens, "--calibration-sequence-length", "32")
    case = Case(model_commands, tuple(map(str, ("merge", *paths, *options, *sizes))))
    done = case.run(folder / "out")
    assert done.code == 0, done.text
    return Case(model_commands, case.arguments, done.calls, tree(folder / "out"))


def layers(out: Path) -> set[str]:
    return {path.name for path in (out / ".streamconv").glob(LAYERS)}


def test_killed_in_either_pass_and_run_again_the_folder_is_the_same(case: Case, tmp_path: Path) -> None:
    assert case.complete is not None
    second_pass = max(at for at, call in enumerate(case.calls, 1) if call.startswith("replace layer-"))
    in_first, kept = 0, 0
    # Most of them while codes are being chosen; the rest while these are copied, and put in place.
    points = [*spread(second_pass, POINTS - 3), *list(spread(len(case.calls) - second_pass, 4))[1:]]
    points[-3:] = [second_pass + at for at in points[-3:]]
    assert len(points) == POINTS
    for number, at in enumerate(points):
        out = tmp_path / str(at)
        killed = case.run(out, at, tears=number % 2 == 0)
        assert killed.code == -signal.SIGKILL
        check_final_names(out, case.complete)
        before = layers(out)
        again = case.run(out)
        assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
        made = {call.removeprefix("replace ") for call in again.calls if call.startswith("replace layer-")}
        assert not made & {name.replace(".safetensors", ".partial") for name in before}
        in_first += at <= second_pass
        kept += bool(before)
    assert in_first == POINTS - 3
    assert kept >= 4, "too few runs had a layer done when they were killed"


def test_a_signal_stops_between_groups_and_keeps_the_layers_that_are_done(case: Case, tmp_path: Path) -> None:
    assert case.complete is not None
    out = tmp_path / "out"
    at = 1 + next(at for at, call in enumerate(case.calls, 1) if call.startswith("replace layer-"))
    stopped = case.run(out, at, signal=signal.SIGTERM)
    assert stopped.code == 143
    assert "run the same command again to go on" in stopped.text
    assert len(layers(out)) == 1
    assert case.run(out).code == 0
    assert tree(out) == case.complete


def test_another_text_does_not_go_on_with_what_was_done(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    at = 1 + next(at for at, call in enumerate(case.calls, 1) if call.startswith("replace layer-"))
    assert case.run(out, at).code == -signal.SIGKILL
    other = write_text(tmp_path / "other.txt", 71)
    place = case.arguments.index("--calibration")
    arguments = (*case.arguments[: place + 1], str(other), *case.arguments[place + 2 :])
    refused = case.commands.run(*arguments, "-o", out)
    assert refused.code == 4
    assert "holds an unfinished run with other inputs or options (calibration.name: then" in refused.text
    assert layers(out) == {"layer-00000.safetensors"}


def flip(path: Path, place: float) -> None:
    """Turn one bit round, at that share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def passed(out: Path) -> list[Path]:
    """All files of passes over the text, by name."""
    return sorted(path for path in (out / ".streamconv").glob("*/*") if not path.name.startswith("."))


def check_flips(case: Case, folder: Path, at: int, flips: Iterable[tuple[int, float]]) -> None:
    """Killed before call `at`, a bit turned round in the file of that number, and run again: the same bytes."""
    stopped = folder / f"stopped {at}"
    if not stopped.exists():
        assert case.run(stopped, at).code == -signal.SIGKILL
    for number, place in flips:
        out = folder / "flipped"
        shutil.copytree(stopped, out)
        path = passed(out)[number % len(passed(out))]
        flip(path, place)
        again = case.run(out)
        assert again.code == 0, f"killed at {at}, {path.name} flipped at {place}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {path.name} flipped at {place}"
        shutil.rmtree(out)


def ends(case: Case) -> list[int]:
    """Numbers of the calls that give a layer its name."""
    return [at for at, call in enumerate(case.calls, 1) if call.startswith("replace layer-")]


def test_a_bit_of_a_stopped_calibration_flips(case: Case, tmp_path: Path) -> None:
    """In gradients that are half there, after a layer, and once all of them are done."""
    first, last = ends(case)
    half = 1 + [at for at, call in enumerate(case.calls, 1) if call.startswith("replace gradients-")][1]
    check_flips(case, tmp_path, half, [(2, 0.9), (3, 0.5), (4, 0.7)])
    check_flips(case, tmp_path, first + 1, [(2, 0.1), (3, 0.5), (5, 0.5), (6, 0.01)])
    check_flips(case, tmp_path, last + 5, [(2, 0.9)])


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_any_bit_of_a_stopped_calibration_flips(case: Case, tmp_path: Path) -> None:
    points = [
        at for at, call in enumerate(case.calls, 1) if call.startswith(("replace gradient", "replace layer"))
    ]
    for at in [1 + each for each in points]:
        check_flips(case, tmp_path, at, [(number, place) for number in range(8) for place in (0.01, 0.6)])


def put_in_place(path: Path, kind: str, other: Path) -> None:
    """Something of this kind where a file was; a link leads to `other`."""
    path.unlink()
    match kind:
        case "link":
            path.symlink_to(other)
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()


def test_what_is_no_file_in_place_of_one_is_refused(case: Case, tmp_path: Path) -> None:
    stopped, other = tmp_path / "stopped", tmp_path / "precious"
    assert case.run(stopped, ends(case)[0] + 1).code == -signal.SIGKILL
    for name, kind in [
        ("reference-1", "link"),
        ("quantized-1", "pipe"),
        ("layer-00000.safetensors", "link"),
        ("layer-00000.safetensors", "folder"),
        ("hashes", "pipe"),
        ("calibration.json", "link"),
    ]:
        out = tmp_path / f"{name} {kind}"
        shutil.copytree(stopped, out)
        path = out / ".streamconv/calibration" / name
        other.write_bytes(content := path.read_bytes())  # the very bytes do not make a link the file
        put_in_place(path, kind, other)
        refused = case.run(out)
        assert refused.code == 4, refused.text
        said = " ".join(refused.text.split())
        assert str(path) in said
        assert f"a {'named pipe' if kind == 'pipe' else kind}" in said
        assert other.read_bytes() == content


def change_words(path: Path) -> None:
    """The text in another order, of the same size and time."""
    found, words = path.stat(), path.read_text().split(" ")
    path.write_text(" ".join([*words[1:], words[0]]))
    assert path.stat().st_size == found.st_size
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def swap_tokens(path: Path) -> None:
    """Two tokens that change places."""
    found = json.loads(path.read_text())
    one, other = list(found["model"]["vocab"])[4:6]
    vocabulary = found["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("file", "change", "since"),
    [
        ("text.txt", change_words, None),
        ("text.txt", Path.unlink, None),
        ("base/tokenizer.json", swap_tokens, None),
        ("base/model.safetensors", edit, "replace gradients-00001.partial"),
        ("base/model.safetensors", replace, "replace layer-00000.partial"),
        ("adapter/adapter_model.safetensors", edit, "replace gradients-00002.partial"),
    ],
)
def test_a_calibration_whose_inputs_change(
    case: Case, tmp_path: Path, file: str, change: Callable[[Path], None], since: str | None
) -> None:
    path = Path(case.arguments[case.arguments.index("--base") + 1]).parent / file
    shutil.copy2(path, tmp_path / "kept")
    out = tmp_path / "out"
    stopped = case.run(out, 1, since=since, signal=signal.SIGSTOP)
    assert stopped.code == -signal.SIGSTOP
    try:
        change(path)
        ended = case.commands.run(goes_on=stopped.process)
        assert ended.code == 3, ended.text
        assert path.name in ended.text
    finally:
        shutil.copy2(tmp_path / "kept", path)
    again = case.run(out)
    assert again.code == 0, again.text
    assert tree(out) == case.complete
