#!/bin/sh
# test_gpu_ranks.sh: training on two GPUs by MPI and NCCL, in fp32 and in bf16: the losses of one GPU up to rounding;
# the same bits twice, and with an interruption; going on on one GPU, and back; evaluation; a signal saves once; a rank
# that is killed, hangs or meets damaged data ends the job within 30 seconds, says so once, and saves nothing.
#
# On emulated GPUs (make EMULATE=1) each process has one of its own, so there it runs on any machine with mpirun.
set -u
. "$(dirname "$0")/support.sh"
have_mpi || skip "mpirun is not installed, or this riverrun was built without MPI"
need_gpu
if "$RIVERRUN" bench gemm --device cuda --size 32 --repeats 1 2>/dev/null | grep -q 'emulated GPU'; then
    emulated=1 gpus=2
else
    emulated=0 gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
fi
[ "$gpus" -ge 2 ] || skip "two GPUs are needed, and this machine has $gpus"
make_data
make_config "$WORK/c.ini"
sed -i 's/^steps = 40/steps = 22/' "$WORK/c.ini"

# train_ranks RANKS ARGUMENT...
train_ranks() {
    count=$1
    shift
    mpi "$count" "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.device=cuda "$@" \
        > "$WORK/out" 2> "$WORK/err"
}

# close_curves LIMIT WANT GOT WHAT: losses of all steps and validations, step by step.
close_curves() {
    for curve in "$2" "$3"; do
        sed -n 's/.*"type":"\([a-z]*\)","step":\([0-9]*\),"loss":\([^,}]*\).*/\1-\2 \3/p' "$curve/log.jsonl" |
            sort > "$curve.losses"
    done
    join "$2.losses" "$3.losses" | awk -v limit="$1" '{ n++; d = $2 - $3; if (d < 0) d = -d
        if (!(d <= limit * $2)) { print "too far apart: " $0; exit } }
        END { if (n < 20) print "only " n + 0 " in common" }' \
        > "$WORK/verdict"
    [ ! -s "$WORK/verdict" ] || fail "$4: $(cat "$WORK/verdict")"
}

for precision in fp32 bf16; do
    limit=2e-5
    [ "$precision" = bf16 ] && limit=5e-3
    gpu="train.precision=$precision"
    run=$WORK/$precision
    # shellcheck disable=SC2086
    {
        "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.device=cuda $gpu train.out="$run-1" \
            > "$WORK/out" 2> "$WORK/err" || fail "$precision, one GPU: $(tail -n 3 "$WORK/err")"
        train_ranks 2 $gpu train.micro_batch=3 train.out="$run-2" || fail "$precision, 2 GPUs: $(tail -n 3 "$WORK/err")"
        grep -q "^riverrun .*, 2 ranks, " "$WORK/err" || fail "2 ranks were not what ran: $(head -n 1 "$WORK/err")"
        close_curves $limit "$run-1" "$run-2" "$precision, 2 GPUs and one"

        train_ranks 2 $gpu train.micro_batch=3 train.steps=9 train.out="$run-parts" ||
            fail "$precision, 9 steps: $(tail -n 3 "$WORK/err")"
        train_ranks 2 $gpu train.micro_batch=3 train.out="$run-parts" ||
            fail "$precision, going on: $(tail -n 3 "$WORK/err")"
        same_weights "$run-2" "$run-parts" "$precision, the same again in two parts"

        # Accumulation, gradients sent block by block, and an embedding that is not the head.
        for ranks in 1 2; do
            train_ranks $ranks $gpu train.micro_batch=1 model.tie_embeddings=false comm.bucket_mib=0 \
                train.out="$run-untied$ranks" ||
                fail "$precision, untied, $ranks: $(tail -n 3 "$WORK/err")"
        done
        close_curves $limit "$run-untied1" "$run-untied2" "$precision, accumulating, with a head of its own"

        # From two to one and back.
        train_ranks 2 $gpu train.micro_batch=3 train.steps=8 train.out="$run-moved" &&
            train_ranks 1 $gpu train.micro_batch=3 train.steps=15 train.out="$run-moved" &&
            train_ranks 2 $gpu train.micro_batch=1 train.out="$run-moved" ||
            fail "$precision, moved: $(tail -n 3 "$WORK/err")"
        close_curves $limit "$run-1" "$run-moved" "$precision, on 2, 1 and 2 GPUs"
    }
    for ranks in 1 2; do
        mpi $ranks "$RIVERRUN" eval "$run-2" --data "$WORK/valid" --device cuda --precision $precision \
            2> "$WORK/err" | sed -n 's/.*"loss":\([0-9.]\{10\}\).*/\1/p' > "$WORK/eval$ranks"
    done
    [ -s "$WORK/eval1" ] && cmp -s "$WORK/eval1" "$WORK/eval2" ||
        fail "$precision: eval on one GPU says $(cat "$WORK/eval1"), on two $(cat "$WORK/eval2")"
