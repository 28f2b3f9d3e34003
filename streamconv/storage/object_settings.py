"""Settings of object stores that obstore does not find by itself: profiles, endpoints, emulators.

obstore reads the stores' own variables (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME,
AWS_SKIP_SIGNATURE ...) and asks the machine's metadata service. It does not read the AWS CLI's files, a connection
string of Azure, or STORAGE_EMULATOR_HOST of Google's clients; what they say is turned into its settings here.
Variables win over files, as with the AWS CLI.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from streamconv.errors import StoreError

_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_ELSEWHERE = ("sso_session", "sso_start_url", "role_arn", "credential_process", "login_session")
_AZURE_PARTS = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "BlobEndpoint": "endpoint",
    "SharedAccessSignature": "sas_key",
}
_AZURE_NAMES = {"AZURE_STORAGE_ACCOUNT": "account_name", "AZURE_STORAGE_KEY": "account_key"}


def settings_of(scheme: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of obstore for a store of `s3`, `gs` or `az` that are to be given beside the variables it reads.

    Raises StoreError for a profile that is not there, or whose credentials another program has to make.
    """
    found = {"s3": _of_s3, "gs": _of_gs, "az": _of_az}[scheme](environment)
    return {name: value for name, value in found.items() if value}


def _of_s3(environment: Mapping[str, str]) -> dict[str, str]:
    own = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL", "")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION", "")
    profile = _profile(environment)
    ignores = environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    found = {
        "endpoint": own or ("" if ignores else profile.get("endpoint_url", "")),
        "region": region or profile.get("region", ""),
    }
    if environment.get("AWS_ACCESS_KEY_ID") or _is_set(environment, "AWS_SKIP_SIGNATURE"):
        return found
    return found | {ours: profile.get(theirs, "") for theirs, ours in _KEYS.items()}


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """Fields of the profile in use, of both files of the AWS CLI; those of the credentials file win."""
    asked = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE")
    name = asked or "default"
    config = _read(environment.get("AWS_CONFIG_FILE"), "config")
    credentials = _read(environment.get("AWS_SHARED_CREDENTIALS_FILE"), "credentials")
    section = name if name == "default" else f"profile {name}"
    found = {**config.get(section, {}), **credentials.get(name, {})}
    if asked and section not in config and name not in credentials:
        raise StoreError(
            f"AWS_PROFILE names {asked}, and there is no such profile in ~/.aws/config and ~/.aws/credentials; correct"
            " it, or run `aws configure`"
        )
    has_keys = environment.get("AWS_ACCESS_KEY_ID") or "aws_access_key_id" in found
    made = next((field for field in _ELSEWHERE if field in found), None)
    if asked and made and not has_keys and not _is_set(environment, "AWS_SKIP_SIGNATURE"):
        raise StoreError(
            f"the credentials of the profile {asked} are made by the AWS CLI ({made}); hand them over with"
            ' eval "$(aws configure export-credentials --format env)", then run again'
        )
    return found


def _read(place: str | None, usual: str) -> dict[str, dict[str, str]]:
    """Sections of one of the AWS CLI's files; none where it is not there or cannot be read as one."""
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(Path(place or f"~/.aws/{usual}").expanduser().read_text())
    except (OSError, RuntimeError, UnicodeDecodeError, configparser.Error):
        return {}
    return {section: dict(parser.items(section)) for section in parser.sections()}


def _of_gs(environment: Mapping[str, str]) -> dict[str, str]:
    host = environment.get("STORAGE_EMULATOR_HOST", "")
    if not host:
        return {}
    return {"base_url": host if "://" in host else f"http://{host}", "skip_signature": "true"}


def _of_az(environment: Mapping[str, str]) -> dict[str, str]:
    text = environment.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = dict(part.strip().partition("=")[::2] for part in text.split(";") if "=" in part)
    found = {ours: environment.get(theirs, "") for theirs, ours in _AZURE_NAMES.items()}
    return found | {ours: parts[theirs] for theirs, ours in _AZURE_PARTS.items() if parts.get(theirs)}


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on")
