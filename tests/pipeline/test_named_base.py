"""The base that an adapter names: taken where none is given, said where it is another than the one that is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from peft import LoraConfig

import streamconv
from streamconv.cli import main
from streamconv.errors import OptionError
from streamconv.pipeline import build_job, prepare
from streamconv.pipeline.named_base import base_notes
from streamconv.storage import open_storage
from tests.hub_stub import Hub
from tests.hubs import hub
from tests.tiny import llama_config, save_adapter, save_base

__all__ = ["hub"]
REPO = "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "llama-tiny", llama_config())
    return base, save_adapter(folder / "adapter", base, LoraConfig(target_modules=["q_proj"])).path


def naming(adapter: Path, folder: Path, name: str | None, revision: str | None = None) -> Path:
    """A copy of the adapter that names another base."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(fields))
    return folder


# -- none is given ---------------------------------------------------------------------------------------------------


def test_the_base_is_the_one_that_the_adapter_names(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    streamconv.merge(base, adapter, tmp_path / "usual")
    result = CliRunner().invoke(main, ["merge", "--adapter", str(adapter), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    for name in ("model.safetensors", "README.md", "streamconv-recipe.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes()
    assert "note:" not in result.stdout


def test_a_hub_id_is_taken_at_the_revision_that_the_adapter_names(
    hub: Hub, made: tuple[Path, Path], tmp_path: Path
) -> None:
    first = hub.add("org/llama-tiny", made[0])
    later = Path(shutil.copytree(made[0], tmp_path / "later"))
    (later / "LICENSE").write_text("new")
    second = hub.add("org/llama-tiny", later)
    assert first != second
    for revision, commit in ((first, first), (None, second)):
        adapter = naming(made[1], tmp_path / str(revision), "org/llama-tiny", revision)
        prepared = prepare(build_job(None, adapter))
        assert prepared.plan.fingerprint["from"]["base"] == f"org/llama-tiny@{commit}"
        assert not prepared.plan.notes
    adapter = naming(made[1], tmp_path / "another", "org/llama-tiny", first)
    prepared = prepare(build_job(None, adapter, base_revision=second))
    assert prepared.job.base_revision == second
    (note,) = prepared.plan.notes
    assert first in note
    assert second[:12] in note
    streamconv.merge(None, adapter, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "streamconv-recipe.json").read_text())
    assert recipe["base"] == f"org/llama-tiny@{first}"
    assert "base_model:\n- org/llama-tiny" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", [None, "", "/workspace/nowhere/model", "./nowhere"])
def test_without_a_base_that_is_there_the_option_is_named(
    name: str | None, made: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = naming(made[1], tmp_path / "adapter", name)
    for command in ("plan", "analyze"):
        result = CliRunner().invoke(main, [command, "--adapter", str(adapter)])
        assert result.exit_code == 2
        assert "--base" in result.stderr
        assert (name or "base_model_name_or_path") in result.stderr


def test_without_base_and_adapter_there_is_nothing_to_do() -> None:
    for command in (["plan"], ["convert", "-o", "x"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert "--base" in result.stderr
    with pytest.raises(OptionError, match="--adapter"):
        streamconv.evaluate(data="x.txt")


# -- another is given ------------------------------------------------------------------------------------------------


def notes(
    folder: Path, name: str, config: Mapping[str, Any] | None = None, manifest: object = None
) -> tuple[str, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        (folder / "streamconv.json").write_text(json.dumps(manifest))
    fields = {"base_model_name_or_path": name}
    return base_notes(fields, open_storage(str(folder)), config or {}, str(folder), None)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (REPO, "Llama-3.1-8B"),
        (REPO.lower(), "llama-3.1-8b"),
        (REPO, "llama_3_1_8b"),
        ("/workspace/models/Llama-3.1-8B/", "Llama-3.1-8B"),
        ("/data/hf/hub/models--meta-llama--Llama-3.1-8B/snapshots/0a1b", "Llama-3.1-8B"),
        ("/data/modelscope/hub/models/LLM-Research/Llama-3___1-8B", "Llama-3.1-8B"),
    ],
)
def test_one_name_is_no_reason_to_speak(name: str, folder: str, tmp_path: Path) -> None:
    assert notes(tmp_path / folder, name) == ()
    assert notes(tmp_path / "other", name, {"_name_or_path": REPO}) == ()


def test_another_name_is_said(tmp_path: Path) -> None:
    (note,) = notes(tmp_path / "llama", "someone/another-model-7b")
    assert note.startswith("the adapter names someone/another-model-7b as its base; ")
    assert note.endswith("the shapes fit")


def test_a_path_of_training_is_not_repeated(tmp_path: Path) -> None:
    (note,) = notes(tmp_path / "secret" / "llama", "/home/alice/run 7/mo|del<b>")
    assert "a folder of its training, mo?del?b?," in note
    assert "alice" not in note
    assert "llama" not in note
    assert notes(tmp_path / "secret" / "model", "/workspace/model") == ()


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "unsloth/Meta-Llama-3.1-8B-unsloth-bnb-4bit",
        "TheBloke/Meta-Llama-3.1-8B-GPTQ",
        "someone/Meta-Llama-3.1-8B-AWQ",
        "someone/meta-llama-3.1-8b-4bit",
        "someone/meta-llama-3.1-8b-GPTQ-Int4",
    ],
)
def test_a_quantized_twin_is_called_one(name: str, tmp_path: Path) -> None:
    (note,) = notes(tmp_path / "Meta-Llama-3.1-8B", name)
    assert f"names {name} as its base, a quantized copy of the base given" in note
    assert ("--merge-base nf4-dq" in note) == ("4bit" in name)
    assert notes(tmp_path / name.rpartition("/")[2], name) == ()
    (note,) = notes(tmp_path / name.rpartition("/")[2], "meta-llama/Meta-Llama-3.1-8B")
    assert "the base given is called as a quantized copy of it" in note


def test_hub_ids_are_compared_whole(hub: Hub, made: tuple[Path, Path], tmp_path: Path) -> None:
    hub.add("meta-llama/Llama-3.1-8B", made[0])
    for name, says in (
        ("Meta-Llama/llama-3.1-8b", None),
        ("unsloth/Llama-3.1-8B", "of the same name"),
        ("org/other", "the base given is meta-llama/Llama-3.1-8B"),
    ):
        adapter = naming(made[1], tmp_path / name, name)
        found = prepare(build_job("meta-llama/Llama-3.1-8B", adapter)).plan.notes
        assert len(found) == (says is not None)
        assert all(str(says) in note and name in note for note in found)


def test_a_base_that_streamconv_made_says_what_it_is_made_from(tmp_path: Path) -> None:
    manifest = {"fingerprint": {"from": {"base": "org/llama@0a1b", "adapter": "org/sft@0c0d"}}}
    (note,) = notes(tmp_path / "merged", "org/llama", manifest=manifest)
    assert "streamconv made it from org/llama@0a1b and org/sft@0c0d" in note
    damaged: list[dict[str, Any]] = [{}, {"fingerprint": []}, {"fingerprint": {"from": [1]}}]
    for broken in damaged:
        (note,) = notes(tmp_path / "broken", "org/llama", manifest=broken)
        assert "made it" not in note
    (tmp_path / "broken" / "streamconv.json").write_text("{")
    assert len(notes(tmp_path / "broken", "org/llama")) == 1


def test_it_is_said_in_plan_output_and_card(made: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = naming(made[1], tmp_path / "adapter", "someone/another-model-7b")
    given = ["--base", str(made[0]), "--adapter", str(adapter)]
    assert "another-model-7b" in CliRunner().invoke(main, ["plan", *given]).stdout
    result = CliRunner().invoke(main, ["merge", *given, "-o", str(tmp_path / "out")])
    assert "note: the adapter names someone/another-model-7b as its base" in result.stdout
    assert "someone/another-model-7b" in (tmp_path / "out" / "README.md").read_text()
