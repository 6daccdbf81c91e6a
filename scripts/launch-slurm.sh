#!/bin/sh
#SBATCH --job-name=riverrun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=riverrun-%j.out
# launch-slurm.sh: a run on the nodes of a Slurm job, one rank a GPU. Lines above are defaults; the command line of
# sbatch wins over them:
#
#   sbatch --nodes=4 scripts/launch-slurm.sh build/riverrun train CONFIG train.out=/shared/runs/a
#
# Two minutes before the time is up Slurm sends SIGTERM to this script alone (B:), which has every rank save and end.
# Choose more for models whose checkpoint takes longer to write. `scancel --signal=TERM --batch JOB` does the same at
# any time. The same command, or `scontrol requeue JOB`, goes on from there. train.out has to be on a file system that
# all nodes share: rank 0 writes, all read. Open MPI must know Slurm (`ompi_info | grep slurm`); it then starts its
# ranks on the job's nodes by itself.
set -u
refuse() {
    echo "$*" >&2
    exit 2
}
[ -n "${SLURM_NTASKS:-}" ] || refuse "launch-slurm.sh is for sbatch; on machines of your own use launch-mpirun.sh"
[ $# -ge 1 ] || refuse "usage: sbatch $0 build/riverrun train CONFIG [section.key=value ...]"
# Slurm runs a copy of this file; its fellow is where the job was submitted.
cd "$SLURM_SUBMIT_DIR" || exit 1
exec sh scripts/launch-mpirun.sh -n "$SLURM_NTASKS" "$@"
