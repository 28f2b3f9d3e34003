"""Force a folder to the disk, as every contender has to; imports nothing that another environment may lack."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
