"""Settings of object stores by the variables and files that people have them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.errors import StoreError
from streamconv.storage.object_settings import settings_of

NO_FILES = {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The two files of the AWS CLI, as variables that name them."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = K0\naws_secret_access_key = S0%\n"
        "[work]\naws_access_key_id=K1\naws_secret_access_key=S1\naws_session_token=T1\n"
    )
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile work]\nregion = eu-north-1\nendpoint_url = https://s3.example.org\n"
        "[profile sso]\nsso_session = me\n"
    )
    return {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }


def test_the_profile_is_the_default_one_or_the_one_that_is_named(files: dict[str, str]) -> None:
    assert settings_of("s3", files) == {
        "region": "eu-west-1",
        "access_key_id": "K0",
        "secret_access_key": "S0%",
    }
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        assert settings_of("s3", files | {name: "work"}) == {
            "endpoint": "https://s3.example.org",
            "region": "eu-north-1",
            "access_key_id": "K1",
            "secret_access_key": "S1",
            "session_token": "T1",
        }


def test_variables_win_over_files(files: dict[str, str]) -> None:
    given = files | {"AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S", "AWS_REGION": "us-west-2"}
    assert settings_of("s3", given) == {"region": "us-west-2"}  # obstore reads the key itself
    given = files | {"AWS_PROFILE": "work", "AWS_ENDPOINT_URL": "http://a", "AWS_DEFAULT_REGION": "r"}
    found = settings_of("s3", given)
    assert (found["endpoint"], found["region"], found["access_key_id"]) == ("http://a", "r", "K1")
    assert settings_of("s3", given | {"AWS_ENDPOINT_URL_S3": "http://b"})["endpoint"] == "http://b"
    ignored = files | {"AWS_PROFILE": "work", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}
    assert "endpoint" not in settings_of("s3", ignored)
    assert settings_of("s3", files | {"AWS_SKIP_SIGNATURE": "true"}) == {"region": "eu-west-1"}


def test_a_profile_that_cannot_be_used_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="AWS_PROFILE names gone, and there is no such profile"):
        settings_of("s3", files | {"AWS_PROFILE": "gone"})
    with pytest.raises(
        StoreError, match=r"made by the AWS CLI \(sso_session\).*export-credentials --format env"
    ):
        settings_of("s3", files | {"AWS_PROFILE": "sso"})
    assert settings_of("s3", files | {"AWS_PROFILE": "sso", "AWS_ACCESS_KEY_ID": "K"}) == {}


def test_files_that_are_none_of_the_cli_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"\xff[\n= x")
    odd = {"AWS_CONFIG_FILE": str(tmp_path / "odd"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path)}
    assert settings_of("s3", odd) == settings_of("s3", NO_FILES) == {}


def test_google_and_azure() -> None:
    assert settings_of("gs", {}) == settings_of("az", {}) == {}
    for host in ("localhost:4443", "http://localhost:4443"):
        found = settings_of("gs", {"STORAGE_EMULATOR_HOST": host})
        assert found == {"base_url": "http://localhost:4443", "skip_signature": "true"}
    text = "DefaultEndpointsProtocol=http;AccountName=me;AccountKey=a+b/c==;BlobEndpoint=http://127.0.0.1:10000/me;"
    assert settings_of("az", {"AZURE_STORAGE_CONNECTION_STRING": text}) == {
        "account_name": "me",
        "account_key": "a+b/c==",
        "endpoint": "http://127.0.0.1:10000/me",
    }
    assert settings_of("az", {"AZURE_STORAGE_ACCOUNT": "me", "AZURE_STORAGE_KEY": "k"}) == {
        "account_name": "me",
        "account_key": "k",
    }
