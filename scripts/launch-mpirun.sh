#!/bin/sh
# launch-mpirun.sh: starts riverrun on several GPUs, of one machine or of several, and passes signals on so that a run
# is saved before it ends.
#
#   sh scripts/launch-mpirun.sh [-n RANKS] [--hostfile FILE] build/riverrun train CONFIG [section.key=value ...]
#
# RANKS: one for each GPU; left out, as many as this machine has. With a hostfile (`host slots=8` a line), of all hosts.
#
# SIGTERM, SIGINT and SIGUSR1 to this script reach every rank as SIGUSR1, at which the run saves after its step and ends
# with exit code 0. Why not as they are: Open MPI ends its ranks soon after it passes SIGTERM on, whatever they are
# doing. A SIGTERM that somebody sends to mpirun itself leaves them SAVE_SECONDS (20) from the environment; ranks of
# other machines that wait for one that failed are ended after as many, so it should stay below 30.
#
# From the environment, to all ranks: NCCL_*, OMP_*, CUDA_*, RIVERRUN_*, LD_LIBRARY_PATH, PATH. Of NCCL's own these
# matter most: NCCL_DEBUG=WARN (what it complains of), NCCL_SOCKET_IFNAME and NCCL_IB_HCA (which network),
# NCCL_NVLS_ENABLE=0 (no NVLink multicast, which some virtual machines offer and can't do). MPIRUN names another mpirun.
set -u

usage() {
    sed -n 's/^#   \(sh scripts.*\)/usage: \1/p' "$0" >&2
    exit 2
}
refuse() {
    echo "launch-mpirun.sh: $*" >&2
    exit 2
}

ranks='' hostfile=''
while [ $# -gt 0 ]; do
    case $1 in
    -n | -np) [ $# -ge 2 ] || usage; ranks=$2; shift 2 ;;
    --hostfile) [ $# -ge 2 ] || usage; hostfile=$2; shift 2 ;;
    -h | --help) usage ;;
    *) break ;;
    esac
done
[ $# -ge 1 ] || usage
program=$(printf %.15s "${1##*/}") # as the kernel names the process
if [ -z "$ranks" ] && [ -z "$hostfile" ]; then
    ranks=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    [ "$ranks" -gt 0 ] || refuse "nvidia-smi lists no GPU here: say how many ranks with -n"
fi
mpirun=${MPIRUN:-mpirun}
command -v "$mpirun" >/dev/null 2>&1 || refuse "there is no $mpirun (Debian: openmpi-bin)"

# Containers run as root; mpirun wants to be told twice that this is meant.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# Where hwloc finds an OpenCL made with LLVM, mpirun loads it, and LLVM takes SIGUSR1 for itself.
export HWLOC_COMPONENTS="${HWLOC_COMPONENTS:+$HWLOC_COMPONENTS,}-opencl"
# Threads of the loader and of OpenMP may use all processors; a rank bound to one would share it with them.
set -- --bind-to none --mca odls_base_sigkill_timeout "${SAVE_SECONDS:-20}" "$@"
[ -z "$ranks" ] || set -- -np "$ranks" "$@"
[ -z "$hostfile" ] || set -- --hostfile "$hostfile" "$@"
for name in $(env | sed -n 's/^\(\(NCCL\|OMP\|CUDA\|RIVERRUN\)_[A-Za-z0-9_]*\|LD_LIBRARY_PATH\)=.*/\1/p'); do
    set -- -x "$name" "$@"
done

"$mpirun" "$@" &
child=$!
# By mpirun to all ranks, and to those of this machine directly, too, should anything else in mpirun take the signal. A
# rank that gets it twice stops once.
pass_on() {
    kill -USR1 "$child" 2>/dev/null
    for rank in $(pgrep -P "$child" -x "$program" 2>/dev/null); do kill -USR1 "$rank" 2>/dev/null; done
}
trap pass_on TERM INT USR1
# A signal ends `wait` early; the ranks are still saving then.
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done
exit "$code"
