"""Models on the Hub: what an id means, what is asked for, what is said when it is refused."""

from __future__ import annotations

import errno
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from streamconv.errors import CheckpointError, HubError, OptionError, ResourceError
from streamconv.storage import cache, open_storage
from streamconv.storage.hub import HubFolder, open_hub, parse_hub_id
from streamconv.storage.hub_errors import hub_errors
from tests.hub_stub import TOKEN, Answer, Hub, Repo, Request, git_id, sha256
from tests.hubs import hub

__all__ = ["hub"]

FILES = {"config.json": b"{}", "model.safetensors": bytes(200_000), "sub/config.json": b"[]"}


def add(hub: Hub, *, private: bool = False, gated: bool = False) -> str:
    hub.repos["org/model"] = Repo(private, gated)
    return hub.repos["org/model"].commit(FILES)


def refusal(kind: type[Exception], location: str = "org/model", revision: str | None = None) -> str:
    with pytest.raises(kind) as caught:
        open_hub(location, revision, None).read_bytes("config.json", 100)
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


# -- ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "revision", "found"),
    [
        ("org/model", None, ("org/model", "main")),
        ("gpt2", None, ("gpt2", "main")),
        ("org/model@v1.0", None, ("org/model", "v1.0")),
        ("org/model", "feature/x", ("org/model", "feature/x")),
        ("org/model@refs/pr/3", None, ("org/model", "refs/pr/3")),
        ("hf://org/model", None, ("org/model", "main")),
        ("hf://models/org/model@v1", None, ("org/model", "v1")),
        ("hf://org/model@refs/pr/3", None, ("org/model", "refs/pr/3")),
    ],
)
def test_ids(location: str, revision: str | None, found: tuple[str, str]) -> None:
    assert parse_hub_id(location, revision) == found


@pytest.mark.parametrize(
    "location",
    [
        "hf://",
        "hf:///etc/passwd",
        "hf://gpt2",
        "hf://datasets/org/data",
        "hf://org/model/checkpoint-12",
        "hf://org/model@",
        "org/model@",
        "org/mod el",
        "org/model@v1@v2/../x",
        "org/model@../../x",
        "-org/model",
        "a" * 200,
    ],
)
def test_a_malformed_id_is_refused_and_not_asked_for(hub: Hub, location: str) -> None:
    with pytest.raises(OptionError, match=r"id of a model|not a revision") as caught:
        open_hub(location, None, None)
    assert location in str(caught.value)
    assert not hub.requests


@pytest.mark.parametrize("location", ["org/model@v1", "hf://org/model@v1"])
def test_a_second_revision_is_refused(hub: Hub, location: str) -> None:
    with pytest.raises(OptionError, match="has a revision already, and v2 was given beside it"):
        open_storage(location, "v2")
    assert not hub.requests


# -- reading -----------------------------------------------------------------------------------------------------


def test_names_and_versions_are_those_of_the_cache(hub: Hub) -> None:
    commit = add(hub)
    found = open_hub("org/model", None, None)
    assert found.names() == ("config.json", "model.safetensors")
    assert found.origin.commit == commit
    files = [found.file(name) for name in found.names()]
    assert [file.version for file in files] == [
        f"blob:{git_id(FILES['config.json'])}",
        f"blob:{sha256(FILES['model.safetensors'])}",
    ]
    found.fetch(files, lambda _: None)
    cached = open_storage(str(found.folder))
    assert cached.origin == found.origin
    assert [cached.file(name).version for name in cached.names()] == [file.version for file in files]


def test_a_header_is_read_by_range(hub: Hub, tmp_path: Path) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    file = found.file("model.safetensors")
    assert found.read_start(file, 1000) == bytes(1000)
    assert found.read_start(file, 10**9) == bytes(200_000)
    assert [request.range for request in hub.asked("*/resolve/*")] == ["bytes=0-999", "bytes=0-199999"]
    assert not (tmp_path / "cache").exists()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert found.missing([file, open_storage(str(tmp_path)).file("model.safetensors")]) == (file,)


def test_of_a_server_without_ranges_no_more_is_read_than_asked(hub: Hub) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    hub.ranges = False
    assert found.read_start(found.file("model.safetensors"), 1000) == bytes(1000)


