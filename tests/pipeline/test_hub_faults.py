"""A Hub that misbehaves: success, or one sentence and exit 6; and the same command goes on when it behaves again.

`tools/hub_faults` tries every fault at every request; these are some of each kind, at the requests that matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from tests.hub_faults import FAULTS, Case, World, struck, world


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.mark.parametrize(
    ("fault", "path", "forever", "code"),
    [
        ("429 Retry-After", "/api/models/org/base/*", False, 6),
        ("429 Retry-After odd", "*/model-00002-*", True, 6),
        ("503", "/blobs/*", False, 0),
        ("page", "*/resolve/*", True, 6),
        ("dropped", "*/commit/*", False, 6),
        ("cut", "*/model-00001-*", True, 6),
        ("too short", "/api/models/org/adapter/*", True, 6),
        ("another ETag", "*/model-00002-*", True, 6),
        ("empty", "/blobs/*", False, 6),
        ("[]", "*/objects/batch", True, 6),
    ],
)
def test_a_fault_ends_in_success_or_a_sentence_and_the_same_command_goes_on(
    given: World, fault: str, path: str, forever: bool, code: int
) -> None:
    at = 1 + next(number for number, each in enumerate(given.requests) if fnmatch(each.path, path))
    found = given.try_case(Case(fault, at, forever))
    assert not found.wrong, found
    assert found.code == code, found


@pytest.mark.parametrize("fault", ["418", "401", "too short", "redirect elsewhere"])
def test_no_traceback_and_no_log_shows_a_login(given: World, fault: str) -> None:
    """The stub repeats the login, in texts and headers; every library logs at its lowest level."""
    given.reset()
    at = 1 + next(number for number, each in enumerate(given.requests) if fnmatch(each.path, "*/preupload/*"))
    with struck(given.hub, Case(fault, at, forever=True)) as where:
        outcome = given.command("--debug")
    assert where
    assert "streamconv.errors.HubError: me/merged: " in outcome.text
    assert "Traceback (most recent call last)" in outcome.text
    assert "receive_response_headers.complete" in outcome.text
    assert not [*given.shown(outcome)]
    assert (given.folder / "out" / "streamconv.json").exists()
    if fault in ("418", "401"):
        assert "Bearer (token)" in outcome.text


@pytest.mark.sweep
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_at_every_request(given: World, fault: str) -> None:
    for at in range(1, len(given.requests) + 1):
        for forever in (False, True):
            found = given.try_case(Case(fault, at, forever))
            assert not found.wrong, found
