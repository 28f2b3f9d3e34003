"""Merges of a base in an object store or on the Hub, whose shards come while the run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from streamconv.cli import main
from streamconv.errors import Stopped
from streamconv.pipeline import build_job, fetch, prepare
from streamconv.pipeline import run as run_job
from streamconv.progress import StopRequest, quiet
from streamconv.storage import object_fetch, open_storage
from tests import huge
from tests.hub_stub import Answer, Hub, Repo, Request, Sparse
from tests.hubs import hub
from tests.object_stub import BUCKET, Asked, Content, Store, refusal, store, variables
from tests.tiny import llama_config, save_adapter, save_base

__all__ = ["hub", "store"]

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
BASE = f"s3://{BUCKET}/llama"


@dataclass(frozen=True)
class Inputs:
    """Folders, the merge of them as SHA-256 by name, and names of the base's shards."""

    base: Path
    adapter: Path
    merged: dict[str, str]
    shards: list[str]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def merged(base: str | Path, adapter: str | Path, out: Path, *more: str) -> Result:
    return run("merge", "--base", base, "--adapter", adapter, "-o", out, "--device", "cpu", *more)


def hashes(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.is_file() and not re.search(r"README|recipe|streamconv", path.name)
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="15KB")
    (base / "tokenizer.json").write_text("{}")
    adapter = save_adapter(folder / "adapter", base, LORA).path
    found = merged(base, adapter, folder / "out")
    assert found.exit_code == 0, found.output
    return Inputs(
        base, adapter, hashes(folder / "out"), sorted(path.name for path in base.glob("*.safetensors"))
    )


@pytest.fixture
def stocked(store: Store, inputs: Inputs) -> Store:
    for folder, prefix in ((inputs.base, "llama"), (inputs.adapter, "lora")):
        for path in folder.iterdir():
            store.put(f"{prefix}/{path.name}", path.read_bytes())
    return store