def test_a_part_of_a_file_from_a_server_without_ranges(hub: Hub) -> None:
    hub.repos["org/model"] = Repo()
    content = bytes(range(256)) * 100
    hub.repos["org/model"].commit({"model.safetensors": content})
    found = open_hub("org/model", None, None)
    for ranges in (True, False):
        hub.ranges = ranges
        part = bytearray(5000)
        found.open(found.file("model.safetensors")).read_into(777, memoryview(part))
        assert part == content[777:5777]


def test_what_another_revision_has_here_is_not_removed_with_this_one(hub: Hub) -> None:
    first = add(hub)
    hub.repos["org/model"].commit(FILES | {"new.txt": b"1"})
    before, now = open_hub("org/model", first, None), open_hub("org/model", None, None)
    name = "model.safetensors"
    before.fetch([before.file(name)], lambda _: None)
    now.fetch([now.file(name)], lambda _: None, for_now=True)
    now.done(now.file(name))
    assert Path(before.file(name).path).read_bytes() == FILES[name]


def test_progress_counts_every_byte_once(hub: Hub) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    counted: list[int] = []
    found.fetch([found.file("model.safetensors")], counted.append)
    assert sum(counted) == 200_000
    found.fetch([found.file("model.safetensors")], counted.append)
    assert sum(counted) == 200_000


def test_what_is_not_there_is_missing(hub: Hub) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    with pytest.raises(CheckpointError, match=r"org/model: tokenizer\.json is missing"):
        found.file("tokenizer.json")
    with pytest.raises(CheckpointError, match="not a file name inside"):
        found.file("../config.json")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 200000 bytes, more than the 100"):
        found.read_bytes("model.safetensors", 100)


def test_names_that_lead_outside_are_not_listed(hub: Hub) -> None:
    hub.repos["org/model"] = Repo()
    hub.repos["org/model"].commit({"../x.json": b"", "/etc/x": b"", "a": b"1"})
    assert open_hub("org/model", None, None).names() == ("a",)


def test_a_subfolder(hub: Hub) -> None:
    add(hub)
    assert open_hub("org/model", None, None).names("sub") == ("sub/config.json",)
    assert open_hub("org/model", None, None).names("su") == ()
    found = open_hub("org/model", None, "sub")
    assert found.names() == ("config.json",)
    assert found.read_bytes("config.json", 10) == b"[]"
    with pytest.raises(HubError, match="org/model has no folder checkpoint-12 at commit"):
        open_hub("org/model", None, "checkpoint-12")


def test_a_full_disk_is_said_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match="needs 200 kB and the disk of the Hub cache"):
        found.fetch([found.file("model.safetensors")], lambda _: None)
    assert not hub.asked("*/resolve/*")


def test_a_file_that_is_not_what_was_listed(hub: Hub) -> None:
    commit = add(hub)
    found = open_hub("org/model", None, None)
    hub.repos["org/model"].commits[commit] = FILES | {"config.json": b"{  }"}
    with pytest.raises(
        HubError, match=r"config\.json came to .* with 4 bytes, expected .* with 2; it was removed"
    ):
        found.read_bytes("config.json", 10)


# -- what came is what the Hub lists -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_content_of_the_same_size_is_not_kept(hub: Hub, name: str) -> None:
    """A large file by its SHA-256, a small one by git's id; the next call downloads it again."""
    add(hub)
    found = open_hub("org/model", None, None)
    file = found.file(name)
    hub.tamper = flipped
    with pytest.raises(
        HubError, match=rf"{name} came to .* with another content than the Hub lists: [0-9a-f]+,"
    ) as caught:
        found.fetch([file], lambda _: None)
    assert "it was removed from the Hub cache: the same command then downloads it again" in str(caught.value)
    cache = found.folder.parents[1]
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size == file.size]
    assert found.missing([file]) == (file,)
    hub.tamper = None
    open_hub("org/model", None, None).fetch([file], lambda _: None)
    assert Path(file.path).read_bytes() == FILES[name]


