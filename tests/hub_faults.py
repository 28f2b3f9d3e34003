"""A Hub that misbehaves at one request: a merge from it and a push to it, then the same command without the fault.

The requests of an undisturbed run are counted; a fault strikes at the request of a number, or at all from there on.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.hostile.commands import Commands, Outcome, fork_server
from tests.hub_stub import TOKEN, Answer, Hub, Request, serve
from tests.hubs import environment
from tests.tiny import llama_config, save_adapter, save_base

TARGET = "me/merged"
GOOD_ENDS = (0, 6)
SLOWEST_S = 60.0
_UNNEEDED = "/api/agent-harnesses"  # huggingface_hub asks once a day, and does without an answer


# In the environment, and of no use on the loopback.
PROXY_PASSWORD = "proxyCANARY%2Fproxy"
SECRETS = (TOKEN, PROXY_PASSWORD, "proxyCANARY/proxy")


def refused(status: int, **headers: str) -> Callable[[Request], Answer]:
    """An error that repeats the login it was sent, as text and in a header."""

    def answer(request: Request) -> Answer:
        content = json.dumps({"error": f"refused {request.authorization}"}).encode()
        own = {"Content_Type": "application/json", "X_Error_Message": f"{request.authorization}"}
        return Answer(status, own | headers, content)

    return answer


def constant(status: int, kind: str, content: bytes, **headers: str) -> Callable[[Request], Answer]:
    return lambda _: Answer(status, {"Content_Type": kind, **headers}, content)


PAGE = b"<!DOCTYPE html><html><h1>Welcome to the hotel</h1></html>"
ANSWERS: Mapping[str, Callable[[Request], Answer]] = {
    **{str(status): refused(status) for status in (400, 401, 403, 404, 408, 409, 412, 413, 418, 429)},
    **{str(status): refused(status) for status in (500, 501, 502, 503, 504)},
    "429 Retry-After": refused(429, Retry_After="7"),
    "429 Retry-After odd": refused(429, Retry_After="99999999999999999999"),
    "429 Retry-After date": refused(429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    "401 RepoNotFound": refused(401, X_Error_Code="RepoNotFound"),
    "403 GatedRepo": refused(403, X_Error_Code="GatedRepo"),
    "404 EntryNotFound": refused(404, X_Error_Code="EntryNotFound"),
    "404 RevisionNotFound": refused(404, X_Error_Code="RevisionNotFound"),
    "page": constant(200, "text/html", PAGE),
    "redirect elsewhere": lambda request: Answer(
        307, {"Location": f"http://localhost:{(request.host or '').partition(':')[2]}{request.path}"}
    ),
    "page 302": constant(302, "text/html", PAGE, Location="http://127.0.0.1:9/login"),
    "redirect in a circle": constant(302, "text/html", b"", Location="/api/whoami-v2/../x"),
    "empty": constant(200, "application/json", b""),
    "empty 204": constant(204, "application/json", b""),
    "304": constant(304, "application/json", b""),
    "null": constant(200, "application/json", b"null"),
    "[]": constant(200, "application/json", b"[]"),
    "{}": constant(200, "application/json", b"{}"),
    "text": constant(200, "application/json", b'"refused"'),
    "not UTF-8": constant(200, "application/json", b'{"a": "\xff"}'),
    "too short": lambda _: Answer(200, {}, b'{"sha', length=100_000),
    "206": constant(206, "application/octet-stream", bytes(8), Content_Range="bytes 100-107/226000"),
}
OTHERS = ("dropped", "cut", "cut at the first byte", "flipped", "another ETag")
FAULTS = (*ANSWERS, *OTHERS)


@dataclass(frozen=True, slots=True)
class Case:
    """A fault at the request number `at`, the first being 1; `forever`: and at all after it."""

    fault: str
    at: int
    forever: bool

    def __str__(self) -> str:
        return f"{self.fault} at {self.at}{' and on' if self.forever else ''}"


@dataclass(slots=True)
class Found:
    """Ends of the two runs of a case, and what is wrong with them, nothing at best."""

    case: Case
    struck: str
    code: int
    seconds: float
    sentence: str
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class World:
    """A stub with a model and an adapter, and the command line pointed at it.

    `expected` is the output of an undisturbed run by file name, `requests` what that run asked for.
    """

    hub: Hub
    commands: Commands
    folder: Path
    expected: Mapping[str, bytes]
    requests: Sequence[Request]

    def command(self, *more: str) -> Outcome:
        """A merge from the Hub and the push of it."""
        return self.commands.run(
            *("merge", "--base", "org/base", "--adapter", "org/adapter", "-o", self.folder / "out"),
            *("--push-to", TARGET, "--quiet", *more),
        )

    def reset(self) -> None:
        """The state before the first run: an empty cache, no output, nothing pushed."""
        for name in ("cache", "out"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.hub.repos.pop(TARGET, None)
        self.hub.blobs.clear()
        self.hub.requests.clear()

    def try_case(self, case: Case) -> Found:
        """The command with the fault, and again without; the state of both, judged."""
        self.reset()
        with struck(self.hub, case) as where:
            first = self.command()
        found = Found(case, where[0] if where else "", first.code, first.seconds, first.text.strip()[-500:])
        if first.code not in GOOD_ENDS:
            found.wrong.append(f"exit {first.code}")
        if first.code and sum(line.startswith("Error: ") for line in first.text.splitlines()) != 1:
            found.wrong.append("not one sentence")
        if first.seconds > SLOWEST_S:
            found.wrong.append(f"{first.seconds:.0f} s")
        found.wrong += self._wrong(first)
        again = self.command()
        if again.code:
            found.wrong.append(f"then exit {again.code}: {again.text.strip()[-300:]}")
        elif self.output() != self.expected or not self._pushed():
            found.wrong.append("then another output")
        found.wrong += self._wrong(again)
        return found

    def _wrong(self, outcome: Outcome) -> Iterator[str]:
        if "Traceback" in outcome.text:
            yield "traceback"
        yield from self.shown(outcome)
        if outcome.code == 0 and self.output() != self.expected:
            yield "wrong success"
        if outcome.code == 0 and not self._pushed():
            yield "success, and not pushed"
        commits = self.hub.repos[TARGET].commits.values() if TARGET in self.hub.repos else ()
        if any({*files} - {".gitattributes"} not in (set(), {*self.expected}) for files in commits):
            yield "half a model in a commit"
        elsewhere = [each for each in self.hub.requests if each.host and each.host not in self.hub.url]
        if any(each.authorization for each in elsewhere):
            yield "token sent elsewhere"

    def shown(self, outcome: Outcome) -> Iterator[str]:
        """Secrets in what a run said, and in all files that it wrote."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "token"]
        texts = [outcome.text, *(path.read_bytes().decode("latin-1") for path in files)]
        yield from (f"{secret} is shown" for secret in SECRETS if any(secret in text for text in texts))

    def output(self) -> dict[str, bytes]:
        """All files of the output by name; none if there is no output."""
        out = self.folder / "out"
        return (
            {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} if out.is_dir() else {}
        )

    def _pushed(self) -> bool:
        return TARGET in self.hub.repos and self.hub.head(TARGET).items() >= self.expected.items()


