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
# From the environment: BUILD, RIVERRUN_MAKE, PYTHON; JOBS (processors used for building); TEST_ONLY (a shell pattern:
# only what it matches runs), TEST_SAN=0 (no second pass), TEST_EMULATED=0 (no emulated GPU), FUZZ_SECONDS (each fuzzer,
# 6), TEST_TIMEOUT (seconds for one program, 1200).
set -u
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-python3}
make=${RIVERRUN_MAKE:-make}
jobs=${JOBS:-$(nproc 2>/dev/null || echo 1)}
only=${TEST_ONLY:-*}
logs=$BUILD/test-logs
RIVERRUN=$BUILD/riverrun
OMP_NUM_THREADS=2
# Where a test does not say what computes, the CPU does.
RIVERRUN_DEVICE=cpu
export BUILD PYTHON RIVERRUN OMP_NUM_THREADS RIVERRUN_DEVICE
# Open MPI: allow root (containers) and more ranks than processors, don't pin ranks, and don't depend on ptrace.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
# A make that called this script handed its own job slots down; the builds here take theirs from JOBS.
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed 's/--jobserver-[a-z]*=[^ ]*//g; s/-j[0-9]*//g')
export MAKEFLAGS

passed=0 failed=0 skipped=0 failures='' skips=''
begun=$(date +%s)
limit=''
command -v timeout >/dev/null 2>&1 && limit="timeout -k 10 ${TEST_TIMEOUT:-1200}"
scratch=$(mktemp -d "${TMPDIR:-/tmp}/riverrun-test.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$logs"
rm -f "$logs/summary"

# The sum of N over the log's lines "[ WORD ] N test(s)", as cmocka ends each of its groups.
cmocka_sum() {
    sed -n "s/^\[ *$1 *\] \([0-9][0-9]*\) test(s).*/\1/p" "$log" | awk '{ n += $1 } END { print n + 0 }'
}

# record NAME PASSED FAILED SKIPPED SECONDS REMARK [WHAT IS SKIPPED]: one line, and the counts.
record() {
    passed=$((passed + $2)) failed=$((failed + $3)) skipped=$((skipped + $4))
    word=pass
    [ "$4" -gt 0 ] && [ "$2" = 0 ] && word=skip
    [ "$3" -gt 0 ] && word=FAIL
    printf '%s  %-44s %4s s  %s\n' "$word" "$1" "$5" "$6"
    [ "$3" -gt 0 ] && failures="$failures
  failed   $1: $6"
    [ "$4" -gt 0 ] && skips="$skips
  skipped  $1: ${7:-$6}"
    return 0
}

# judge_cmocka CODE: sets p, f, s and remark from the log.
judge_cmocka() {
    p=$(cmocka_sum PASSED) f=$(cmocka_sum FAILED) s=$(cmocka_sum SKIPPED)
    remark="$p tests" skipped_tests=''
    [ "$s" -gt 0 ] && skipped_tests=$(sed -n 's/^\[ *SKIPPED *\] \([A-Za-z_].*\)/\1/p' "$log" | sort -u | tr '\n' ' ')
    if ! grep -q '^\[=*\] .* test(s) run' "$log"; then
        p=$(grep -c '^\[ *OK \]' "$log") f=1
        remark="ended before its tests did, exit code $1"
    elif [ "$((p + f + s))" = 0 ]; then
        f=1 remark='holds no tests'
    elif [ "$f" -gt 0 ]; then
        remark="$f of $((p + f + s)) tests failed"
    elif [ "$1" != 0 ]; then
        f=1 remark="its tests passed, but the exit code is $1"
    elif [ -n "$(ls -A "$scratch")" ]; then
        f=1 remark="leaves files behind: $(ls -A "$scratch" | tr '\n' ' ')"
    elif [ "$s" -gt 0 ]; then
        remark="$p tests, skipped $skipped_tests"
    fi
}

# run NAME KIND COMMAND...: KIND is cmocka or program.
run() {
    name=$1 kind=$2
    shift 2
    # shellcheck disable=SC2254  # TEST_ONLY is a pattern
    case $name in $only) ;; *) return 0 ;; esac
    log=$logs/$name.log
    start=$(date +%s)
    # shellcheck disable=SC2086
    TMPDIR=$scratch $limit "$@" >"$log" 2>&1 </dev/null
    code=$?
    seconds=$(($(date +%s) - start))
    p=0 f=0 s=0 remark='' skipped_tests=''
    if [ "$kind" = cmocka ]; then
        judge_cmocka "$code"
    elif [ "$code" = 0 ]; then
        p=1
    elif [ "$code" = 77 ]; then
        s=1 remark=$(tail -n 1 "$log")
    else
        f=1 remark="exit code $code"
    fi
    [ "$code" = 124 ] && [ -n "$limit" ] && remark="stopped after ${TEST_TIMEOUT:-1200} s"
    record "$name" "$p" "$f" "$s" "$seconds" "$remark" "$skipped_tests"
    if [ "$f" -gt 0 ]; then
        echo "---- the output of $name: $*"
        cat "$log"
        echo "---- the end of the output of $name"
    fi
    rm -rf "$scratch" && mkdir -p "$scratch"
}

