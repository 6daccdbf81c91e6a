#!/bin/sh
# run-tests.sh: builds and runs every test; `make test` calls it. The last line is `N passed, N failed, N skipped`, and
# the exit code is 1 if any failed.
#
# What is run: the cmocka programs test/test_*.c (each of their tests counts), the operation table build/test/ops in its
# modes test and grad, build/test/golden on each file in test/golden/, all of these once more on a GPU where there is
# one, the scripts test/test_*.sh and test/test_*.py, the fuzzers for a bounded time, some operations and the golden
# files on an emulated GPU, and then cmocka programs, operations and golden files once more under AddressSanitizer and
# UBSan. Outside cmocka one run counts as one test. A script that exits 77 is skipped, its last line of output is the
# reason. The output of what fails is shown; that of what passes is kept in build/test-logs/.
#
# As many tests run beside each other as there are processors: few of them keep more than one busy. What uses a GPU has
# it alone. scripts/run-one-test.sh runs one test and says how it went.
#
# From the environment: BUILD, RIVERRUN_MAKE, PYTHON; JOBS (processors used); TEST_ONLY (a shell pattern: only what it
# matches runs), TEST_SAN=0 (no second pass), TEST_EMULATED=0 (no emulated GPU), FUZZ_SECONDS (each fuzzer, 6),
# TEST_TIMEOUT (seconds for one program, 1200).
set -u
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-python3}
make=${RIVERRUN_MAKE:-make}
jobs=${JOBS:-$(nproc 2>/dev/null || echo 1)}
only=${TEST_ONLY:-*}
# More at a time would need memory, and the longest test decides by then.
at_once=$jobs
[ "$at_once" -gt 8 ] && at_once=8
RIVERRUN=$BUILD/riverrun
OMP_NUM_THREADS=2
# Threads that wait give their processor to the test beside them.
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# Where a test does not say what computes, the CPU does.
RIVERRUN_DEVICE=cpu
export BUILD PYTHON RIVERRUN OMP_NUM_THREADS OMP_WAIT_POLICY RIVERRUN_DEVICE
# Open MPI: allow root (containers) and more ranks than processors, don't pin ranks, and don't depend on ptrace.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
# A make that called this script handed its own job slots down; the builds here take theirs from JOBS.
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed 's/--jobserver-[a-z]*=[^ ]*//g; s/-j[0-9]*//g')
export MAKEFLAGS

begun=$(date +%s)
LIMIT=''
command -v timeout >/dev/null 2>&1 && LIMIT="timeout -k 10 ${TEST_TIMEOUT:-1200}"
temporary=$(mktemp -d "${TMPDIR:-/tmp}/riverrun-test.XXXXXX") || exit 1
trap 'rm -rf "$temporary"' EXIT
trap 'exit 1' HUP INT TERM
LOGS=$BUILD/test-logs RESULTS=$temporary/results SCRATCH=$temporary queue=$temporary/queue
export LIMIT LOGS RESULTS SCRATCH
mkdir -p "$LOGS" "$RESULTS"
rm -f "$LOGS/summary"

# run NAME KIND COMMAND...: puts a test into the queue; the kinds are those of run-one-test.sh. No word holds a blank.
run() {
    # shellcheck disable=SC2254  # TEST_ONLY is a pattern
    case $1 in $only) echo "$*" >>"$queue" ;; esac
}

# run_queue NUMBER: runs what is in the queue, so many at a time. The results say what failed; a test that left none (it
# was killed, say, where memory ran out) failed too.
run_queue() {
    [ -s "$queue" ] || return 0
    xargs -L 1 -P "$1" sh scripts/run-one-test.sh <"$queue"
    while read -r name _; do
        [ -e "$RESULTS/$name" ] ||
            sh scripts/run-one-test.sh "$name" program sh -c 'echo "was killed, or never begun"; exit 1' </dev/null
    done <"$queue"
    rm -f "$queue"
}

