"""Tools that ask other programs: what they are told to open, what they answer, and names that they do not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.foreign import test_mlx, test_vllm
from tools.readers.answer import TOKENS, Question, answer, questions

ROOT = Path(__file__).parents[2]
PROGRAMS = {path.stem for path in (ROOT / "tools" / "readers").glob("*.txt")}


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Question]:
    monkeypatch.setattr(sys, "argv", ["read", *arguments])
    return questions("opens")


def test_every_model_has_a_file_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = asked(monkeypatch, "a", "a.out", "b", "b.out", "--tokens", "3,4", "--dtype", "float16")
    assert first == Question(Path("a"), Path("a.out"), [3, 4], "float16")
    assert (second.model, second.out) == (Path("b"), Path("b.out"))
    assert asked(monkeypatch, "a", "a.out")[0].tokens == list(TOKENS)
    with pytest.raises(SystemExit):
        asked(monkeypatch, "a", "a.out", "b")


def test_an_answer_is_in_float32_and_says_who_gave_it(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    question = Question(Path("model"), out, [1, 2], "auto")
    weight = np.arange(6, dtype=np.float16).reshape(2, 3).T  # not contiguous
    answer(question, ("numpy",), np.ones((2, 5)), {"layer.weight": weight}, more=np.zeros(2))
    with safe_open(out, framework="np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        assert file.metadata() == {"numpy": np.__version__}
    assert set(found) == {"logits", "more", "weights/layer.weight"}
    assert {each.dtype for each in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found["weights/layer.weight"], weight)


@pytest.mark.parametrize("tool", ["foreign", "foreign_environment", "read_with"])
def test_a_name_that_is_not_known_is_told_with_those_that_are(tool: str) -> None:
    command = [str(ROOT / "tools" / tool), "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert set(done.stderr.replace(",", " ").replace(";", " ").split()) >= {"nothing", *PROGRAMS}


def test_a_program_has_tests_of_its_name() -> None:
    assert {
        path.stem.removeprefix("test_") for path in (ROOT / "tests" / "foreign").glob("test_*.py")
    } == PROGRAMS


@pytest.mark.parametrize(
    ("program", "formats"), [("mlx", test_mlx.REFUSED), ("vllm", tuple(test_vllm.REFUSED))], ids=str
)
def test_what_a_program_refuses_is_kept_in_its_words_and_said_on_the_page(
    program: str, formats: tuple[str, ...]
) -> None:
    refused = json.loads((ROOT / "docs/results" / f"foreign-{program}.json").read_text())["refused"]
    assert tuple(refused) == formats
    assert all("Error: " in words for words in refused.values())
    _, _, found = (ROOT / "docs/formats.md").read_text().partition("What is found to be so")
    found, _, _ = found.partition("\n\n")
    names = {"gptq": "GPTQ files", "gptq-asym": "GPTQ files"} if program == "mlx" else {}
    assert all(names.get(name, f"`{name}`") in found for name in formats)
