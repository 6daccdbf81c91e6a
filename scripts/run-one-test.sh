#!/bin/sh
# run-one-test.sh NAME KIND COMMAND...: runs one test for run-tests.sh, says in one line how it went, shows the output
# of what fails, and leaves the counts as a file. KIND is
#
#   cmocka    a program whose output is cmocka's: each of its tests counts
#   program   anything else: one test; the exit code 77 skips it, and the last line of its output is the reason
#   build     a failing build is a failing test; one that succeeds is none
#   skip      no command, but the reason why there is none
#
# From the environment, where run-tests.sh puts it: LOGS, RESULTS and SCRATCH (directories), LIMIT (the words before a
# command that end it when it takes too long), TEST_TIMEOUT. Exits with 1 if the test failed.
set -u
name=$1 kind=$2
shift 2
log=$LOGS/$name.log
passed=0 failed=0 skipped=0 remark='' skipped_tests=''

# The sum of N over the log's lines "[ WORD ] N test(s)", as cmocka ends each of its groups.
cmocka_sum() {
    sed -n "s/^\[ *$1 *\] \([0-9][0-9]*\) test(s).*/\1/p" "$log" | awk '{ n += $1 } END { print n + 0 }'
}

# judge_cmocka CODE: the counts and the remark from the log.
judge_cmocka() {
    passed=$(cmocka_sum PASSED) failed=$(cmocka_sum FAILED) skipped=$(cmocka_sum SKIPPED)
    left=$(cd "$scratch" && find . ! -name . | tr '\n' ' ')
    remark="$passed tests"
    skipped_tests=$(sed -n 's/^\[ *SKIPPED *\] \([A-Za-z_].*\)/\1/p' "$log" | sort -u | tr '\n' ' ')
    if ! grep -q '^\[=*\] .* test(s) run' "$log"; then
        passed=$(grep -c '^\[ *OK \]' "$log") failed=1
        remark="ended before its tests did, exit code $1"
    elif [ "$((passed + failed + skipped))" = 0 ]; then
        failed=1 remark='holds no tests'
    elif [ "$failed" -gt 0 ]; then
        remark="$failed of $((passed + failed + skipped)) tests failed"
    elif [ "$1" != 0 ]; then
        failed=1 remark="its tests passed, but the exit code is $1"
    elif [ -n "$left" ]; then
        failed=1 remark="leaves files behind: $left"
    elif [ "$skipped" -gt 0 ]; then
        remark="$passed tests, skipped $skipped_tests"
    fi
}

judge() {
    case $kind:$1 in
    cmocka:*) judge_cmocka "$1" ;;
    build:0) ;;
    build:*) failed=1 remark='does not build' ;;
    *:0) passed=1 ;;
    *:77) skipped=1 remark=$(tail -n 1 "$log") ;;
    *) failed=1 remark="exit code $1" ;;
    esac
    [ "$1" = 124 ] && [ -n "$LIMIT" ] && [ "$kind" != build ] && remark="stopped after ${TEST_TIMEOUT:-1200} s"
}

# record SECONDS: one line, and the counts.
record() {
    word=pass
    [ "$skipped" -gt 0 ] && [ "$passed" = 0 ] && word=skip
    [ "$failed" -gt 0 ] && word=FAIL
    printf '%s  %-44s %4s s  %s\n' "$word" "$name" "$1" "$remark"
    {
        echo "counts $passed $failed $skipped"
        [ "$failed" -gt 0 ] && echo "  failed   $name: $remark"
        [ "$skipped" -gt 0 ] && echo "  skipped  $name: ${skipped_tests:-$remark}"
    } >"$RESULTS/$name"
}

if [ "$kind" = skip ]; then
    skipped=1 remark=$*
    record 0
    exit 0
fi
scratch=$SCRATCH/$$ # a short path: sockets are made in it
mkdir -p "$scratch"
start=$(date +%s)
if [ "$kind" = build ]; then
    "$@" >"$log" 2>&1 </dev/null
else
    # shellcheck disable=SC2086
    TMPDIR=$scratch $LIMIT "$@" >"$log" 2>&1 </dev/null
fi
judge $?
seconds=$(($(date +%s) - start))
rm -rf "$scratch"
case $kind:$failed in build:0) exit 0 ;; esac
record "$seconds"
[ "$failed" = 0 ] && exit 0
echo "---- the output of $name: $*"
cat "$log"
echo "---- the end of the output of $name"
exit 1