# build NAME ARGUMENTS...: a failing build is a failing test, and nothing of it is run.
build() {
    what=$1
    shift
    echo "building $what ..."
    if "$make" -j"$jobs" "$@" >"$logs/$what.log" 2>&1; then
        [ "$what" = build-tests ] && sed -n '/^riverrun /p; /^  libraries /p; /^  .*\[[A-Z]*=.*\]$/p' "$logs/$what.log"
        return 0
    fi
    record "$what" 0 1 0 0 'does not build'
    cat "$logs/$what.log"
    return 1
}

# run_programs BUILD SUFFIX MODES: everything compiled that needs no other program.
run_programs() {
    for source in test/test_*.c; do
        [ -e "$source" ] || continue
        unit=$(basename "$source" .c)
        run "$unit$2" cmocka "$1/test/$unit"
    done
    if [ -e test/ops.c ]; then
        for mode in $3; do run "ops-$mode$2" program "$1/test/ops" "$mode"; done
    fi
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
    "$RIVERRUN" bench gemm --device cuda --size 32 --repeats 1 >/dev/null 2>"$logs/gpu.log" || {
        record gpu 0 0 1 0 "$(tail -n 1 "$logs/gpu.log" | sed 's/^riverrun: //')"
        return 0
    }
    # The double CPU table is what takes the time here.
    gpu_threads=$jobs
    [ "$gpu_threads" -gt 8 ] && gpu_threads=8
    for precision in fp32 bf16; do
        for mode in test large; do
            run "ops-$mode-cuda-$precision" program env OMP_NUM_THREADS="$gpu_threads" "$BUILD/test/ops" $mode \
                --device cuda --precision $precision
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
    run emulated-misuse program "$1/test/emulation/misuse"
    for order in forward reverse 1; do
        run "instructions-emulated-$order" program env RIVERRUN_EMULATE_ORDER=$order RIVERRUN_EMULATE_CHIP=90 \
            "$1/test/instructions"
    done
    for precision in fp32 bf16; do
        order=forward
        [ $precision = bf16 ] && order=reverse
        run "ops-test-emulated-$precision" program env RIVERRUN_EMULATE_ORDER=$order \
            sh test/emulation/ops.sh "$1/test/ops" $precision
        run_recorded emulated "$1" $precision
    done
}

run_scripts() {
    for script in test/test_*.sh; do
        [ -e "$script" ] && run "$(basename "$script")" program sh "$script"
    done
    for script in test/test_*.py; do
        [ -e "$script" ] || continue
        if command -v "$PYTHON" >/dev/null 2>&1; then
            run "$(basename "$script")" program "$PYTHON" "$script"
        else
            record "$(basename "$script")" 0 0 1 0 "there is no $PYTHON here"
        fi
    done
}

run_fuzzers() {
    for source in test/fuzz/fuzz_*.c; do
        [ -e "$source" ] || continue
        fuzzer=$(basename "$source" .c)
        if grep -q '^fuzzers left out' "$logs/build-fuzzers.log"; then
            record "$fuzzer" 0 0 1 0 'clang with libFuzzer is not installed (Debian packages clang and libclang-rt-dev)'
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
            -rss_limit_mb=2048 -error_exitcode=1 -timeout_exitcode=1 -artifact_prefix="$logs/" "$found" $seeds
    done
}

if build build-tests all tests; then
    build build-fuzzers fuzzers
    run_programs "$BUILD" '' 'test grad'
    run_gpu
    run_scripts
    run_fuzzers
fi
if [ "${TEST_EMULATED:-1}" = 1 ] && [ -z "${SAN:-}" ]; then
    if ! command -v g++ >/dev/null 2>&1; then
        record emulated 0 0 1 0 \
            'there is no g++ here (Debian package g++), which compiles kernels/cuda for the emulated GPU'
    elif build build-emulate BUILD="$BUILD-emulate" EMULATE=1 "$BUILD-emulate/test/ops" "$BUILD-emulate/test/golden" \
            "$BUILD-emulate/test/instructions" "$BUILD-emulate/test/emulation/misuse"; then
        run_emulated "$BUILD-emulate"
    fi
fi
if [ "${TEST_SAN:-1}" = 1 ] && [ -z "${SAN:-}" ] && build build-san BUILD="$BUILD-san" SAN=address,undefined tests; then
    run_programs "$BUILD-san" '-san' test
fi

{
    echo "summary, after $(($(date +%s) - begun)) s:"
    [ -n "$failures$skips" ] && printf '%s\n' "$failures$skips" | sed '/^$/d'
    echo "$passed passed, $failed failed, $skipped skipped"
} >"$logs/summary"
echo
cat "$logs/summary"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
