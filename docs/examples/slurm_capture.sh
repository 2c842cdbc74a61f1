#!/bin/bash
# Capture one store with an array of independent jobs:
#   sbatch docs/examples/slurm_capture.sh MODEL DATA OUT
# A task that was lost is run again alone, here number 3:
#   sbatch --array=3 docs/examples/slurm_capture.sh MODEL DATA OUT
#SBATCH --job-name=fusekit-capture
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail

# The number of shares of the store, whatever part of the array is submitted again.
WORLD=${WORLD:-8}

exec fusekit capture "$1" "$2" "$3" --rank "$SLURM_ARRAY_TASK_ID" --world "$WORLD" --max-length 2048
