"""Flips of single bits in every file of finished outputs: each is found, or the file is told to be edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tools import flips as tool

FLIPS = 200


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return tool.write_outputs(tmp_path_factory.mktemp("flips"), calibrated=False)


def test_no_flip_is_missed(outputs: Mapping[str, Path]) -> None:
    done = list(tool.flips(outputs, FLIPS, seed=1))
    assert [flip for flip in done if flip.end == "missed"] == []
    assert {flip.end for flip in done} == {"found", "told"}
    assert {flip.code for flip in done} == {0, 3, 7}


def test_a_bit_of_every_file_is_seen(outputs: Mapping[str, Path]) -> None:
    out = outputs["bf16"]
    files = tool.files_of(out)
    assert {path.name for path in files} >= {
        *(
            "config.json",
            "streamconv.json",
            "streamconv-recipe.json",
            "README.md",
            "LICENSE",
            "modeling_own.py",
        ),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"),
        *("model.safetensors.index.json", "generation_config.json", "model-00001-of-00003.safetensors"),
    }
    ends = {path.name: tool.try_flip(out, path, 8 * 10)[0] for path in files}
    assert "missed" not in ends.values()
    assert {name for name, end in ends.items() if end == "told"} >= {"README.md", "LICENSE"}


def test_a_miss_would_be_told(outputs: Mapping[str, Path]) -> None:
    """As of a file that is none of the output."""
    (outputs["bf16"] / "notes.txt").write_text("mine")
    assert tool.try_flip(outputs["bf16"], outputs["bf16"] / "notes.txt", 3) == ("missed", 0)
    (outputs["bf16"] / "notes.txt").unlink()
