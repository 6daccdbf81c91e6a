# support.sh: what the scripts test/test_*.sh share; sourced by them. They drive the real binary on a tiny model and
# text that is generated here, in a directory of their own which is removed at the end. From the environment: RIVERRUN
# (the program; default build/riverrun), TMPDIR.

RIVERRUN=${RIVERRUN:-${BUILD:-build}/riverrun}
case $RIVERRUN in /*) ;; *) RIVERRUN=$PWD/$RIVERRUN ;; esac
OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# What "auto" is, on machines with a GPU too: these scripts are about the program, and compare exactly.
RIVERRUN_DEVICE=${RIVERRUN_DEVICE:-cpu}
# Threads that wait give their processor away: on a busy machine spinning ones make tiny steps twenty times slower.
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export OMP_NUM_THREADS OMP_WAIT_POLICY RIVERRUN_DEVICE
WORK=$(mktemp -d "${TMPDIR:-/tmp}/riverrun-sh.XXXXXX") || exit 1
trap 'cleanup' EXIT
trap 'exit 1' HUP INT TERM
FAILURES=0

# Nothing that this script started outlives it.
STARTED=''
cleanup() {
    for pid in $STARTED; do kill -9 "$pid" 2>/dev/null || true; done
    rm -rf "$WORK"
}

skip() { echo "$*"; exit 77; }

# reads_zstd PYTHON: whether scripts/read_shard.py finds something there that decompresses.
reads_zstd() {
    command -v zstd >/dev/null 2>&1 || "$1" -c 'import zstandard' 2>/dev/null ||
        "$1" -c 'import compression.zstd' 2>/dev/null
}

# need_gpu: skip, with riverrun's own reason, where it can't compute on a GPU.
need_gpu() {
    "$RIVERRUN" bench gemm --device cuda --size 32 --repeats 1 > /dev/null 2> "$WORK/err" ||
        skip "$(tail -n 1 "$WORK/err" | sed 's/^riverrun: //')"
}

# A failure is told and counted; the script goes on, so that one run shows all.
fail() {
    echo "FAIL: $*"
    FAILURES=$((FAILURES + 1))
}

finish() {
    [ "$FAILURES" = 0 ] || { echo "$FAILURES failures"; exit 1; }
    echo "all as expected"
    exit 0
}

# make_text FILE BYTES SEED: words of a small vocabulary, with documents.
make_text() {
    awk -v bytes="$2" -v seed="$3" 'BEGIN {
        x = seed
        while (size < bytes) {
            line = ""
            for (i = 0; i < 12; i++) {
                x = x * 16807 % 2147483647
                w = int(x / 1024) % 40
                line = line substr("theandofriverrunpastevefromswervebendbayes", w + 1, 3 + w % 4) " "
            }
            print line
            size += length(line) + 1
            if (++lines % 9 == 0) print "<|endoftext|>"
        }
    }' > "$1"
}

# make_data: $WORK/train and $WORK/valid.
make_data() {
    make_text "$WORK/train.txt" 120000 1
    make_text "$WORK/valid.txt" 6000 2
    "$RIVERRUN" tokenize --out "$WORK/train" "$WORK/train.txt" 2>"$WORK/err" || { cat "$WORK/err"; exit 1; }
    "$RIVERRUN" tokenize --out "$WORK/valid" "$WORK/valid.txt" 2>"$WORK/err" || { cat "$WORK/err"; exit 1; }
}

# make_config FILE: a run of a second or two, with accumulation, validation and saves at steps that don't coincide.
make_config() {
    cat > "$1" <<CONFIG
[model]
d_model = 16
pattern = m s
[block.m]
mixer = mamba2
d_state = 8
head_dim = 8
chunk = 16
[block.s]
mixer = mamba
d_state = 6
[train]
steps = 40
batch = 6
micro_batch = 2
log_every = 10
[data]
train = $WORK/train
valid = $WORK/valid
seq_len = 48
[optimizer]
lr = 5e-3
[schedule]
warmup = 5
min_lr = 1e-4
[eval]
every = 6
tokens = 500
batch = 4
[checkpoint]
every = 7
keep = 2
CONFIG
}

# curve RUN: the log's steps and validations without times, one a line; this is what must not depend on interruptions.
curve() {
    grep -e '"type":"step"' -e '"type":"valid"' "$1/log.jsonl" |
        sed -e 's/,"tokens_per_s":[^,}]*//' -e 's/,"seconds":[^,}]*//' -e 's/,"flops_per_s":[^,}]*//' \
            -e 's/,"mfu":[^,}]*//'
}

# same_curve WANT GOT WHAT
same_curve() {
    curve "$1" > "$WORK/want.curve"
    curve "$2" > "$WORK/got.curve"
    [ -s "$WORK/want.curve" ] || fail "$3: the log of $1 has no steps"
    cmp -s "$WORK/want.curve" "$WORK/got.curve" ||
        { fail "$3: the logged curves differ"; diff "$WORK/want.curve" "$WORK/got.curve" | head -n 6; }
}

# same_weights WANT GOT WHAT: the last checkpoints of two runs hold the same weights and the same optimizer state.
same_weights() {
    for file in model.safetensors optimizer.safetensors; do
        cmp "$1/latest/$file" "$2/latest/$file" || fail "$3: $file differs"
    done
}

# steps_logged RUN: the number of steps in its log.
steps_logged() { cat "$1/log.jsonl" 2>/dev/null | grep -c '"type":"step"' || true; }

# await_steps RUN COUNT PID: until the log has so many steps, or the process is gone.
await_steps() {
    while [ "$(steps_logged "$1")" -lt "$2" ] 2>/dev/null || [ ! -e "$1/log.jsonl" ]; do
        kill -0 "$3" 2>/dev/null || return 0
        sleep 0.02
    done
}

# last_child PID: its process with the highest number, mpirun's last rank. From /proc, because ps need not be there.
last_child() {
    sed -n "s/^\([0-9]*\) (.*) [A-Za-z] $1 .*/\1/p" /proc/[0-9]*/stat 2>/dev/null | sort -n | tail -n 1
}

# mpi RANKS COMMAND...: under mpirun, as many ranks as asked for on any machine.
have_mpi() {
    command -v mpirun >/dev/null 2>&1 && "$RIVERRUN" --version | grep -q ' mpi'
}
set_mpi_environment() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
        OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none \
        OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1 HWLOC_COMPONENTS=-opencl # whose LLVM takes mpirun's SIGUSR1
}
mpi() (
    ranks=$1
    shift
    set_mpi_environment
    exec mpirun -np "$ranks" "$@"
)
