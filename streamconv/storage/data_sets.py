"""Data sets of the Hub: which commit one is at."""

from __future__ import annotations

from huggingface_hub import HfApi, constants

from streamconv.storage.hub_errors import hub_errors


def data_set_commit(name: str) -> str:
    """The commit (40 hex digits) that `main` of the data set `org/name` is at.

    Raises HubError where the Hub does not show it.
    """
    with hub_errors(f"datasets/{name}", constants.DEFAULT_REVISION):
        found = HfApi().dataset_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return str(found.sha)
