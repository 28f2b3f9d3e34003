"""The part that a launcher's environment names, where it is asked for, and only where all in it say the same."""

from __future__ import annotations

import pytest

from streamconv.cli.launchers import named_part
from streamconv.errors import OptionError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
# As srun sets them for the second of two tasks, and as sbatch does in the script itself.
SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "4"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "5"}


def array(task: int, count: int, first: int, last: int) -> dict[str, str]:
    numbers = {"ID": task, "COUNT": count, "MIN": first, "MAX": last, "STEP": 1}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()} | BATCH


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("auto", TORCHRUN, "4/8"),
        ("AUTO", {"RANK": "0", "WORLD_SIZE": "2"}, "1/2"),
        ("auto", SRUN, "2/2"),
        ("auto", array(2, 4, 0, 3), "3/4"),
        ("auto", array(3, 4, 1, 4), "3/4"),
        ("auto", array(20, 3, 10, 30), "2/3"),
        ("auto", array(5, 1, 5, 5) | SRUN, "2/2"),
        ("auto", SKYPILOT, "1/4"),
        ("auto/8", KUBERNETES, "6/8"),
        ("auto/8", TORCHRUN, "4/8"),
        # torchrun on each of two nodes, started by srun
        ("auto", TORCHRUN | SRUN, "4/8"),
        # ranks that a script has set by hand, and rightly
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"} | SRUN, "2/2"),
        ("3/4", SRUN, "3/4"),
        # one worker makes all
        ("1/1", {}, "1/1"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, "1/1"),
        (None, TORCHRUN, None),
        (None, array(2, 4, 0, 3), None),
    ],
)
def test_part(text: str | None, environment: dict[str, str], part: str | None) -> None:
    assert named_part(text, environment) == part


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("auto", {}, "finds no launcher"),
        # not a step: this script runs once, whatever the number of tasks
        ("auto", BATCH, "finds no launcher"),
        ("auto", {"RANK": "0"}, "finds no launcher"),
        (
            "auto",
            KUBERNETES,
            "Kubernetes says that this is worker 6, and not of how many; give --part auto/N",
        ),
        ("auto/4", KUBERNETES, "Kubernetes says worker 6 of 4"),
        ("auto/4", TORCHRUN, "torchrun says worker 4 of 8; make both the same"),
        ("auto/0", KUBERNETES, "--part 1/0 is none"),
        # ranks that a batch script has exported, the same for all its tasks
        (
            "auto",
            {"RANK": "0", "WORLD_SIZE": "2"} | SRUN,
            "ambiguous here .RANK and WORLD_SIZE says worker 1 of 2; srun says worker 2 of 2",
        ),
        (
            "auto",
            array(1, 4, 0, 3) | SRUN,
            "ambiguous here .srun says worker 2 of 2; the Slurm array says worker 2 of 4",
        ),
        ("auto", array(3, 3, 0, 3), "3 from 0 to 3 with gaps"),
        ("auto", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', no whole number"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "says worker 3 of 2"),
        ("auto", {"RANK": "-1", "WORLD_SIZE": "2"}, "says worker 0 of 2"),
    ],
)
def test_what_is_not_one_part_is_refused(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        named_part(text, environment)
