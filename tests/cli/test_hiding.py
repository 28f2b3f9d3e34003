"""Tracebacks, logs and warnings of a command: whoever makes them, no credential is in them."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv.cli.hiding import hidden, hide_credentials
from tests.hub_stub import TOKEN


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back afterwards: they are the process's."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hide_credentials()
    yield
    logging.setLogRecordFactory(factory)


def fail() -> None:
    try:
        raise ValueError(f"the server said {TOKEN!r}")
    except ValueError as error:
        raise RuntimeError(f"Bearer {TOKEN}") from error


def test_a_traceback_has_its_causes_and_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        fail()
    sys.excepthook(caught.type, caught.value, caught.tb)
    told = capsys.readouterr().err
    assert "ValueError: the server said '(token)'" in told
    assert "RuntimeError: Bearer (token)" in told
    assert TOKEN not in told


def test_a_traceback_of_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    told = capsys.readouterr().err
    assert "RuntimeError: Bearer (token)" in told
    assert TOKEN not in told


def test_without_stderr_a_traceback_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    sys.excepthook(ValueError, ValueError("x"), None)


def test_logs_of_every_library(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    try:
        log.error("header %r of %s", f"Bearer {TOKEN}", "https://me:secret@host/x")
        log.error(TOKEN)
        log.error("%d", TOKEN)
        try:
            fail()
        except RuntimeError:
            log.exception("failed")
    finally:
        log.removeHandler(handler)
    told = capsys.readouterr().err
    assert "header 'Bearer (token)' of https://(token)@host/x" in told
    assert "RuntimeError: Bearer (token)" in told
    assert TOKEN not in told
    assert "secret" not in told


def test_warnings() -> None:
    assert "- (token) is bad" in warnings.formatwarning(f"- {TOKEN} is bad", UserWarning, "x.py", 1)


def test_the_environment_and_the_files_it_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for name in ("HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME", "HF_ENDPOINT", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    text = "one-token two-token three-token four%40pass four@pass five-pass"
    assert hidden(text) == text
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("one-token")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hidden(text) == text.replace("one-token", "(token)")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", " two-token\n")
    (tmp_path / "file").write_text("three-token\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "file"))
    monkeypatch.setenv("HF_ENDPOINT", "https://me:four%40pass@hub")
    monkeypatch.setenv("https_proxy", "five-pass@proxy:80")
    assert hidden(text) == "one-token (token) (token) (token) (token) (token)"
