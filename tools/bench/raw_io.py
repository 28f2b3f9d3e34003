"""Read the bytes of one folder and write as many as another will have, with nothing between; then sync to disk.

One thread and one buffer, as `cp` has them: what the disk alone takes for a conversion that reads more than it writes.
"""

import os
import sys
from pathlib import Path

CHUNK = 2**23


def raw_io(base: Path, out: Path, output_bytes: int) -> None:
    """Writes keep pace with reads, so that both end together."""
    files = sorted(base.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    buffer = memoryview(bytearray(CHUNK))
    read = written = 0
    out.mkdir()
    with (out / "raw").open("wb", buffering=0) as target:
        for path in files:
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    read += count
                    written += target.write(buffer[: output_bytes * read // total - written])
        os.fsync(target.fileno())


if __name__ == "__main__":
    raw_io(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