def test_all_files_before_the_last_are_checked_too(hub: Hub) -> None:
    """The check of one runs beside the download of the next."""
    for bad in range(3):
        files = {f"{number}.safetensors": bytes([bad, number]) * 25_000 for number in range(3)}
        hub.repos["org/model"] = Repo()
        hub.repos["org/model"].commit(files)
        found = open_hub("org/model", None, None)
        hub.tamper = lambda name, content, bad=f"{bad}.safetensors": (
            flipped(name, content) if name == bad else content
        )
        with pytest.raises(HubError, match=rf"{bad}\.safetensors came to"):
            found.fetch([found.file(name) for name in files], lambda _: None)
        assert not Path(found.file(f"{bad}.safetensors").path).exists()


def test_a_download_that_was_never_checked_is_checked_by_the_next_run(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last byte and before the check."""
    add(hub)
    found = open_hub("org/model", None, None)
    file = found.file("model.safetensors")
    hub.tamper = flipped
    with monkeypatch.context() as patch:
        patch.setattr(cache, "content_id", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            found.fetch([file], lambda _: None)
    assert Path(file.path).exists()
    hub.tamper = None
    again = open_hub("org/model", None, None)
    with pytest.raises(HubError, match="with another content than the Hub lists"):
        again.fetch([file], lambda _: None)
    again.fetch([file], lambda _: None)
    assert Path(file.path).read_bytes() == FILES[file.name]
    assert again.missing([file]) == ()


def test_what_cannot_be_removed_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    hub.tamper = flipped

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    blob = found.folder.parents[1] / "blobs" / sha256(FILES["model.safetensors"])
    monkeypatch.setattr(cache, "Path", type("Kept", (type(blob),), {"unlink": refuse}))
    with pytest.raises(HubError, match="came to") as caught:
        found.fetch([found.file("model.safetensors")], lambda _: None)
    assert f"; remove {blob}: the same command" in str(caught.value)


def test_links_that_lead_out_of_the_cache_are_not_followed(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    (root / "blobs").mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (root / "blobs" / "b").symlink_to(mine)
    (root / "pointer").symlink_to("blobs/b")
    assert cache.remove_cached(root / "pointer") is None
    assert (mine.read_text(), [*root.rglob("*")]) == ("precious", [root / "blobs"])


@pytest.mark.parametrize("size", [0, 100, 200_001, None])
@pytest.mark.parametrize("is_offline", [False, True])
def test_a_cached_file_of_another_size_is_named_with_its_path(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, size: int | None, is_offline: bool
) -> None:
    """It was cut when it was downloaded, or written to since; nothing but removing it helps."""
    from huggingface_hub import snapshot_download

    add(hub)
    snapshot_download("org/model")
    found = open_hub("org/model", None, None)
    file = found.file("model.safetensors")
    blob = Path(file.path).resolve()
    blob.unlink()
    blob.mkdir() if size is None else blob.write_bytes(bytes(size))
    if is_offline:
        if size is None:
            pytest.skip("a folder is no file of the listing that the cache has")
        offline(monkeypatch)
        found = open_hub("org/model", None, None)
    has = "something that is no file" if size is None else f"{size} bytes"
    told = (
        rf"model\.safetensors in the Hub cache is not whole: it has {has}, and the Hub lists 200000 bytes;"
        rf" remove {blob} "
    )
    for use in (start, whole_model, lambda each: each.missing([file])):
        with pytest.raises(CheckpointError, match=told):
            use(found)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    blob.rmdir() if size is None else blob.unlink()
    assert whole_model(open_hub("org/model", None, None)) == FILES["model.safetensors"]


def flipped(path: str, content: bytes) -> bytes:
    del path
    return content[:-1] + bytes([content[-1] ^ 1])


def whole_model(found: HubFolder) -> bytes:
    return found.read_bytes("model.safetensors", 10**6)


# -- ranged requests -----------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("status", "headers", "content", "told"),
    [
        (206, {"Content_Range": "bytes 0-8/200000"}, bytes(8), "8 of the first 9 bytes"),
        (206, {"Content_Range": "bytes 0-8/200000"}, b"", "0 of the first 9 bytes"),
        (
            206,
            {"Content_Range": "bytes 100-108/200000"},
            bytes(9),
            "range 'bytes 100-108/200000', which was not asked",
        ),
        (
            206,
            {"Content_Range": "bytes 0-8/200001"},
            bytes(9),
            "200001 bytes in all, where 200000 are listed",
        ),
        (206, {"Content_Range": "bytes"}, bytes(9), "the range 'bytes'"),
        (206, {}, bytes(9), "the range ''"),
        (200, {}, bytes(9), "9 bytes in all, where 200000 are listed"),
        (200, {"Content_Type": "text/html; charset=utf-8"}, b"<html>...", "a web page"),
        (206, {"Content_Range": "bytes 0-8/200000", "X_Repo_Commit": COMMIT}, bytes(9), f"commit '{COMMIT}'"),
        (
            206,
            {"Content_Range": "bytes 0-8/200000", "ETag": f'"{"a" * 64}"'},
            bytes(9),
            f"the content {'a' * 64}, where",
        ),
        (
            206,
            {"Content_Range": "bytes 0-8/200000", "X_Linked_Etag": f'W/"{"b" * 64}"'},
            bytes(9),
            f"the content {'b' * 64}",
        ),
        (204, {}, b"", "0 bytes in all"),
        (304, {}, b"", "0 of the first 9 bytes"),
    ],
)
def test_an_answer_that_is_not_the_start_is_refused(
    hub: Hub, status: int, headers: dict[str, str], content: bytes, told: str
) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    hub.instead = lambda request: Answer(status, headers, content) if request.range else None
    with pytest.raises(HubError) as caught:
        start(found)
    assert told in str(caught.value)
    assert "run the same command again" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (206, {"Content_Range": "bytes 0-8/*"}),
        (206, {"Content_Range": "bytes 0-8/200000", "ETag": '"5d41402abc4b2a76b9719d911017c592"'}),
    ],
)
def test_stores_behind_the_hub_may_have_headers_of_their_own(
    hub: Hub, status: int, headers: dict[str, str]
) -> None:
    add(hub)
    found = open_hub("org/model", None, None)
    hub.instead = lambda request: Answer(status, headers, bytes(9)) if request.range else None
    assert start(found) == bytes(9)


def test_a_header_that_was_read_otherwise_than_it_came(hub: Hub) -> None:
    """What is planned by it would be another model's."""
    add(hub)
    found = open_hub("org/model", None, None)
    file = found.file("model.safetensors")
    hub.instead = lambda request: (
        Answer(206, {"Content_Range": "bytes 0-8/200000"}, b"12345678\n") if request.range else None
    )
    start(found)
    with pytest.raises(
        HubError, match=r"the first 9 bytes of model\.safetensors were other ones when its header was read"
    ):
        found.fetch([file], lambda _: None)
    found.fetch([file], lambda _: None)
    start(found)


# -- listings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": -1}, "lists config.json with -1 bytes"),
        ({"size": "2"}, "lists config.json with '2' bytes"),
        ({"size": True}, "lists config.json with True bytes"),
        ({"size": 2.0}, "lists config.json with 2.0 bytes"),
        ({"size": None}, "lists config.json with None bytes"),
        ({"blobId": None}, "lists config.json with the content None"),
        ({"blobId": 3}, "lists config.json with the content 3"),
        ({"blobId": "../../../x"}, "lists config.json with the content '../../../x'"),
        ({"blobId": "A" * 40}, "lists config.json with the content 'AAAA"),
        (
            {"lfs": {"sha256": "a" * 40 + "/", "size": 2, "pointerSize": 1}},
            "lists config.json with the content 'aaaa",
        ),
        ({"lfs": 3}, "gave something else than the Hub does"),
        ({"lfs": {}, "blobId": []}, "lists config.json with the content []"),
        ({"rfilename": None}, "lists a file named None"),
        ({"rfilename": ["a"]}, "lists a file named ['a']"),
    ],
)
def test_a_file_that_is_listed_oddly(hub: Hub, change: dict[str, Any], told: str) -> None:
    add(hub)
    hub.relist = lambda found: found | {"siblings": [*found["siblings"][1:], found["siblings"][0] | change]}
    assert told in refusal(HubError)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha": None}, "lists the commit None, expected 40"),
        ({"sha": "../../../../tmp"}, "lists the commit '../../../../tmp'"),
        ({"sha": ["a" * 40]}, "lists the commit ['aaa"),
        ({"siblings": "config.json"}, "gave something else than the Hub does"),
        ({"siblings": [1, 2]}, "gave something else than the Hub does"),
        ({"siblings": {"a": 1}}, "gave something else than the Hub does"),
        ({"siblings": None}, "config.json is missing"),
    ],
)
def test_a_repository_that_is_listed_oddly(hub: Hub, change: dict[str, Any], told: str) -> None:
    add(hub)
    hub.relist = lambda found: found | change
    assert told in refusal(CheckpointError if "missing" in told else HubError)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><h1>Welcome to the hotel</h1>",
        b"[]",
        b"3",
        b'"x"',
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
    ],
)
def test_a_login_page_of_a_network(hub: Hub, content: bytes) -> None:
    add(hub)
    hub.instead = lambda _: Answer(200, {"Content_Type": "text/html"}, content)
    message = refusal(HubError)
    assert "gave something else than the Hub does" in message
    assert "is a login page of this network, a proxy or a wrong HF_ENDPOINT in the way?" in message
    hub.instead = lambda request: (
        Answer(200, {"Content_Type": "text/html"}, content) if "/resolve/" in request.path else None
    )
    assert "org/model" in refusal(HubError)
    hub.instead = None
    assert open_hub("org/model", None, None).read_bytes("config.json", 9) == b"{}"


