#!/bin/bash
# One dataset by a SLURM array:   sbatch configs/engines/slurm-array.sh
#
# Every task runs the same command. `builder shards` reads its place from SLURM's variables (or torchrun's), makes its
# share of the plan, then helps the others. Tasks need not run at the same time: one that starts hours late makes what is
# left, one that is lost is missed by its share of speed only. Submit again to continue; what is committed stays.
#
#SBATCH --job-name=builder-shards
#SBATCH --array=0-7                 # eight tasks; any number. COUNT and settings must be the same in all of them
#SBATCH --nodes=1                   # a task is one machine ...
#SBATCH --ntasks-per-node=1         # ... with as many processes as it has GPUs: set both to 8 on an 8-GPU machine,
#SBATCH --gpus-per-task=1           #     and srun below starts one process a GPU
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=12:00:00
#SBATCH --requeue                   # after a pre-emption SLURM starts the task anew, and the task continues
#SBATCH --output=logs/%x-%A-%a.out
# SLURM sends SIGTERM, then waits KillWait seconds (scontrol show config; 30 by default) before SIGKILL. A unit that is
# not finished within --grace is abandoned: nothing of it is visible, and another task makes it.

set -euo pipefail
: "${OUT:=$PWD}"                    # shards/ and manifests/ go here: a folder that all machines see
: "${COUNT:=100000}"
: "${CONFIG:=sdxl-full}"
: "${NAME:=array}"

export OMP_NUM_THREADS=1
srun builder shards --config "$CONFIG" --count "$COUNT" --name "$NAME" --out "$OUT" --grace 25

# How far it is, from any machine:  builder status "$NAME" --out "$OUT"
