#!/bin/bash
#SBATCH --job-name=streamconv
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# One output made by the tasks of one job, a task a node:
#
#     sbatch tools/deploy/slurm-srun.sh --base /shared/llama --adapter /shared/my-lora -o /shared/merged
#
# The folder of -o must be one that all nodes see. --part auto is for what srun starts: it reads the task's number, which
# a batch script itself does not have. Run again, or requeued, the job goes on where it was.
set -euo pipefail
# A task that fails does not end the others: what they make is kept.
exec srun --kill-on-bad-exit=0 "${STREAMCONV:-streamconv}" merge "$@" --part auto --json-progress
