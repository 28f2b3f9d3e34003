"""What goes wrong between here and the Hub is told as what it is: the Hub, this disk, or this machine."""

from __future__ import annotations

import errno
import os

import pytest

from streamconv.errors import HubError, InputError, ResourceError, StreamconvError
from streamconv.storage.hub_errors import hub_errors


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.EIO, InputError, "check the disk"),
        (errno.ESTALE, InputError, "check the disk"),
        (errno.EMFILE, ResourceError, "open file"),
        (errno.ENOMEM, ResourceError, "no memory"),
        (errno.ENOSPC, ResourceError, "is full"),
        (errno.ENETUNREACH, HubError, "check the connection"),
    ],
)
def test_what_the_system_refuses_while_files_are_sent(
    number: int, kind: type[StreamconvError], said: str
) -> None:
    with pytest.raises(kind, match=said), hub_errors("me/model"):
        raise OSError(number, os.strerror(number))
