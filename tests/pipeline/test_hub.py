"""From ids to a model on the Hub and back, against a stub: what is read and sent, pinned, refused, continued."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, constants
from peft import LoraConfig

import streamconv
from streamconv.cli import main
from streamconv.errors import (
    CheckpointError,
    HubError,
    InputError,
    OptionError,
    OutputError,
    ResourceError,
    VerificationError,
)
from streamconv.output.manifest import sealed
from streamconv.output.sidecars import RESIDUAL_CONFIG, RESIDUAL_TENSORS
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.pipeline import downloads, runner
from streamconv.sizes import format_size
from tests.forward.texts import save_tokenizer, write_text
from tests.hub_stub import TOKEN, Hub, Request
from tests.hubs import environment, hub
from tests.tiny import llama_config, save_adapter, save_base

__all__ = ["hub"]

# huggingface_hub 2.4 hands httpx2 the open file under the name that httpx2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
SUBFOLDER = "checkpoint-12"
JUNK = {
    "pytorch_model.bin": b"\x80\x02pickle",
    "optimizer.pt": b"\x80\x02pickle",
    "training_args.bin": b"\x80\x02pickle",
    "model.gguf": b"GGUF",
    "other.safetensors": b"not named by the index",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"",
}
USED = {
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "LICENSE",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
}


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path
    shards: set[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="20KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    adapter = save_adapter(folder / "adapter", base, LORA).path
    (adapter / "README.md").unlink()
    return Inputs(base, adapter, {path.name for path in base.glob("*.safetensors")})


@pytest.fixture
def stocked(hub: Hub, inputs: Inputs) -> Hub:
    """A stub with the base, beside files that no merge needs, and the adapter in a subfolder."""
    stock(hub, inputs)
    return hub


def stock(hub: Hub, inputs: Inputs) -> None:
    hub.add("org/base", inputs.base)
    hub.repos["org/base"].commit(hub.head("org/base") | JUNK)
    hub.add("org/adapter", inputs.adapter, f"{SUBFOLDER}/")
    hub.repos["org/adapter"].commit(hub.head("org/adapter") | {"README.md": b"", "optimizer.pt": b"\x80"})


INPUTS: list[str | Path] = [
    "--base",
    "org/base",
    "--adapter",
    "org/adapter",
    "--adapter-subfolder",
    SUBFOLDER,
]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def succeed(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def has_canary(*folders: Path, text: str = "") -> bool:
    """Whether the token is in any file below, or in the text."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return TOKEN in text or any(TOKEN.encode() in path.read_bytes() for path in files)


# -- in ------------------------------------------------------------------------------------------------------------


def test_a_merge_of_ids_is_the_merge_of_the_folders(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    succeed("merge", *INPUTS, "-o", tmp_path / "out")
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "local")
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "local")
    assert found.keys() == expected.keys()
    # They name the commits.
    assert {name for name in found if found[name] != expected[name]} == {
        "README.md",
        "streamconv-recipe.json",
        "streamconv.json",
    }
    assert stocked.downloaded() == USED | inputs.shards
    assert not stocked.asked("*/api/models/*", "POST")