done

if [ "$emulated" = 0 ]; then
    train_ranks $((gpus + 1)) train.batch=$((gpus + 1)) train.micro_batch=1 train.out="$WORK/many" &&
        fail "$((gpus + 1)) ranks trained on $gpus GPUs"
    grep -q "start at most as many ranks as there are GPUs" "$WORK/err" || fail "too many ranks: $(cat "$WORK/err")"
fi

# start_ranks RUN ARGUMENT...: two ranks in the background; $pid is mpirun, or what $launch names.
launch="mpirun -np 2"
start_ranks() {
    run=$1
    shift
    set_mpi_environment
    $launch "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.device=cuda train.precision=bf16 \
        train.micro_batch=3 train.out="$run" train.steps=50000 "$@" > "$WORK/out" 2> "$WORK/err" &
    pid=$!
    STARTED="$STARTED $pid"
    await_steps "$run" 5 "$pid"
}

# SIGUSR1 to mpirun, and SIGTERM to the launch script: one save, and exit code 0.
for signal in USR1 TERM; do
    [ "$signal" = USR1 ] || launch="sh $(dirname "$0")/../scripts/launch-mpirun.sh -n 2"
    rm -rf "$WORK/signalled"
    start_ranks "$WORK/signalled" eval.every=0
    kill -s "$signal" "$pid"
    wait "$pid"
    code=$?
    [ "$code" = 0 ] || fail "SIG$signal: exit code $code"
    [ "$(grep -c "the same command goes on from there" "$WORK/err")" = 1 ] ||
        fail "SIG$signal: $(tail -n 5 "$WORK/err")"
    stopped=$(steps_logged "$WORK/signalled")
    [ "$(readlink "$WORK/signalled/latest")" = "$(printf 'step-%08d' "$stopped")" ] ||
        fail "SIG$signal: latest is $(readlink "$WORK/signalled/latest") after $stopped steps"
done
launch="mpirun -np 2"
"$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.device=cuda train.precision=bf16 train.micro_batch=2 \
    train.out="$WORK/signalled" train.steps=$((stopped + 3)) eval.every=0 > "$WORK/out" 2> "$WORK/err" ||
    fail "stopped on two GPUs, going on on one: $(tail -n 3 "$WORK/err")"

# ended WHAT RUN SINCE PATTERN: the job failed in time, with one line of ours, and saved nothing.
ended() {
    wait "$pid" && fail "$1: exit code 0"
    seconds=$(($(date +%s) - $3))
    [ "$seconds" -le 30 ] || fail "$1: the job lasted $seconds s more"
    [ ! -e "$2/latest" ] || fail "$1: it was followed by a save"
    [ "$(grep -c '^riverrun: ' "$WORK/err")" = 1 ] && grep -q "^riverrun: $4" "$WORK/err" ||
        fail "$1: $(grep -v '^step' "$WORK/err" | tail -n 20)"
}
for signal in KILL STOP; do
    start_ranks "$WORK/$signal" checkpoint.every=0 eval.every=0 comm.timeout=4
    child=$(last_child "$pid")
    now=$(date +%s)
    kill -s "$signal" $child
    pattern='rank 1: killed or crashed in .* at step [0-9]'
    [ "$signal" = KILL ] || pattern='rank 0: no progress for 4 s (comm.timeout) in .* at step [0-9]'
    ended "SIG$signal to a rank" "$WORK/$signal" "$now" "$pattern"
done

mkdir "$WORK/damaged"
cp "$WORK/train/"* "$WORK/damaged/"
shard=$(ls "$WORK/damaged/"*.rrs | head -n 1)
printf 'XXXXXXXX' | dd of="$shard" bs=1 seek=$(($(wc -c < "$shard") / 2)) conv=notrunc 2>/dev/null
now=$(date +%s)
start_ranks "$WORK/broken" data.train="$WORK/damaged" checkpoint.every=0 eval.every=0
ended "damaged data" "$WORK/broken" "$now" 'rank [01]: .*\.rrs'
finish