@contextmanager
def struck(hub: Hub, case: Case) -> Iterator[list[str]]:
    """Let the fault strike; which requests it struck."""
    lock, seen, where = threading.Lock(), 0, list[str]()

    def strikes(request: Request) -> bool:
        nonlocal seen
        if request.path == _UNNEEDED:
            return False
        with lock:
            seen += 1
            hit = seen == case.at or (case.forever and seen > case.at)
            if hit:
                where.append(f"{request.method} {request.path}")
            return hit

    def cut(request: Request) -> None:
        if strikes(request):
            hub.cut_at = 0 if "first" in case.fault else 100

    def flip(request: Request) -> None:
        hub.tamper = _flipped if strikes(request) else None

    if case.fault in ANSWERS:
        hub.instead = lambda request: ANSWERS[case.fault](request) if strikes(request) else None
    elif case.fault == "dropped":
        hub.drop = strikes
    elif case.fault.startswith("cut"):
        hub.before = cut
    elif case.fault == "flipped":
        hub.before = flip
    else:
        hub.retag = strikes
    try:
        yield where
    finally:
        hub.instead, hub.drop, hub.before, hub.tamper, hub.retag = None, _never, _nothing, None, _never
        hub.cut_at = None


def _counted(hub: Hub) -> list[Request]:
    """Requests that a fault could strike, in their order."""
    return [request for request in hub.requests if request.path != _UNNEEDED]


def _flipped(name: str, content: bytes) -> bytes:
    del name
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content


def _never(request: Request) -> bool:
    del request
    return False


def _nothing(request: Request) -> None:
    del request


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Everything that cases need, with the undisturbed run done."""
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="20KB")
    (base / "tokenizer.json").write_text("{}")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(folder / "adapter", base, lora).path
    work = folder / "work"
    work.mkdir()
    with serve(Hub()) as hub, pytest.MonkeyPatch.context() as patch:
        hub.add("org/base", base)
        hub.add("org/adapter", adapter)
        for name, value in environment(hub, work).items():
            patch.setenv(name, value)
        patch.delenv("HF_TOKEN")
        (work / "home").mkdir()
        (work / "home" / "token").write_text(TOKEN)
        patch.setenv("HTTPS_PROXY", f"http://me:{PROXY_PASSWORD}@127.0.0.1:9")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("HF_HUB_VERBOSITY", "debug")
        with fork_server("tests.hub_process", "streamconv.pipeline", "streamconv.storage.upload") as commands:
            first = World(hub, commands, work, {}, ())
            outcome = first.command()
            if outcome.code:
                raise RuntimeError(outcome.text)
            yield World(hub, commands, work, first.output(), _counted(hub))
