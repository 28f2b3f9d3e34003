"""Memory is counted over the whole process tree, and only what is really allocated."""

import sys

from tools.measure import measure

MIB = 2**20
HOLD = "import time; held = bytearray(b'x') * (64 << 20); time.sleep(0.2)"


def test_children_are_counted_with_their_parent() -> None:
    alone = measure([sys.executable, "-c", HOLD]).peak_anon_bytes
    parent = "import subprocess, sys; held = bytearray(b'x') * (64 << 20); subprocess.run(sys.argv[1:])"
    both = measure([sys.executable, "-c", parent, sys.executable, "-c", HOLD]).peak_anon_bytes
    assert 64 * MIB < alone < 96 * MIB
    assert 128 * MIB < both < 192 * MIB


def test_shared_memory_counts_where_it_is_asked_for() -> None:
    shared = "import mmap, time; held = mmap.mmap(-1, 64 << 20); held.write(bytes(64 << 20)); time.sleep(0.2)"
    command = [sys.executable, "-c", shared]
    assert measure(command, pinned=True).peak_anon_bytes - measure(command).peak_anon_bytes > 48 * MIB


def test_exit_code_output_and_processor_time_are_those_of_the_command() -> None:
    script = "import sys; sum(range(3_000_000)); print('out'); print('err', file=sys.stderr); sys.exit(7)"
    cost = measure([sys.executable, "-c", script])
    assert (cost.exit_code, cost.stdout, cost.stderr) == (7, "out\n", "err\n")
    assert cost.cpu_s > 0.02
    assert cost.wall_s > 0.02
