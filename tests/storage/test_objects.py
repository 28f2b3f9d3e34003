"""Models in object stores: locations, what is asked for, what is said when it is refused, downloads that go on."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.errors import CheckpointError, InputError, OptionError, ResourceError, Stopped, StoreError
from streamconv.storage import object_client, object_fetch, objects, open_storage
from streamconv.storage.object_client import Bucket
from tests.hub_stub import Answer
from tests.object_stub import BUCKET, MODIFIED, SECRET, Asked, Content, Store, refusal, store

__all__ = ["store"]

PLACE = f"s3://{BUCKET}/model"
SHARD = bytes(range(256)) * 400


@pytest.fixture
def stocked(store: Store) -> Store:
    store.put("model/config.json", b"{}")
    store.put("model/model.safetensors", SHARD)
    return store


# -- locations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "s3://",
        "s3:///x",
        "s3://b/../x",
        "s3://b//x",
        "gs://b/x//y",
        "az://b/a\\b",
        "s3://me:pw@b/x",
        "s3://b?x=1",
    ],
)
def test_what_is_no_place_is_refused_and_not_asked_for(store: Store, location: str) -> None:
    with pytest.raises(OptionError, match="is no place in an object store"):
        open_storage(location)
    assert not store.requests


def test_a_place_has_no_revisions(stocked: Store) -> None:
    with pytest.raises(OptionError, match="has no revision v1"):
        open_storage(PLACE, "v1")
    with pytest.raises(OptionError, match="must name a folder inside"):
        open_storage(PLACE, None, "../x")


def test_an_empty_prefix_is_an_input_that_is_not_there(stocked: Store) -> None:
    for place in (f"{PLACE}-2", f"s3://{BUCKET}/mod", f"{PLACE}/config.json/x"):
        with pytest.raises(InputError, match="nothing is there"):
            open_storage(place)


def test_a_prefix_with_too_many_objects_is_refused(stocked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stocked.page = 1
    assert open_storage(PLACE).names() == ("config.json", "model.safetensors")  # in two pages
    monkeypatch.setattr(object_client, "MOST_OBJECTS", 1)
    with pytest.raises(StoreError, match="more than 1 objects; give the prefix of the model alone"):
        open_storage(PLACE)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'streamconv\[remote\]', or give a folder"):
        open_storage(PLACE)
    assert importlib.util.find_spec("obstore") is not None


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[Answer, str]] = {
    "missing bucket": (refusal(404, "NoSuchBucket"), "there is no such bucket"),
    "denied": (refusal(403, "AccessDenied"), "the store refuses access"),
    "key": (
        refusal(403, "InvalidAccessKeyId"),
        "does not accept the credentials in use; set AWS_ACCESS_KEY_ID",
    ),
    "signature": (refusal(403, "SignatureDoesNotMatch"), "does not accept the credentials in use"),
    "expired": (refusal(400, "ExpiredToken"), "the credentials in use have expired; renew them"),
    "clock": (refusal(403, "RequestTimeTooSkewed"), "the clock of this machine is wrong"),
    "region": (refusal(301, "PermanentRedirect"), "the bucket is in another region; set AWS_REGION"),
    "busy": (refusal(503, "SlowDown"), "asks for fewer requests"),
    "429": (refusal(429, "TooManyRequests"), "asks for fewer requests"),
    "500": (refusal(500, "InternalError"), r"the store has a problem \(status 500\)"),
    "page": (Answer(200, {}, b"<!DOCTYPE html><html>"), "something else than a store does"),
    "nothing": (Answer(200, {}, b""), "something else than a store does"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence_with_what_to_do(stocked: Store, name: str) -> None:
    answer, words = REFUSALS[name]
    stocked.spoil = lambda _: answer
    with pytest.raises(StoreError, match=words) as caught:
        open_storage(PLACE)
    assert caught.value.exit_code == 6
    assert str(caught.value).startswith(f"{PLACE}: ")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_store_that_cannot_be_reached(stocked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"the store cannot be reached .*check the connection"):
        open_storage(PLACE)


def test_credentials_that_were_renewed_meanwhile_are_taken(
    stocked: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program does that writes new ones into the AWS CLI's file from time to time."""
    file = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    file.write_text(text.format("OLD"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    found = open_storage(PLACE)

    def refuse_old(asked: Asked) -> Answer | None:
        is_old = (
            "OLD/" in asked.headers["authorization" if "authorization" in asked.headers else "Authorization"]
        )
        file.write_text(text.format("NEW"))
        return refusal(400, "ExpiredToken") if is_old else None

    stocked.spoil = refuse_old
    assert found.read_start(found.file("model.safetensors"), 100) == SHARD[:100]


def test_public_buckets_are_read_without_credentials(stocked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert open_storage(PLACE).read_bytes("config.json", 10) == b"{}"
    assert not [
        asked for asked in stocked.requests if "authorization" in {name.lower() for name in asked.headers}
    ]


# -- contents --------------------------------------------------------------------------------------------------------


def test_what_changed_since_it_was_listed_is_refused(stocked: Store) -> None:
    found = open_storage(PLACE)
    file = found.file("model.safetensors")
    found.read_start(file, 10)
    headers = {name.lower(): text for name, text in stocked.requests[-1].headers.items()}
    assert headers["if-match"] == stocked.objects["model/model.safetensors"].etag
    stocked.put("model/model.safetensors", SHARD[::-1])
    for read in (lambda: found.read_start(file, 10), lambda: found.fetch([file], lambda _: None)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was in use"):
            read()
    again = open_storage(PLACE)
    assert again.file(file.name).path != file.path
    assert again.read_start(again.file(file.name), 10) == SHARD[::-1][:10]


def test_a_store_that_ignores_the_condition_is_seen_through(stocked: Store) -> None:
    found = open_storage(PLACE)
    file = found.file("model.safetensors")
    span = {
        "ETag": '"other"',
        "Content_Range": f"bytes 0-9/{len(SHARD)}",
        "Last_Modified": MODIFIED,
    }
    stocked.spoil = lambda _: Answer(206, span, bytes(10))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        found.read_start(file, 10)


def test_a_download_that_was_cut_off_goes_on_where_it_was(
    stocked: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_fetch, "PIECE_BYTES", 1000)
    monkeypatch.setattr(object_fetch, "REQUESTS", 2)
    found = open_storage(PLACE)
    file = found.file("model.safetensors")
    counted: list[int] = []

    def stop(nbytes: int) -> None:
        counted.append(nbytes)
        if sum(counted) >= 50_000:
            raise Stopped("enough", 15)

    with pytest.raises(Stopped):
        found.fetch([file], stop)
    assert found.missing([file]) == (file,)
    before = len(stocked.requests)
    counted.clear()
    found.fetch([file], counted.append)
    assert sum(counted) == len(SHARD)
    assert min(asked.range[0] for asked in stocked.requests[before:] if asked.range) == 50_000
    assert Path(file.path).read_bytes() == SHARD
    assert [path.name for path in Path(file.path).parent.iterdir()] == ["model.safetensors"]


def test_content_that_is_altered_on_the_way_is_fetched_again(
    stocked: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, by another MD5 than the ETag; and where it is another each time, refused."""
    found = open_storage(PLACE)
    file = found.file("model.safetensors")
    etag = stocked.objects["model/model.safetensors"].etag
    flips = iter((1, 0, 1, 2))

    def flip(asked: Asked) -> Answer | None:
        assert asked.range is not None
        start, stop = asked.range
        headers = {
            "ETag": etag,
            "Last_Modified": MODIFIED,
            "Content_Range": f"bytes {start}-{stop - 1}/{len(SHARD)}",
        }
        return Answer(206, headers, bytes([SHARD[0] ^ next(flips)]) + SHARD[1:])

    stocked.spoil = flip
    counted: list[int] = []
    found.fetch([file], counted.append)
    assert Path(file.path).read_bytes() == SHARD
    assert sum(counted) == len(SHARD)
    Path(file.path).unlink()
    with pytest.raises(StoreError, match=r"model\.safetensors came with another content each time"):
        found.fetch([file], lambda _: None)
    assert found.missing([file])


def test_an_etag_that_is_no_md5_is_taken_for_none(stocked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an object that its bucket encrypts by a key of its own."""
    monkeypatch.setattr(Content, "etag", f'"{"0123456789abcdef" * 2}"')
    found = open_storage(PLACE)
    file = found.file("model.safetensors")
    found.fetch([file], lambda _: None)
    assert Path(file.path).read_bytes() == SHARD
    assert stocked.read("model/model.safetensors") == 2 * len(SHARD)


def test_a_partial_file_that_is_too_long_is_begun_anew(stocked: Store) -> None:
    found = open_storage(PLACE)
    file = found.file("model.safetensors")
    Path(file.path).parent.mkdir(parents=True)
    Path(f"{file.path}.partial").write_bytes(bytes(len(SHARD) + 1))
    Path(file.path).write_bytes(b"short")
    assert found.missing([file]) == (file,)
    found.fetch([file], lambda _: None)
    assert Path(file.path).read_bytes() == SHARD


def test_two_that_fetch_the_same_file_wait_for_each_other(
    stocked: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_fetch, "PIECE_BYTES", 1000)
    counted: list[list[int]] = [[], [], []]

    def fetch(number: int) -> None:
        found = open_storage(PLACE)
        found.fetch([found.file("model.safetensors")], counted[number].append)

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(each) for each in counted] == [len(SHARD)] * 3
    assert stocked.read("model/model.safetensors") == len(SHARD)


def test_a_disk_that_is_too_small_is_said_before(stocked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_storage(PLACE)
    monkeypatch.setattr(objects, "SPARE_DISK_BYTES", 2**60)
    with pytest.raises(
        ResourceError, match=r"the disk of the cache .* set HF_HOME to a folder on another disk"
    ):
        found.fetch([found.file("model.safetensors")], lambda _: None)
    found.fetch([], lambda _: None)


def test_buckets_of_one_name_at_two_places_are_two(stocked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    identity: Callable[[], str] = lambda: Bucket("s3", BUCKET, PLACE).identity  # noqa: E731
    here = identity()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://me:pw@s3.example.org")
    assert identity() != here
    assert "pw" not in identity()
