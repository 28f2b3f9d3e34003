"""`streamconv` in a process of its own, which says first how much memory importing torch and planning took."""

from __future__ import annotations

import sys

import torch

import streamconv.planning.memory  # code: not what is told of a run
from streamconv.progress import anonymous_bytes

BEFORE = anonymous_bytes()

from streamconv.cli import main  # noqa: E402  what it imports counts as memory of the run

if __name__ == "__main__":
    assert torch.get_num_threads()
    assert streamconv.planning.memory.FIXED_BYTES
    print(BEFORE, flush=True)
    main(sys.argv[1:], prog_name="streamconv")