def test_the_stored_recipe_names_inputs_by_commit(stocked: Hub, tmp_path: Path) -> None:
    """So it needs nothing but an output folder; and a branch that has moved since changes nothing."""
    succeed("merge", *INPUTS, "-o", tmp_path / "out")
    commits = {name: stocked.repos[f"org/{name}"].refs["main"] for name in ("base", "adapter")}
    recipe = tmp_path / "out" / "streamconv-recipe.json"
    found = json.loads(recipe.read_text())
    assert {name: found[name] for name in commits} == {
        name: f"org/{name}@{at}" for name, at in commits.items()
    }
    assert found["adapter-subfolder"] == SUBFOLDER
    stocked.repos["org/base"].commit({"README.md": b"all weights are gone"})
    succeed("merge", "--recipe", recipe, "-o", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_commits_are_in_manifest_and_card(stocked: Hub, tmp_path: Path) -> None:
    succeed("merge", *INPUTS, "-o", tmp_path / "out")
    base, adapter = (stocked.repos[repo].refs["main"] for repo in ("org/base", "org/adapter"))
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    assert manifest["fingerprint"]["from"] == {
        "base": f"org/base@{base}",
        "adapter": f"org/adapter@{adapter}",
    }
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.base_model == ["org/base", "org/adapter"]  # type: ignore[attr-defined]  # set from the YAML head
    assert card.data.license == "apache-2.0"  # type: ignore[attr-defined]  # set from the YAML head
    assert f"| base | org/base at commit {base} |" in card.text
    assert f"| adapter | org/adapter at commit {adapter} |" in card.text


def test_several_adapters_are_named_each_by_its_commit(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    """In recipe and card; but beside one of a folder, a recipe that named the other alone would be another's."""
    second = save_adapter(tmp_path / "second", inputs.base, LORA, seed=5).path
    stocked.add("org/second", second, f"{SUBFOLDER}/")
    given = [*INPUTS, "--weight", "0.5", "--adapter", "org/second"]
    succeed("merge", *given, "-o", tmp_path / "out")
    commits = [f"org/{name}@{stocked.repos[f'org/{name}'].refs['main']}" for name in ("adapter", "second")]
    recipe = tmp_path / "out" / "streamconv-recipe.json"
    found = json.loads(recipe.read_text())
    assert (found["adapter"], found["weight"]) == (commits, [0.5, 1.0])
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.base_model == ["org/base", "org/adapter", "org/second"]  # type: ignore[attr-defined]
    assert f"| adapter 2 | {commits[1].replace('@', ' at commit ')} |" in card.text
    succeed("merge", "--recipe", recipe, "-o", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")

    stocked.add("org/flat", inputs.adapter)
    streamconv.merge("org/base", ["org/flat", second], tmp_path / "mixed", weight=[0.5, 1])
    found = json.loads((tmp_path / "mixed" / "streamconv-recipe.json").read_text())
    assert "adapter" not in found
    assert found["weight"] == [0.5, 1.0]


def test_planning_reads_headers_only(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    shown = succeed("plan", *INPUTS, "-o", tmp_path / "out").stdout
    assert stocked.downloaded() & inputs.shards == set()
    assert all(request.range for request in stocked.asked("*/model-*"))
    as_json = json.loads(succeed("merge", *INPUTS, "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    listed = {file["name"] for file in as_json["downloads"]}
    assert listed == inputs.shards | {"generation_config.json", "tokenizer.json", "LICENSE", "README.md"}
    size = sum(file["bytes"] for file in as_json["downloads"])
    assert f"download  {format_size(size)} of org/base in {len(listed)} files" in shown
    assert not (tmp_path / "out").exists()


def test_a_commit_is_pinned_when_the_branch_moves(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    """Everything after the first look is asked for by commit."""
    old = {repo: stocked.repos[repo].refs["main"] for repo in ("org/base", "org/adapter")}

    def move(request: Request) -> None:
        for repo in old:
            if request.path.startswith(f"/{repo}/resolve/"):
                stocked.repos[repo].commit({"config.json": b"something else"})

    stocked.before = move
    streamconv.merge("org/base", "org/adapter", tmp_path / "out", adapter_subfolder=SUBFOLDER)
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "local")
    for name in inputs.shards | {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert {request.path.split("/resolve/")[1].split("/")[0] for request in stocked.asked("*/resolve/*")} == {
        *old.values()
    }
    assert all(stocked.repos[repo].refs["main"] != commit for repo, commit in old.items())


def test_revisions(stocked: Hub, tmp_path: Path) -> None:
    good = {repo: stocked.repos[repo].refs["main"] for repo in ("org/base", "org/adapter")}
    for repo, commit in good.items():
        stocked.repos[repo].refs["v1"] = commit
        stocked.repos[repo].commit({"config.json": b"spoilt"})
    plan = succeed(
        *("plan", "--base", "org/base", "--base-revision", "v1", "--adapter", "hf://org/adapter@v1"),
        *("--adapter-subfolder", SUBFOLDER, "--json"),
    )
    assert json.loads(plan.stdout)["from"] == {
        "base": f"org/base@{good['org/base']}",
        "adapter": f"org/adapter@{good['org/adapter']}",
    }
    twice = run("plan", "--base", "org/base@v1", "--base-revision", "v1")
    assert (twice.exit_code, twice.stderr.count("\n")) == (2, 1)
    assert "org/base@v1 has a revision already" in twice.stderr


def test_a_snapshot_of_the_cache_is_as_good_as_its_id(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    """A run begun with the id goes on with the cached folder, and the other way round."""
    succeed("convert", "--base", "org/base", "-o", tmp_path / "out")
    commit = stocked.repos["org/base"].refs["main"]
    snapshot = tmp_path / "cache" / "models--org--base" / "snapshots" / commit
    assert "was complete already" in succeed("convert", "--base", snapshot, "-o", tmp_path / "out").stdout
    assert {path.name for path in snapshot.iterdir()} >= inputs.shards


def test_a_finished_run_is_not_downloaded_again(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    succeed("merge", *INPUTS, "-o", tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    stocked.requests.clear()
    assert "was complete already" in succeed("merge", *INPUTS, "-o", tmp_path / "out").stdout
    assert not stocked.downloaded() & inputs.shards


def test_offline_with_all_that_is_needed_cached(
    stocked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("merge", *INPUTS, "-o", tmp_path / "out")
    stocked.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    succeed("merge", *INPUTS, "-o", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert not stocked.requests
    refused = run("convert", "--base", "org/other", "-o", tmp_path / "x")
    assert (refused.exit_code, refused.stderr.count("\n")) == (6, 1)


def test_verify_and_inspect_take_ids(stocked: Hub, tmp_path: Path) -> None:
    succeed("merge", *INPUTS, "-o", tmp_path / "out")
    commit = stocked.repos["org/adapter"].refs["main"]
    shutil.rmtree(tmp_path / "cache")
    succeed("verify", tmp_path / "out", "--full", *INPUTS, "--adapter-revision", commit)
    assert json.loads(succeed("inspect", "org/base", "--json").stdout)["kind"] == "checkpoint"
    assert run("verify", "org/base").exit_code == 3


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_an_output_that_cannot_be_is_refused_before_the_download(
    stocked: Hub, inputs: Inputs, tmp_path: Path, command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    result = run(command, *INPUTS, "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert not stocked.downloaded() & inputs.shards


def test_a_disk_too_small_is_said_before_the_download(
    stocked: Hub, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "free_bytes", lambda _: 100_000)
    with pytest.raises(ResourceError, match="with the download, whose cache is on the same disk"):
        streamconv.merge("org/base", "org/adapter", tmp_path / "out", adapter_subfolder=SUBFOLDER)
    assert not stocked.downloaded() & inputs.shards


def test_a_branch_that_moved_since_the_run_was_begun(
    stocked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the id and commit that finish it."""
    old = stocked.repos["org/base"].refs["main"]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "publish_output", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            streamconv.convert("org/base", tmp_path / "out")
    new = stocked.repos["org/base"].commit(stocked.head("org/base") | {"README.md": b"# Better"})
    result = run("convert", "--base", "org/base", "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert f'from.base: then "org/base@{old}", now "org/base@{new}"' in result.stderr
    succeed("convert", "--base", f"org/base@{old}", "-o", tmp_path / "out")


# -- out -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(inputs: Inputs, tmp_path: Path) -> Path:
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "out")
    return tmp_path / "out"


def test_a_push_is_read_back_the_same(hub: Hub, output: Path, tmp_path: Path) -> None:
    (output / ".streamconv").mkdir()
    (output / ".streamconv" / "left.partial").touch()
    (output / "notes.txt").write_text("mine")
    pushed = streamconv.push(output, "me/merged")
    assert pushed.private
    assert hub.repos["me/merged"].private
    assert pushed.commit == hub.repos["me/merged"].refs["main"]
    assert len(hub.repos["me/merged"].commits) == 2  # the empty one, and ours
    remote = hub.head("me/merged")
    del remote[".gitattributes"]
    assert remote == contents(output)
    assert pushed.bytes == sum(map(len, remote.values()))
    streamconv.convert("me/merged", tmp_path / "back", card=False)
    for name in ("config.json", *(path.name for path in output.glob("*.safetensors"))):
        assert (tmp_path / "back" / name).read_bytes() == (output / name).read_bytes()


def test_merge_and_push_in_one(stocked: Hub, tmp_path: Path) -> None:
    arguments: list[str | Path] = [
        "merge",
        *INPUTS,
        "-o",
        tmp_path / "out",
        "--push-to",
        "me/merged",
        "--commit-message",
        "Hi",
    ]
    first = succeed(*arguments, "--public", "--json")
    pushed = json.loads(first.stdout)["pushed"]
    assert not stocked.repos["me/merged"].private
    assert (pushed["private"], pushed["repo"]) == (False, "me/merged")
    stocked.requests.clear()
    again = succeed(*arguments)
    assert f"{stocked.url}/me/merged: " in again.stdout
    assert "was complete already, public" in again.stdout
    assert not stocked.asked("*", "PUT")
    assert not stocked.asked("*/commit/*")
    assert not has_canary(tmp_path, text=first.output + again.output)


def test_further_outputs_are_not_pushed_by_the_way(stocked: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = succeed("merge", *INPUTS, "-o", out, "--also", "nf4", "--push-to", "me/merged").stdout
    assert f"{out / 'nf4'} was not uploaded; `streamconv push` does that" in shown
    remote = stocked.head("me/merged")
    assert not [name for name in remote if "/" in name]
    assert "quantization_config" not in json.loads(remote["config.json"])
    streamconv.push(out / "nf4", "me/nf4")
    assert json.loads(stocked.head("me/nf4")["config.json"])["quantization_config"]["load_in_4bit"]


def test_an_upload_tells_how_far_it_is(hub: Hub, output: Path) -> None:
    told: list[tuple[int, int]] = []
    sent: list[int] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        sent.append(sum(map(len, hub.blobs.values())))

    pushed = streamconv.push(output, "me/merged", on_upload=tell)
    assert told[0] == (0, pushed.bytes)
    assert told[-1] == (pushed.bytes, pushed.bytes)
    assert len(told) >= 4
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert sent[0] == 0 < sent[1] < sent[-1]
    assert all(there <= done for there, (done, _) in zip(sent, told, strict=True))
    told.clear()
    streamconv.push(output, "me/merged", on_upload=tell)
    assert not told


def test_off_a_terminal_an_upload_is_told_of_in_lines(hub: Hub, output: Path) -> None:
    told = succeed("push", output, "me/merged").stderr
    assert re.search(r"^upload: (\S+ \S+) of \1, .+/s, 0 s left$", told, re.MULTILINE)
    assert "\r" not in told
    assert "upload" not in succeed("push", output, "me/merged", "-q").stderr
    assert "upload" not in succeed("push", output, "me/other", "-q").stderr


def test_a_pull_request(hub: Hub, output: Path) -> None:
    streamconv.push(output, "me/merged")
    (output / "notes.txt").write_text("more")
    head = hub.head("me/merged")
    pushed = streamconv.push(output, "me/merged", create_pr=True)
    assert pushed.pull_request == f"{hub.url}/me/merged/discussions/1"
    assert hub.head("me/merged") == head
    assert hub.head("me/merged", "refs/pr/1") == head | {"notes.txt": b"more"}
    assert pushed.bytes == 4


def test_a_branch(hub: Hub, output: Path) -> None:
    result = succeed("push", output, "me/merged", "--revision", "v2")
    assert "private" in result.stdout
    assert "config.json" in hub.head("me/merged", "v2")
    assert "config.json" not in hub.head("me/merged")
    with pytest.raises(OptionError, match="--create-pr proposes a change of the main branch"):
        streamconv.push(output, "me/merged", create_pr=True, revision="v2")


def test_what_an_older_output_left_is_removed(hub: Hub, inputs: Inputs, output: Path, tmp_path: Path) -> None:
    """Else a loader would take `model.safetensors` for the model, or shards that are none of it."""
    streamconv.push(output, "me/merged")
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "one", max_shard_size="1GB")
    hub.repos["me/merged"].commit(hub.head("me/merged") | {"kept.txt": b""})
    streamconv.push(tmp_path / "one", "me/merged")
    assert set(hub.head("me/merged")) == {*contents(tmp_path / "one"), ".gitattributes", "kept.txt"}


def test_chat_templates_travel_with_the_tokenizer(hub: Hub, inputs: Inputs, tmp_path: Path) -> None:
    """From a repository into an output, from there into another, and away when the next output has none."""
    hub.add("org/base", inputs.base)
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("documents")
    (folder / "notes.txt").write_text("no template")
    hub.add("org/base", folder, f"{CHAT_TEMPLATES}/")
    streamconv.convert("org/base", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / CHAT_TEMPLATES).iterdir()] == ["rag.jinja"]
    streamconv.push(tmp_path / "out", "me/out")
    remote = hub.head("me/out")
    assert remote[f"{CHAT_TEMPLATES}/rag.jinja"] == b"documents"
    (tmp_path / "out" / CHAT_TEMPLATES / "rag.jinja").rename(tmp_path / "rag.jinja")
    hub.repos["me/out"].commit(remote | {f"{CHAT_TEMPLATES}/mine.txt": b""})
    streamconv.push(tmp_path / "out", "me/out")
    assert set(remote) - set(hub.head("me/out")) == {f"{CHAT_TEMPLATES}/rag.jinja"}
    (tmp_path / "out" / CHAT_TEMPLATES / "rag.jinja").symlink_to(tmp_path / "rag.jinja")
    with pytest.raises(InputError, match=r"rag\.jinja is a link that leads outside"):
        streamconv.push(tmp_path / "out", "me/out")


def test_another_model_is_not_written_over(hub: Hub, inputs: Inputs, output: Path) -> None:
    hub.add("me/base", inputs.base)
    before = hub.head("me/base")
    with pytest.raises(OutputError, match=r"me/base holds another model \(config\.json, model-0"):
        streamconv.push(output, "me/base")
    assert hub.head("me/base") == before
    streamconv.push(output, "me/base", create_pr=True)
    assert hub.head("me/base") == before


@pytest.mark.parametrize("private", [True, False])
def test_who_may_see_a_repository_is_not_left_to_chance(hub: Hub, output: Path, private: bool) -> None:
    streamconv.push(output, "me/merged", private=private)
    with pytest.raises(OutputError, match=r"and --p.* was given; change it at"):
        streamconv.push(output, "me/merged", private=not private)
    assert streamconv.push(output, "me/merged").private is private


def test_a_damaged_output_is_not_pushed(hub: Hub, output: Path) -> None:
    shard = min(output.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match=shard.name):
        streamconv.push(output, "me/merged")
    assert "me/merged" not in hub.repos


def test_no_output_and_strange_weights(hub: Hub, inputs: Inputs, output: Path) -> None:
    with pytest.raises(InputError, match=r"has no streamconv\.json"):
        streamconv.push(inputs.base, "me/merged")
    (output / "stray.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"stray\.safetensors is not of this output"):
        streamconv.push(output, "me/merged")
    assert not hub.repos


def test_a_hub_that_lists_other_content(hub: Hub, output: Path) -> None:
    def spoil(request: Request) -> None:
        if request.path.startswith("/api/models/me/merged/revision/") and "config.json" in hub.head(
            "me/merged"
        ):
            hub.head("me/merged")["config.json"] = b"{}"

    hub.before = lambda request: spoil(request) if "me/merged" in hub.repos else None
    with pytest.raises(VerificationError, match=r"me/merged: the Hub lists 2 B named .* for config\.json"):
        streamconv.push(output, "me/merged")


# -- only what is in the folder -------------------------------------------------------------------------------------

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


def nowhere(hub: Hub, text: str = SECRET) -> bool:
    """Whether no part of the Hub has the text."""
    commits = [
        content
        for repo in hub.repos.values()
        for files in repo.commits.values()
        for content in files.values()
    ]
    return not any(text.encode() in content for content in [*commits, *hub.blobs.values()])


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True)
    (folder / "id_rsa").write_text(SECRET)
    return folder / "id_rsa"


@pytest.mark.parametrize("link", ["notes.txt", "README.md", "more.json", "residual/adapter_config.json"])
@pytest.mark.parametrize("how", ["link", "link to a link", "relative", "folder", "broken", "pipe", "socket"])
def test_what_is_no_file_of_the_folder_is_not_pushed(
    hub: Hub, output: Path, secret: Path, tmp_path: Path, link: str, how: str
) -> None:
    path = output / link
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if path.parent != output:  # only files that the manifest lists are pushed from there
        manifest = json.loads((output / "streamconv.json").read_text())
        manifest["files"][link] = {"size": len(SECRET), "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}
        (output / "streamconv.json").write_bytes(sealed(manifest))
    told = rf"{re.escape(str(path))} is a link that leads outside the output, to .*; remove the link, or put a copy"
    match how:
        case "link":
            path.symlink_to(secret)
        case "link to a link":
            (output / ".other").symlink_to(secret)
            path.symlink_to(output / ".other")
        case "relative":
            path.symlink_to(Path(os.path.relpath(secret, path.parent)))
        case "folder":
            if path.parent == output:
                path.symlink_to(secret.parent)  # as other folders: left here
                if link == "README.md":  # which is of the output
                    with pytest.raises(CheckpointError, match=r"README.md is a link that leads outside"):
                        streamconv.push(output, "me/merged")
                    assert not hub.repos
                    return
                streamconv.push(output, "me/merged")
                assert link not in hub.head("me/merged")
                assert nowhere(hub)
                return
            path.parent.rmdir()
            path.parent.symlink_to(secret.parent)
            secret.rename(secret.with_name(path.name))
        case "broken":
            path.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(path)
            told = "must be a regular file, found a named pipe; move it elsewhere, then push again"
        case "socket":
            with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
                made.bind(path.name)
            told = "must be a regular file, found a socket; move it elsewhere, then push again"
    result = run("push", output, "me/merged")
    assert result.exit_code == 3, result.output
    assert re.search(told, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert not hub.repos
    assert nowhere(hub)


def test_a_link_that_stays_inside_is_pushed_as_its_file(hub: Hub, output: Path) -> None:
    (output / "notes.txt").write_text("mine")
    (output / "more.txt").symlink_to("notes.txt")
    streamconv.push(output, "me/merged")
    assert hub.head("me/merged")["more.txt"] == b"mine"


@pytest.mark.parametrize(
    "when", ["*/whoami-v2", "*/preupload/*", "*/objects/batch", "/blobs/*", "*/validate-yaml"]
)
@pytest.mark.parametrize("name", ["notes.txt", "README.md", "large.bin", "shard"])
def test_a_name_that_becomes_a_link_meanwhile(
    hub: Hub, output: Path, secret: Path, name: str, when: str
) -> None:
    """The file that was looked at is sent, whatever its name leads to by then; or nothing is."""
    path = min(output.glob("*.safetensors")) if name == "shard" else output / name
    if not path.exists():
        path.write_text("mine")
    before = path.read_bytes()

    def swap(request: Request) -> None:
        if request in hub.asked(when) and not path.is_symlink():
            path.rename(output.parent / path.name)
            path.symlink_to(secret)

    hub.before = swap
    result = run("push", output, "me/merged")
    assert path.is_symlink()
    assert nowhere(hub)
    assert TOKEN not in result.output
    if result.exit_code == 0:
        assert hub.head("me/merged")[path.name] == before
    else:
        assert result.exit_code in (3, 7), result.output
        assert not hub.repos


def test_a_file_that_is_written_to_meanwhile_is_not_committed(hub: Hub, output: Path) -> None:
    def write(request: Request) -> None:
        if request.method == "PUT":
            (output / "README.md").write_text("# Other")

    hub.before = write
    result = run("push", output, "me/merged")
    assert result.exit_code == 3
    assert "README.md changed while it was pushed; push again once nothing writes to it" in result.stderr
    assert set(hub.head("me/merged")) == {".gitattributes"}
    hub.before = lambda _: None
    succeed("push", output, "me/merged")


# -- others at the same time ----------------------------------------------------------------------------------------


def test_a_branch_that_moved_since_it_was_looked_at(hub: Hub, output: Path) -> None:
    """Else the commit would mix two models, or undo somebody's."""
    streamconv.push(output, "me/merged")
    (output / "README.md").write_text("# Mine")
    theirs = hub.head("me/merged") | {"README.md": b"# Theirs"}

    def move(request: Request) -> None:
        if "/preupload/" in request.path and hub.head("me/merged") != theirs:
            hub.repos["me/merged"].commit(theirs)

    hub.before = move
    result = run("push", output, "me/merged", "-q")
    assert (result.exit_code, result.stderr.count("\n")) == (6, 1)
    assert (
        "me/merged: somebody else changed it at the same time (status 412), so nothing was" in result.stderr
    )
    assert hub.head("me/merged") == theirs
    hub.before = lambda _: None
    succeed("push", output, "me/merged")
    assert hub.head("me/merged")["README.md"] == b"# Mine"


def test_a_repository_that_somebody_else_makes_and_fills_meanwhile(
    hub: Hub, inputs: Inputs, output: Path
) -> None:
    def make(request: Request) -> None:
        if request.path == "/api/repos/create":
            hub.add("me/merged", inputs.base)

    hub.before = make
    result = run("push", output, "me/merged")
    assert result.exit_code == 4, result.output
    assert "me/merged holds another model" in result.stderr
    assert hub.head("me/merged").keys() == contents(inputs.base).keys()


def test_a_push_that_fails_after_the_merge_says_what_is_there(
    stocked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stocked.refuse = lambda request: 503 if "/preupload/" in request.path else None
    out = tmp_path / "my out"
    result = run(
        "merge", *INPUTS, "-o", out, "--push-to", "me/merged", "--public", "--push-revision", "v2", "-q"
    )
    assert (result.exit_code, result.stderr.count("\n")) == (6, 1)
    command = f"streamconv push '{out}' me/merged --public --revision v2"
    assert "the Hub has a problem (status 503)" in result.stderr
    assert result.stderr.endswith(f". The output in {out} is complete; to push it, run `{command}`\n")
    succeed("verify", out)
    stocked.refuse = lambda _: None
    succeed(*shlex.split(command)[1:])
    assert contents(out).items() <= stocked.head("me/merged", "v2").items()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["merged", "me/", "a b/c", "hf://me/merged", "me/merged@v1"])
def test_strange_repositories(hub: Hub, output: Path, repo: str) -> None:
    result = run("push", output, repo)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert repo in result.stderr
    assert not hub.requests


def test_how_to_push_without_a_push(hub: Hub, tmp_path: Path) -> None:
    for extra in (
        ["--private"],
        ["--public"],
        ["--create-pr"],
        ["--push-revision", "x"],
        ["--commit-message", "x"],
    ):
        result = run("convert", "--base", "org/base", "-o", tmp_path / "out", *extra)
        assert result.exit_code == 2
        assert "add --push-to REPO" in result.stderr
    assert not hub.requests


def test_a_push_that_cannot_be_is_refused_before_the_merge(
    stocked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[str | Path] = ["merge", *INPUTS, "-o", tmp_path / "out", "--push-to"]

    def refused(repo: str, code: int, text: str) -> None:
        result = run(*arguments, repo)
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1)
        assert text in result.stderr
        assert not has_canary(text=result.output)

    refused("org/base", 4, "org/base holds another model")
    stocked.role = "read"
    refused("me/merged", 6, "the token in use may only read; make one that may write at")
    stocked.role = "write"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("me/merged", 6, "does not accept the token in use")
    monkeypatch.delenv("HF_TOKEN")
    refused("me/merged", 6, "to push, log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("me/merged", 6, "HF_HUB_OFFLINE is set")
    assert not (tmp_path / "out").exists()
    assert not stocked.asked("/org/*")


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        (
            "/api/repos/create",
            403,
            "the token in use may not do this; give it the permission (to push: write)",
        ),
        ("*/preupload/*", 503, "the Hub has a problem (status 503); run the same command again later"),
        ("*/objects/batch", 500, "the Hub has a problem (status 500)"),
        ("/blobs/*", 403, "the token in use may not do this"),
        ("*/commit/*", 429, "the Hub asks for fewer requests (status 429)"),
        ("*/commit/*", 413, "the Hub refused with status 413"),
    ],
)
def test_a_push_that_is_refused_goes_on_later(
    hub: Hub, output: Path, path: str, status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.refuse = lambda request: status if request in hub.asked(path) else None
    result = run("push", output, "me/merged", "-q")
    assert result.exit_code == 6
    assert result.stderr.count("\n") == 1
    assert text in result.stderr
    assert not has_canary(output, text=result.output)
    hub.refuse = lambda _: None
    succeed("push", output, "me/merged")
    assert "config.json" in hub.head("me/merged")


def test_a_repeated_token_is_cut_out(hub: Hub, output: Path) -> None:
    """The stub's refusals repeat the login they were sent."""
    hub.refuse = lambda request: 418 if "preupload" in request.path else None
    with pytest.raises(HubError, match=r"refused Bearer \(token\)"):
        streamconv.push(output, "me/merged")


# -- killed ----------------------------------------------------------------------------------------------------------


def child(hub: Hub, folder: Path, *arguments: str | Path, **settings: str) -> subprocess.Popen[str]:
    """Python in a process of its own, pointed at the stub by the environment alone."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(hub, folder) | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def kill_at_second_blob(hub: Hub, process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    def kill(request: Request) -> None:
        if request.method == "PUT" and len(hub.blobs) > 0:
            hub.refuse = lambda _: 503
            process.send_signal(number)

    hub.before = kill
    try:
        return wait(process)
    finally:
        hub.before, hub.refuse = lambda _: None, lambda _: None


def test_an_upload_killed_midway_goes_on(hub: Hub, inputs: Inputs, output: Path, tmp_path: Path) -> None:
    """The same command again sends only what the Hub does not have; the Hub never shows half a model."""
    process = child(hub, tmp_path, "-m", "streamconv", "push", output, "me/merged")
    code, text = kill_at_second_blob(hub, process, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert set(hub.head("me/merged")) == {".gitattributes"}
    assert 0 < len(hub.blobs) < len(inputs.shards)
    there = set(hub.blobs)
    hub.requests.clear()
    text += succeed("push", output, "me/merged").output
    sent = {request.path.rpartition("/")[2] for request in hub.asked("/blobs/*", "PUT")}
    assert sent == set(hub.blobs) - there
    assert hub.head("me/merged").items() >= contents(output).items()
    assert not has_canary(tmp_path, text=text)


# The middle of `streamconv push`, without torch, which takes seconds to import.
UPLOAD = """
import sys
from pathlib import Path
from streamconv.cli.signals import leave, on_signals
from streamconv.storage.upload import LocalFile, check_target, parse_target, upload
target = parse_target("me/merged", None, False, None, None)
files = {path.name: LocalFile(path, path.stat().st_size, "") for path in Path(sys.argv[1]).glob("*.safetensors")}
with on_signals(leave):
    remote = check_target(target, "streamconv.json")
    upload(target, remote, files, lambda _: False, "streamconv.json", "message", False, lambda *_: None)
"""


def test_an_interrupted_upload_does_not_wait_for_its_threads(
    hub: Hub, inputs: Inputs, output: Path, tmp_path: Path
) -> None:
    process = child(hub, tmp_path, "-c", UPLOAD, output)
    code, text = kill_at_second_blob(hub, process, signal.SIGINT)
    # Meanwhile huggingface_hub may say of one of its threads that it tries again.
    assert (code, text.count("\nstopped; the same command goes on\n")) == (130, 1), text
    assert len(hub.blobs) < len(inputs.shards)


def test_a_download_killed_midway_goes_on(stocked: Hub, inputs: Inputs, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["merge", *INPUTS, "-o", tmp_path / "out"]
    process = child(stocked, tmp_path, "-m", "streamconv", *arguments)
    fetched: list[str] = []

    def kill(request: Request) -> None:
        name = request.path.rpartition("/")[2]
        if request.method == "GET" and name in inputs.shards and request.range is None:
            fetched.append(name)
            if len(fetched) == 2:
                process.terminate()
                process.wait()

    stocked.before = kill
    code, text = wait(process)
    assert code == 143
    assert text.endswith("\nstopped by a signal; run the same command again to go on\n")
    # What was made of the first shard may have been begun, but nothing has its final name.
    assert {path.name for path in tmp_path.glob("out/*")} <= {".streamconv"}
    stocked.before = lambda _: None
    stocked.requests.clear()
    text += succeed(*arguments).output
    assert stocked.downloaded() & inputs.shards == inputs.shards - {fetched[0]}
    assert not has_canary(tmp_path, text=text)


def test_offline_by_the_environment(stocked: Hub, tmp_path: Path) -> None:
    script = "from streamconv.storage import open_storage; open_storage('org/base')"
    code, text = wait(child(stocked, tmp_path, "-c", script, HF_HUB_OFFLINE="1"))
    assert code == 1
    assert "HubError: org/base at main is not in the Hub cache" in text
    assert not stocked.requests


def test_a_model_on_the_hub_is_evaluated_with_its_tokenizer(hub: Hub, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config())
    save_tokenizer(base)
    hub.add("org/evaluated", base)
    data = write_text(tmp_path / "text.txt")
    found = [
        streamconv.evaluate(model, data=data, sequence_length=32, tokens=64)
        for model in ("org/evaluated", base)
    ]
    assert found[0].losses == found[1].losses


def test_a_residual_adapter_travels_with_its_model(hub: Hub, output: Path, tmp_path: Path) -> None:
    """And goes when the next output has none; a file in its folder that is not of the output stays here."""
    out = Path(shutil.copytree(output, tmp_path / "with-residual"))
    path = out / "streamconv.json"
    manifest = json.loads(path.read_text())
    for name in (RESIDUAL_CONFIG, RESIDUAL_TENSORS):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"{}")
        manifest["files"][name] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    path.write_bytes(sealed(manifest))
    (out / RESIDUAL_TENSORS).with_name("notes.txt").write_text("mine")
    streamconv.push(out, "me/out")
    assert set(hub.head("me/out")) == {*contents(output), ".gitattributes", RESIDUAL_CONFIG, RESIDUAL_TENSORS}
    streamconv.push(output, "me/out")
    assert set(hub.head("me/out")) == {*contents(output), ".gitattributes"}


def test_what_was_edited_and_what_is_of_no_output_is_told(hub: Hub, output: Path) -> None:
    (output / "README.md").write_text("mine")
    (output / "notes.txt").write_text("also mine")
    pushed = streamconv.push(output, "me/merged")
    assert (pushed.edited, pushed.others) == (("README.md",), ("notes.txt",))
    told = run("push", output, "me/merged").output
    assert "changed since it was written, as people may: README.md" in told
    assert "not of this output, and uploaded with it: notes.txt" in told
