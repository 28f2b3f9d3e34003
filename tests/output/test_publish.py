"""The order in which a result appears."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import CheckpointError, OutputError
from streamconv.output.publish import publish_output
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.planning.plan import Plan
from streamconv.storage import open_storage
from tests.output.shards import content, opened, write_all

GENERATED = {
    "model.safetensors.index.json": b"{}",
    "README.md": b"# new",
    "streamconv.json": b"{}",
    "config.json": b'{"new": true}',
}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names as they vanish (`- name`) and appear in the output folder."""
    seen: list[str] = []
    replace, unlink = os.replace, os.unlink

    def noting_replace(source: Any, target: Any) -> None:
        seen.append(Path(target).name)
        replace(source, target)

    def noting_unlink(path: Any, **options: Any) -> None:
        existed = Path(path).exists()
        unlink(path, **options)
        if existed and not Path(path).name.endswith(".partial"):
            seen.append(f"- {Path(path).name}")

    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(os, "unlink", noting_unlink)
    return seen


def test_config_goes_first_and_comes_last(out: Path, plan: Plan, tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("new")
    (tmp_path / "base" / "empty.txt").touch()
    storage = open_storage(str(tmp_path / "base"))
    kept = ("notes.txt", "LICENSE", "model.bin")
    for name in (*kept, "config.json", "model.safetensors", "chat_template.jinja", "adapter_config.json"):
        (out / name).write_text("old")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        order.clear()
        publish_output(
            out, plan, journal, (storage.file("empty.txt"), storage.file("tokenizer.json")), GENERATED
        )
    gone = {"- model.safetensors", "- chat_template.jinja", "- adapter_config.json"}
    assert order[0] == "- config.json"
    assert set(order[1:4]) == gone
    shards = [shard.name for shard in plan.shards]
    assert order[4:] == [*shards, "empty.txt", "tokenizer.json", *GENERATED]
    assert sorted(os.listdir(out)) == sorted([".streamconv", *order[4:], *kept])
    assert (out / "tokenizer.json").read_text() == "new"
    assert (out / "config.json").read_bytes() == GENERATED["config.json"]
    for shard in plan.shards:
        assert (out / shard.name).read_bytes() == content(shard)


def test_publishing_can_be_repeated(out: Path, plan: Plan) -> None:
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        for _ in range(2):
            publish_output(out, plan, journal, (), GENERATED)
        assert journal.progress.publishing
    assert {name: (out / name).read_bytes() for name in GENERATED} == GENERATED


def test_a_file_to_copy_that_changed_since_is_refused(out: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("planned")
    file = open_storage(str(tmp_path / "base")).file("tokenizer.json")
    (tmp_path / "base" / "tokenizer.json").write_text("and changed")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json changed"):
            publish_output(out, plan, journal, (file,), GENERATED)
    assert not (out / "config.json").exists()


def test_old_chat_templates_make_way(out: Path, plan: Plan, tmp_path: Path) -> None:
    base, templates = tmp_path / "base" / CHAT_TEMPLATES, out / CHAT_TEMPLATES
    base.mkdir(parents=True)
    templates.mkdir()
    (base / "rag.jinja").write_text("new")
    for name in ("rag.jinja", "tool_use.jinja", "notes.txt"):
        (templates / name).write_text("old")
    file = open_storage(str(tmp_path / "base")).file(f"{CHAT_TEMPLATES}/rag.jinja")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        publish_output(out, plan, journal, (file,), GENERATED)
        assert {path.name: path.read_text() for path in templates.iterdir()} == {
            "rag.jinja": "new",
            "notes.txt": "old",
        }
        publish_output(out, plan, journal, (), GENERATED)
        assert [path.name for path in templates.iterdir()] == ["notes.txt"]
        (templates / "notes.txt").unlink()
        publish_output(out, plan, journal, (), GENERATED)
    assert not templates.exists()


def test_chat_templates_are_not_written_through_a_link(out: Path, plan: Plan, tmp_path: Path) -> None:
    base, elsewhere = tmp_path / "base" / CHAT_TEMPLATES, tmp_path / "elsewhere"
    base.mkdir(parents=True)
    elsewhere.mkdir()
    (base / "rag.jinja").write_text("new")
    (elsewhere / "tool_use.jinja").write_text("of another model")
    (out / CHAT_TEMPLATES).symlink_to(elsewhere)
    file = open_storage(str(tmp_path / "base")).file(f"{CHAT_TEMPLATES}/rag.jinja")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        publish_output(out, plan, journal, (file,), GENERATED)
    assert os.listdir(elsewhere) == ["tool_use.jinja"]
    assert not (out / CHAT_TEMPLATES).is_symlink()
    assert (out / CHAT_TEMPLATES / "rag.jinja").read_text() == "new"


def test_a_folder_in_the_place_of_a_file_is_an_error_of_ours(out: Path, plan: Plan) -> None:
    (out / "config.json").mkdir()
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        with pytest.raises(OutputError, match=r"config\.json cannot be written: Is a directory"):
            publish_output(out, plan, journal, (), GENERATED)


# -- what waits, and what stands in the way ----------------------------------------------------------------------


def test_small_files_wait_in_the_work_folder(out: Path, plan: Plan, tmp_path: Path) -> None:
    """So nobody's file beside the output goes because of its name, nor one that a link leads to."""
    (tmp_path / "precious").write_text("precious")
    (out / ".config.json.partial").symlink_to(tmp_path / "precious")
    (out / ".README.md.partial").write_text("precious")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        publish_output(out, plan, journal, (), GENERATED)
    assert (tmp_path / "precious").read_text() == "precious"
    assert (out / ".README.md.partial").read_text() == "precious"
    assert (out / ".config.json.partial").is_symlink()


def test_a_link_in_the_place_of_a_file_makes_way_alone(out: Path, plan: Plan, tmp_path: Path) -> None:
    names = ("config.json", "README.md", plan.shards[0].name, "tokenizer.json")
    for name in names:
        (tmp_path / name).write_text("precious")
        (out / name).symlink_to(tmp_path / name)
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        publish_output(out, plan, journal, (), GENERATED)
    for name in names:
        assert (tmp_path / name).read_text() == "precious"
        assert not (out / name).is_symlink()
    assert (out / "config.json").read_bytes() == GENERATED["config.json"]


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_nothing_makes_way_for_a_shard_that_has_gone(out: Path, plan: Plan, harm: str) -> None:
    (out / "config.json").write_text("old")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        waiting = journal.finished(plan.shards[1].name)
        waiting.unlink() if harm == "gone" else waiting.write_bytes(bytes(plan.shards[1].size))
        with pytest.raises(OutputError, match="was removed or changed since it was finished"):
            publish_output(out, plan, journal, (), GENERATED)
    assert (out / "config.json").read_text() == "old"


def test_what_is_replaced_while_it_is_put_in_place_is_no_model(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another run, which the locks of the file system did not hold off."""
    replace = os.replace
    first = plan.shards[0].name

    def mixing(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "config.json":
            (out / first).write_bytes(bytes(plan.shards[0].size))

    monkeypatch.setattr(os, "replace", mixing)
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        with pytest.raises(
            OutputError, match=f"{first} was removed or changed while the output was being put"
        ):
            publish_output(out, plan, journal, (), GENERATED)
    assert not (out / "config.json").exists()
