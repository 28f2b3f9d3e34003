"""Credentials in every form that text may hold them in, and text that only looks like it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from streamconv.credentials import secrets_of_address, secrets_of_file, without_credentials

SECRET = "hf_Sec+ret/ ü\\n%1234567890"


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        quote(SECRET),
        quote(SECRET, safe=""),
        json.dumps({"token": SECRET}),
        json.dumps({"token": SECRET}, ensure_ascii=False),
        repr(SECRET),
        repr(SECRET.encode()),
        SECRET.encode().hex(),
        *(base64.b64encode(f"{user}:{SECRET}".encode()).decode() for user in ("a", "me", "you", "user")),
        base64.urlsafe_b64encode(f"user:{SECRET}".encode()).decode(),
    ],
)
def test_a_known_secret_is_cut_out_of_every_form(form: str) -> None:
    cut = without_credentials(f"refused <{form}> twice: {form}", [SECRET])
    assert cut.count("(token)") == 2
    for piece in ("Sec", "ret", "345678", base64.b64encode(SECRET[3:15].encode()).decode()[4:12]):
        assert piece not in cut


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("hf_" + "a1B2" * 8, "(token)"),
        ("GET https://me:pass@host/x", "GET https://(token)@host/x"),
        ("GET https://hf_x@host/x", "GET https://(token)@host/x"),
        ("authorization: Bearer abc_123.def", "authorization: Bearer (token)"),
        ("(b'Authorization', b'Basic dXNlcjpwYXNz=')", "(b'Authorization', b'Basic (token)')"),
        (
            "https://cdn/x?Policy=eyJ&X-Amz-Signature=00ff&n=1",
            "https://cdn/x?Policy=(token)&X-Amz-Signature=(token)&n=1",
        ),
    ],
)
def test_what_looks_like_a_login_is_cut_out(text: str, cut: str) -> None:
    assert without_credentials(text, []) == cut


@pytest.mark.parametrize(
    "text",
    [
        "huggingface_hub.hf_hub_download failed; hf_transfer, hf_raise_for_status",
        "the basic authentication of bearer tokens",
        "org/model@main: https://huggingface.co/org/model?revision=v1 and me@example.org",
        "tensor model.layers.0.weight has 123456789 bytes",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert without_credentials(text, ["", "  ", "abc"]) == text


def test_addresses_and_files(tmp_path: Path) -> None:
    assert set(secrets_of_address("http://me:p%40ss@proxy:3128")) == {"p%40ss", "p@ss", "me:p@ss"}
    assert set(secrets_of_address("me:pass@proxy")) == {"pass", "me:pass"}
    assert set(secrets_of_address("https://hf_token@hub")) == {"hf_token"}
    assert set(secrets_of_address("https://huggingface.co")) == {""}
    assert not set(secrets_of_address("http://[bad"))
    (tmp_path / "token").write_text("hf_one\n")
    (tmp_path / "stored").write_text("[work]\nhf_token = hf_two\n[home]\nhf_token=hf_three\n")
    assert [*secrets_of_file(tmp_path / "token")] == ["hf_one"]
    assert [name.strip() for name in secrets_of_file(tmp_path / "stored")] == ["hf_two", "hf_three"]
    assert not [*secrets_of_file(tmp_path), *secrets_of_file(tmp_path / "none")]