skip() {
    sh scripts/run-one-test.sh "$1" skip "$2"
}

# build NAME ARGUMENTS...: a failing build is a failing test, and nothing of it is run.
build() {
    what=$1
    shift
    echo "building $what ..."
    start=$(date +%s)
    sh scripts/run-one-test.sh "$what" build "$make" -j"$jobs" "$@" || return 1
    [ "$what" = build-tests ] && sed -n '/^riverrun /p; /^  libraries /p; /^  .*\[[A-Z]*=.*\]$/p' "$LOGS/$what.log"
    echo "built $what in $(($(date +%s) - start)) s"
}

# run_programs BUILD SUFFIX MODES: everything compiled that needs no other program.
run_programs() {
    # The longest first, in parts, so that not all wait for the last one.
    if [ -e test/ops.c ]; then
        for mode in $3; do
            for part in 1 2 3 4; do run "ops-$mode-$part$2" program "$1/test/ops" "$mode" --part "$part/4"; done
        done
    fi
    for source in test/test_*.c; do
        [ -e "$source" ] || continue
        unit=$(basename "$source" .c)
        run "$unit$2" cmocka "$1/test/$unit"
    done
    if [ -e test/golden.c ]; then
        for file in test/golden/*.safetensors; do
            [ -e "$file" ] || continue
            base=$(basename "$file" .safetensors)
            run "golden-$base$2" program "$1/test/golden" "$file"
            case $base in
            op-*) run "golden-$base-fp64$2" program "$1/test/golden" --precision fp64 "$file" ;;
            esac
        done
    fi
}

# run_recorded WHAT DIRECTORY PRECISION: every golden file on the GPU of a build, which is called WHAT.
run_recorded() {
    for file in test/golden/*.safetensors; do
        [ -e "$file" ] || continue
        run "golden-$(basename "$file" .safetensors)-$1-$3" program \
            "$2/test/golden" --device cuda --precision "$3" "$file"
    done
}

# run_gpu: the same operations, recorded models and identities of models on a GPU, in both of its precisions. The
# scripts test_gpu_*.sh are the rest of what needs one.
run_gpu() {
    for script in test/test_gpu_*.sh; do run "$(basename "$script")" program sh "$script"; done
    "$RIVERRUN" bench gemm --device cuda --size 32 --repeats 1 >/dev/null 2>"$LOGS/gpu.log" || {
        skip gpu "$(tail -n 1 "$LOGS/gpu.log" | sed 's/^riverrun: //')"
        return 0
    }
    # The double CPU table is what takes the time here.
    gpu_threads=$jobs
    [ "$gpu_threads" -gt 8 ] && gpu_threads=8
    for precision in fp32 bf16; do
        for mode in test large; do
            run "ops-$mode-cuda-$precision" program env OMP_NUM_THREADS="$gpu_threads" OMP_WAIT_POLICY=active \
                "$BUILD/test/ops" $mode --device cuda --precision $precision
        done
        run_recorded cuda "$BUILD" $precision
    done
    run instructions-cuda program "$BUILD/test/instructions"
    for unit in test_model_lm test_model_gradients test_model_equations test_train_ladder; do
        run "$unit-cuda" cmocka env RIVERRUN_TEST_DEVICE=cuda "$BUILD/test/$unit"
    done
}

# run_emulated DIRECTORY: what an emulated GPU gets through in a few minutes, in several orders of threads.
run_emulated() {
    run ops-test-emulated-bf16 program env RIVERRUN_EMULATE_ORDER=reverse sh test/emulation/ops.sh "$1/test/ops" bf16
    run ops-test-emulated-fp32 program env RIVERRUN_EMULATE_ORDER=forward sh test/emulation/ops.sh "$1/test/ops" fp32
    run emulated-misuse program "$1/test/emulation/misuse"
    for order in forward reverse 1; do
        run "instructions-emulated-$order" program env RIVERRUN_EMULATE_ORDER=$order RIVERRUN_EMULATE_CHIP=90 \
            "$1/test/instructions"
    done
    for precision in fp32 bf16; do run_recorded emulated "$1" $precision; done
}

run_scripts() {
    for script in test/test_*.sh; do
        case $script in test/test_gpu_*) ;; *) run "$(basename "$script")" program sh "$script" ;; esac
    done
    for script in test/test_*.py; do
        [ -e "$script" ] || continue
        if command -v "$PYTHON" >/dev/null 2>&1; then
            run "$(basename "$script")" program "$PYTHON" "$script"
        else
            skip "$(basename "$script")" "there is no $PYTHON here"
        fi
    done
}

run_fuzzers() {
    for source in test/fuzz/fuzz_*.c; do
        [ -e "$source" ] || continue
        fuzzer=$(basename "$source" .c)
        if grep -q '^fuzzers left out' "$LOGS/build-fuzzers.log"; then
            skip "$fuzzer" 'clang with libFuzzer is not installed (Debian packages clang and libclang-rt-dev)'
            continue
        fi
        # What it finds goes to the first directory, the seeds are in the second. A failure is 1: its own 77 would be a
        # skip.
        seeds=test/fuzz/corpus/${fuzzer#fuzz_}
        found=$BUILD/fuzz/corpus/$fuzzer
        mkdir -p "$found"
        [ -d "$seeds" ] || seeds=''
        # shellcheck disable=SC2086
        run "$fuzzer" program "$BUILD/fuzz/$fuzzer" -seed=1 -max_total_time="${FUZZ_SECONDS:-6}" -timeout=20 \
            -rss_limit_mb=2048 -error_exitcode=1 -timeout_exitcode=1 -artifact_prefix="$LOGS/" "$found" $seeds
    done
}

# The Python environments, half of which is waiting for the network, are made while the compiler works.
[ "$only" = '*' ] && for purpose in test data; do
    sh scripts/make_venv.sh $purpose >"$LOGS/venv-$purpose.log" 2>&1
done &
if build build-tests all tests; then
    build build-fuzzers fuzzers
    run_programs "$BUILD" '' 'test grad'
    run_scripts
    run_fuzzers
    run_queue "$at_once"
    run_gpu
    run_queue 1
fi
if [ "${TEST_EMULATED:-1}" = 1 ] && [ -z "${SAN:-}" ]; then
    if ! command -v g++ >/dev/null 2>&1; then
        skip emulated 'there is no g++ here (Debian package g++), which compiles kernels/cuda for an emulated GPU'
    elif build build-emulate BUILD="$BUILD-emulate" EMULATE=1 "$BUILD-emulate/test/ops" "$BUILD-emulate/test/golden" \
            "$BUILD-emulate/test/instructions" "$BUILD-emulate/test/emulation/misuse"; then
        run_emulated "$BUILD-emulate"
        run_queue "$at_once"
    fi
fi
# Nothing of this pass uses a GPU, so its kernels are left out.
if [ "${TEST_SAN:-1}" = 1 ] && [ -z "${SAN:-}" ] &&
    build build-san BUILD="$BUILD-san" SAN=address,undefined CUDA=0 tests; then
    run_programs "$BUILD-san" '-san' test
    run_queue "$at_once"
fi
wait

# sum COLUMN: of the results' counts.
sum() {
    sed -n 's/^counts //p' "$RESULTS"/* /dev/null | awk -v column="$1" '{ n += $column } END { print n + 0 }'
}
passed=$(sum 1) failed=$(sum 2) skipped=$(sum 3)
{
    echo "summary, after $(($(date +%s) - begun)) s:"
    sed -n '/^  /p' "$RESULTS"/* /dev/null | sort
    echo "$passed passed, $failed failed, $skipped skipped"
} >"$LOGS/summary"
echo
cat "$LOGS/summary"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