def test_a_merge_of_objects_is_the_merge_of_the_folders(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    for scheme in ("s3", "gs", "az"):
        out = tmp_path / scheme
        found = merged(f"{scheme}://{BUCKET}/llama", f"{scheme}://{BUCKET}/lora", out)
        assert found.exit_code == 0, found.output
        assert hashes(out) == inputs.merged


# -- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_reads_headers_alone_and_leaves_nothing_here(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    found = run("plan", "--base", BASE, "--adapter", inputs.adapter, "--low-disk")
    assert found.exit_code == 0, found.output
    assert re.search(r"low disk +at most \d shards of the base here at once, ", found.output)
    assert not (tmp_path / "assets").exists()
    for name in inputs.shards:
        asked = [each for each in stocked.requests if each.key == f"llama/{name}"]
        assert [each.range and each.range[0] for each in asked] == [0]


def huge_store(store: Store) -> str:
    store.objects |= {f"405b/{name}": Content(*found) for name, found in huge.files().items()}
    return f"s3://{BUCKET}/405b"


def huge_hub(hub: Hub) -> str:
    found = huge.files().items()
    content = {name: Sparse(head, size) if size > len(head) else head for name, (head, size) in found}
    hub.repos["org/405b"] = Repo()
    hub.repos["org/405b"].commit(content)
    return "org/405b"


def huge_adapter(folder: Path) -> Path:
    """An adapter of one layer, which is no more than what a plan reads of any."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [7],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, huge.HIDDEN), name.format("B"): torch.ones(huge.HIDDEN, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_a_model_of_405b_is_planned_from_far_away(store: Store, hub: Hub, tmp_path: Path) -> None:
    adapter = huge_adapter(tmp_path / "adapter")
    for base in (huge_store(store), huge_hub(hub)):
        began = time.monotonic()
        found = run("plan", "--base", base, "--adapter", adapter, "--low-disk", "--json")
        assert found.exit_code == 0, found.output
        assert time.monotonic() - began < 30
        plan = json.loads(found.output)
        assert sum(file["bytes"] for file in plan["downloads"]) > 8e11
        assert plan["low_disk"] == {"shards": 2, "bytes": plan["low_disk"]["bytes"]}
        assert plan["low_disk"]["bytes"] < 1e10
    read = sum(asked.range[1] - asked.range[0] for asked in store.requests if asked.range)
    assert read < 200 * 2**17


# -- shards that come while others are read ----------------------------------------------------------------------------


def shards_here(folder: Path) -> set[str]:
    """Shards of a base in a cache, whole or in part."""
    return {
        found[0] for path in folder.rglob("*") if (found := re.match(r"model-0000\d-of-0000\d", path.name))
    }


def watched(stocked: Store, cache: Path) -> list[int]:
    """Numbers of shards that are here whenever one is asked for, the one that comes included."""
    seen: list[int] = []

    def look(asked: Asked) -> None:
        if asked.key and asked.key.startswith("llama/model-") and asked.range and asked.range[0] % 7 == 0:
            seen.append(len(shards_here(cache) | {Path(asked.key).name[: len("model-00001-of-00004")]}))

    stocked.spoil = look
    return seen


@pytest.mark.parametrize("quant", ["keep", "nf4"])
def test_a_shard_goes_after_its_last_use(stocked: Store, inputs: Inputs, tmp_path: Path, quant: str) -> None:
    alone = merged(inputs.base, inputs.adapter, tmp_path / "alone", "--quant", quant)
    assert alone.exit_code == 0, alone.output
    planned = json.loads(
        run("plan", "--base", BASE, "--adapter", inputs.adapter, "--low-disk", "--json").output
    )
    seen = watched(stocked, tmp_path / "assets")
    found = merged(BASE, inputs.adapter, tmp_path / "out", "--low-disk", "--quant", quant)
    assert found.exit_code == 0, found.output
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert len(inputs.shards) > 3
    assert 0 < max(seen) <= planned["low_disk"]["shards"] < len(inputs.shards)
    assert shards_here(tmp_path / "assets") == set()


def test_a_shard_is_converted_while_the_next_one_comes(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    """The second one is held back until the first is complete in the output's work folder."""
    out, second = tmp_path / "out", f"llama/{inputs.shards[1]}"
    complete: list[bool] = []

    def hold(asked: Asked) -> None:
        if asked.key == second and [each.key for each in stocked.requests].count(second) == 2:
            for _ in range(400):
                if [path for path in out.rglob(inputs.shards[0]) if path.is_file()]:
                    complete.append(True)
                    return
                time.sleep(0.02)

    stocked.spoil = hold
    found = merged(BASE, inputs.adapter, out)
    assert found.exit_code == 0, found.output
    assert complete == [True]
    assert hashes(out) == inputs.merged


def test_without_low_disk_shards_stay_for_the_next_run(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    assert merged(BASE, inputs.adapter, tmp_path / "out").exit_code == 0
    assert len(shards_here(tmp_path / "assets")) == len(inputs.shards)
    asked = len(stocked.requests)
    assert merged(BASE, inputs.adapter, tmp_path / "again", "--low-disk").exit_code == 0
    assert all(each.key is None or "model-" not in each.key for each in stocked.requests[asked:])
    assert len(shards_here(tmp_path / "assets")) == len(inputs.shards)  # they were here before


def test_parts_of_a_weight_in_other_shards_are_waited_for_and_kept(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    quantized = tmp_path / "nf4"
    made = run("convert", "--base", inputs.base, "--quant", "nf4-dq", "-o", quantized, "--device", "cpu")
    assert made.exit_code == 0, made.output
    scattered = scatter(quantized, tmp_path / "scattered", 5)
    for path in scattered.iterdir():
        stocked.put(f"nf4/{path.name}", path.read_bytes())
    alone = merged(scattered, inputs.adapter, tmp_path / "alone", "--quant", "none")
    assert alone.exit_code == 0, alone.output
    base = f"s3://{BUCKET}/nf4"
    planned = json.loads(
        run("plan", "--base", base, "--adapter", inputs.adapter, "--low-disk", "--json").output
    )
    assert planned["low_disk"]["shards"] == 5
    read_to_plan, shards = bytes_read(stocked), list(scattered.glob("*.safetensors"))
    stocked.requests.clear()
    found = merged(base, inputs.adapter, tmp_path / "out", "--quant", "none", "--low-disk")
    assert found.exit_code == 0, found.output
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert shards_here(tmp_path / "assets") == set()
    # Each shard once, whole: nothing was read by requests because its shard was not there yet, or not any more.
    assert bytes_read(stocked) == read_to_plan + sum(path.stat().st_size for path in shards)


def bytes_read(store: Store) -> int:
    """Bytes of shards that were asked for."""
    asked = [each.range for each in store.requests if each.range and each.key and "model-" in each.key]
    return sum(stop - start for start, stop in asked)


def scatter(model: Path, folder: Path, count: int) -> Path:
    """The model with its tensors dealt out to so many shards, so that parts of a weight lie in several."""
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    weight_map = {
        name: f"model-{at % count + 1:05d}-of-{count:05d}.safetensors" for at, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(own, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(model / name, folder)
    return folder


@pytest.mark.parametrize("low_disk", [(), ("--low-disk",)], ids=["", "low-disk"])
def test_of_the_hub(hub: Hub, inputs: Inputs, tmp_path: Path, low_disk: tuple[str, ...]) -> None:
    hub.add("org/base", inputs.base)
    seen: list[int] = []

    def look(request: Request) -> None:
        if request.range is None and "model-" in request.path and "/resolve/" in request.path:
            here = {path.name for path in (tmp_path / "cache").rglob("model-*.safetensors") if path.exists()}
            seen.append(len(here))

    hub.before = look
    found = merged("org/base", inputs.adapter, tmp_path / "out", *low_disk)
    assert found.exit_code == 0, found.output
    assert hashes(tmp_path / "out") == inputs.merged
    left = {path.name for path in (tmp_path / "cache").rglob("model-*.safetensors")}
    assert left == (set() if low_disk else set(inputs.shards))
    blobs = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file())
    assert blobs < (100_000 if not low_disk else 15_000)


def test_a_base_that_is_read_several_times_is_not_for_low_disk(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    found = merged(BASE, inputs.adapter, tmp_path / "out", "--low-disk", "--quant", "nvfp4a16")
    assert (found.exit_code, "--low-disk reads every shard" in found.output) == (2, True), found.output


# -- faults ------------------------------------------------------------------------------------------------------------


def cut_short(asked: Asked) -> Answer:
    """A whole answer of less than was asked for."""
    assert asked.range is not None
    start = asked.range[0]
    return Answer(206, {"ETag": '"x"', "Content_Range": f"bytes {start}-{start}/99999999"}, b"1")


def other_etag(asked: Asked) -> Answer:
    del asked
    return refusal(412, "PreconditionFailed")


PASSING: dict[str, Callable[[Asked], Answer]] = {
    "429": lambda _: refusal(429, "SlowDown"),
    "500": lambda _: refusal(500, "InternalError"),
    "503": lambda _: refusal(503, "SlowDown"),
    "expired": lambda _: refusal(400, "ExpiredToken"),
    "page": lambda _: Answer(200, {"Content_Type": "text/html"}, b"<html>login</html>"),
    "408": lambda _: refusal(408, "RequestTimeout"),
}


def test_thirty_faults_in_a_row_change_nothing(
    stocked: Store, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third request fails in another way, listings and headers included, and every fifth answer is cut."""
    monkeypatch.setattr(object_fetch, "PIECE_BYTES", 2000)
    kinds = list(PASSING.values())
    struck: list[str] = []

    def spoil(asked: Asked) -> Answer | None:
        if asked.number % 3:
            return None
        struck.append("answer")
        return kinds[len(struck) % len(kinds)](asked)

    def cut(asked: Asked) -> int | None:
        if asked.number % 5 or asked.number % 3 == 0:
            return None
        struck.append("cut")
        return 100

    stocked.spoil, stocked.cut = spoil, cut
    found = merged(BASE, f"s3://{BUCKET}/lora", tmp_path / "out", "--low-disk")
    assert found.exit_code == 0, found.output
    assert len(struck) >= 30
    assert {"answer", "cut"} == set(struck)
    assert hashes(tmp_path / "out") == inputs.merged


LASTING: dict[str, tuple[Callable[[Asked], Answer], int, str]] = {
    "changed": (other_etag, 3, "changed while it was in use"),
    "gone": (lambda _: refusal(404, "NoSuchKey"), 3, "changed while it was in use"),
    "denied": (lambda _: refusal(403, "AccessDenied"), 6, "the store refuses access"),
    "expired": (lambda _: refusal(400, "ExpiredToken"), 6, "have expired; renew them"),
    "busy": (lambda _: refusal(503, "SlowDown"), 6, "asks for fewer requests"),
    "short": (cut_short, 6, "something else than a store does"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_stays_ends_the_run_and_the_same_command_goes_on(
    stocked: Store, inputs: Inputs, tmp_path: Path, name: str
) -> None:
    """It strikes in the third shard, when two are in work or done."""
    answer, code, words = LASTING[name]

    def spoil(asked: Asked) -> Answer | None:
        is_third = asked.key == f"llama/{inputs.shards[2]}" and asked.number > first
        return answer(asked) if is_third else None

    assert run("plan", "--base", BASE).exit_code == 0
    first = 2 * len(stocked.requests)  # headers are read undisturbed, once more
    stocked.spoil = spoil
    found = merged(BASE, inputs.adapter, tmp_path / "out", "--low-disk")
    assert found.exit_code == code, found.output
    assert words in found.output
    assert "storeCANARY" not in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "out" / "config.json").exists()
    stocked.spoil = lambda _: None
    base = open_storage(BASE)
    # As a kill leaves it between the last byte that is made of a shard and its removal.
    base.fetch([base.file(inputs.shards[0])], lambda _: None, for_now=True)
    again = merged(BASE, inputs.adapter, tmp_path / "out", "--low-disk")
    assert again.exit_code == 0, again.output
    assert hashes(tmp_path / "out") == inputs.merged
    assert shards_here(tmp_path / "assets") == set()


def held(stocked: Store, key: str, until: threading.Event) -> threading.Event:
    """Event that a shard is asked for, not for its header, and not answered before `until`."""
    asked_for = threading.Event()

    def hold(asked: Asked) -> None:
        if asked.key == key and [each.key for each in stocked.requests].count(key) == 2:
            asked_for.set()
            until.wait(20)

    stocked.spoil = hold
    return asked_for


def goes_on(stocked: Store, inputs: Inputs, out: Path) -> None:
    stocked.spoil = lambda _: None
    again = merged(BASE, inputs.adapter, out, "--low-disk")
    assert again.exit_code == 0, again.output
    assert hashes(out) == inputs.merged
    assert shards_here(out.parent / "assets") == set()


def test_a_run_that_is_killed_while_it_waits_goes_on(stocked: Store, inputs: Inputs, tmp_path: Path) -> None:
    answered = threading.Event()
    waiting = held(stocked, f"llama/{inputs.shards[2]}", answered)
    arguments = ["merge", "--base", BASE, "--adapter", str(inputs.adapter), "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "streamconv", *arguments, "--low-disk", "--device", "cpu"]
    process = subprocess.Popen(command, env=environment_of(stocked, tmp_path), stderr=subprocess.DEVNULL)
    assert waiting.wait(60)
    process.kill()
    assert process.wait() == -9
    answered.set()
    goes_on(stocked, inputs, tmp_path / "out")


def test_a_run_that_is_stopped_while_it_waits_ends_and_goes_on(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    answered, stop = threading.Event(), StopRequest()
    waiting = held(stocked, f"llama/{inputs.shards[2]}", answered)
    prepared = prepare(build_job(BASE, inputs.adapter, device="cpu", low_disk=True))

    def ask() -> None:
        assert waiting.wait(20)
        stop.signal_number = signal.SIGTERM

    asker = threading.Thread(target=ask)
    asker.start()
    fetch(prepared, tmp_path / "out", quiet)
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped by a signal") as caught:
        run_job(prepared, tmp_path / "out", quiet, stop)
    assert caught.value.exit_code == 143
    assert time.monotonic() - began < 10
    asker.join()
    answered.set()
    goes_on(stocked, inputs, tmp_path / "out")


def environment_of(store: Store, folder: Path) -> dict[str, str]:
    """A child's, with the cache that this process has."""
    mine = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    return mine | variables(store) | {"HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
