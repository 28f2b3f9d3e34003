#!/bin/bash
#SBATCH --job-name=streamconv
#SBATCH --array=0-3
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
# One output made by the tasks of an array, which begin as nodes come free:
#
#     sbatch tools/deploy/slurm-array.sh --base /shared/llama --adapter /shared/my-lora -o /shared/merged
#
# The folder of -o must be one that all nodes see. The number of tasks is that of --array alone; it must be the same
# until all are done. A task that is killed or requeued goes on where it was; the last to end puts the output in place.
set -euo pipefail
# exec, so that the signal before the time is up reaches streamconv, which stops within seconds and keeps what is done.
exec "${STREAMCONV:-streamconv}" merge "$@" --part auto --json-progress