# -- offline -------------------------------------------------------------------------------------------------------


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", [None, "v1", "commit"])
@pytest.mark.parametrize("subfolder", [None, "sub"])
def test_what_was_fetched_is_there_when_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, revision: str | None, subfolder: str | None
) -> None:
    commit = add(hub)
    hub.repos["org/model"].refs["v1"] = commit
    revision = commit if revision == "commit" else revision
    online = open_hub("org/model", revision, subfolder)
    online.fetch([online.file(name) for name in online.names()], lambda _: None)
    hub.requests.clear()
    offline(monkeypatch)
    cached = open_hub("org/model", revision, subfolder)
    assert cached.origin == online.origin
    assert [cached.file(name) for name in cached.names()] == [online.file(name) for name in online.names()]
    assert cached.read_bytes("config.json", 10) == online.read_bytes("config.json", 10)
    assert not hub.requests


def test_offline_and_not_cached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = add(hub)
    offline(monkeypatch)
    for revision in (None, commit):
        message = refusal(HubError, revision=revision)
        assert message.startswith(f"org/model at {revision or 'main'} is not in the Hub cache")
        assert "HF_HUB_OFFLINE is set; unset it, or download the model first with `hf download`" in message
    assert not hub.requests


def test_offline_and_half_cached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub notes all names of a commit that it downloads: one that is not there yet is known to miss."""
    from huggingface_hub import snapshot_download

    add(hub)
    snapshot_download("org/model", allow_patterns=["config.json"])
    offline(monkeypatch)
    found = open_hub("org/model", None, None)
    assert found.names() == ("config.json", "model.safetensors")
    with pytest.raises(HubError, match="org/model is needed, is not complete in the Hub cache"):
        found.fetch([found.file("model.safetensors")], lambda _: None)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits longer and longer between its attempts."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_no_such_model(hub: Hub) -> None:
    message = refusal(HubError)
    assert message == (
        "org/model: no such model on the Hub (nor a folder of this name here), or a private one; check the name, or"
        " log in with `hf auth login` to an account that may see it"
    )


def test_a_private_model_without_a_login(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert "or a private one" in refusal(HubError)


def test_a_wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(HubError)
    assert "does not accept the token in use; log in again with `hf auth login`" in message
    assert "hf_wrong" not in message


def test_a_gated_model(hub: Hub) -> None:
    add(hub, gated=True)
    assert refusal(HubError) == (
        f"org/model is gated: accept its conditions at {hub.url}/org/model and log in to that account with `hf auth"
        " login` (or set HF_TOKEN), then run again"
    )


@pytest.mark.parametrize("token", ["hf_one\ntwo", "hf_one two\x00", "hf_ümlaut", "hf_" + "x" * 70_000])
@pytest.mark.usefixtures("no_wait")
def test_a_malformed_token(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str) -> None:
    add(hub, private=True)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    message = refusal(HubError)
    assert token[3:8] not in message
    assert "token" in message


@pytest.mark.usefixtures("no_wait")
def test_a_login_in_the_address_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:s3cret%2Fpass@127.0.0.1:9")
    message = refusal(HubError)
    assert "the Hub (http://(token)@127.0.0.1:9) cannot be reached" in message
    assert "s3cret" not in message


def test_no_such_revision(hub: Hub) -> None:
    add(hub)
    message = refusal(HubError, "org/model@v9")
    assert (
        message == f"org/model has no revision v9; see {hub.url}/org/model/commits/main for those there are"
    )


@pytest.mark.parametrize("path", ["*", "*/resolve/*"])
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (403, "the token in use may not do this"),
        (429, "asks for fewer requests (status 429); wait some minutes"),
        (500, "the Hub has a problem (status 500); run the same command again later: it continues"),
        (503, "the Hub has a problem (status 503)"),
        (418, "the Hub refused with status 418"),
    ],
)
@pytest.mark.usefixtures("no_wait")
def test_other_refusals(hub: Hub, status: int, text: str, path: str) -> None:
    add(hub)
    found = open_hub("org/model", None, None) if path != "*" else None
    hub.refuse = lambda _: status
    if found is None:
        assert text in refusal(HubError)
        return
    for read in (whole, start):
        with pytest.raises(HubError) as caught:
            read(found)
        assert text in str(caught.value)
        assert TOKEN not in str(caught.value)


def whole(found: HubFolder) -> bytes:
    return found.read_bytes("config.json", 9)


def start(found: HubFolder) -> bytes:
    return found.read_start(found.file("model.safetensors"), 9)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            ssl.SSLCertVerificationError(
                "[SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired (_ssl.c:1006)"
            ),
            HubError,
            "CERTIFICATE_VERIFY_FAILED] certificate has expired",
        ),
        (
            ConnectionResetError(104, "Connection reset by peer"),
            HubError,
            "cannot be reached; check the connection",
        ),
        (
            PermissionError(13, "Permission denied", "/cache/x"),
            HubError,
            "cannot be used: Permission denied (/cache/x);",
        ),
        (
            OSError(30, "Read-only file system", "/cache/x"),
            HubError,
            "Read-only file system (/cache/x); make it",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/x"), ResourceError, "is full; free some"),
        (
            OSError("Consistency check failed: 3 bytes"),
            HubError,
            "3 bytes; check the connection and run",
        ),
        (MemoryError(), ResourceError, "no memory, thread or open file is left"),
        (RuntimeError("can't start new thread"), ResourceError, "no memory, thread or open file is left"),
        (
            ValueError("LFS batch API returned errors:\nno space left for you"),
            HubError,
            "errors: no space left for you",
        ),
        (KeyError("sha"), HubError, "gave something else than the Hub does ('sha')"),
    ],
)
def test_errors_of_transport_cache_and_machine(error: Exception, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind) as caught, hub_errors("org/model"):
        raise error
    assert caught.type is kind
    assert str(caught.value).startswith("org/model: ")
    assert told in str(caught.value)


def test_no_answer_in_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.delay_s = 0.5
    assert f"the Hub ({hub.url}) did not answer in time; check the connection" in refusal(HubError)


@pytest.mark.usefixtures("no_wait")
def test_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub (http://127.0.0.1:9) cannot be reached; check the connection" in refusal(HubError)


@pytest.mark.usefixtures("no_wait")
def test_a_download_that_breaks_off_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks for the rest; should it give up, the next call does."""
    add(hub)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    found = open_hub("org/model", None, None)
    broken: list[Request] = []

    def break_off(request: Request) -> None:
        if request.method == "GET" and not broken:
            broken.append(request)
            hub.cut_at = 70_000

    hub.before = break_off
    counted: list[int] = []
    found.fetch([found.file("model.safetensors")], counted.append)
    assert Path(found.file("model.safetensors").path).read_bytes() == FILES["model.safetensors"]
    assert [request.range for request in hub.asked("*/resolve/*", "GET")] == [None, "bytes=70000-"]
    assert sum(counted) == 200_000
