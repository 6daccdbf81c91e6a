#!/bin/sh
# test_kill.sh: SIGKILL at any moment loses nothing but the steps since the last save. Sessions are killed at keyed
# instants: in place of the N-th change to the disk (so also in the middle of a save, at each of its steps), and after
# random times. After every kill `latest` is absent or a complete checkpoint, no older than before; in the end weights,
# optimizer state and log are those of an uninterrupted run. KILLS=200 in the environment: so many kills, most of them
# after random times.
set -u
. "$(dirname "$0")/support.sh"
make_data
make_config "$WORK/c.ini"
sed -i 's/^every = 7$/every = 3/' "$WORK/c.ini" # 28 saves
WANTED=${KILLS:-0}
# The run ends one save later than the killed sessions may come, so that there is a save left to clear up what the last
# kill left.
steps=84
train() { "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.steps=$steps "$@"; }

begun=$(date +%s%3N)
train train.out="$WORK/whole" > /dev/null 2> "$WORK/err" || fail "the uninterrupted run failed: $(cat "$WORK/err")"
whole=$(($(date +%s%3N) - begun)) # ms

# draw N BOUND: the N-th of a keyed sequence of numbers from 1 to BOUND.
draw() { awk -v n="$1" -v bound="$2" 'BEGIN { x = 7 + n * n * 7919; for (i = 0; i < 5; i++) x = x * 16807 % 2147483647
    print 1 + int(x / 1024) % bound }'; }

# What a kill may leave: no `latest`, or one whose files are all there and whole.
check_latest() {
    [ -L "$WORK/run/latest" ] || return 0
    "$RIVERRUN" export "$WORK/run/latest" --out "$WORK/exported" > /dev/null 2> "$WORK/err" ||
        fail "$1: latest can't be read: $(cat "$WORK/err")"
    rm -rf "$WORK/exported"
    for file in optimizer.safetensors trainer.json config.ini; do
        [ -s "$WORK/run/latest/$file" ] || fail "$1: latest has no $file"
    done
}

# How the N-th session is killed: by default every fourth after a time, with KILLS all but every fourth.
by_time() { if [ "$WANTED" -gt 0 ]; then [ $(($1 % 4)) != 0 ]; else [ $(($1 % 4)) = 0 ]; fi; }
# Times that reach from before the first step to several saves, and, by default, not to the end of the run.
longest=$((whole / 4 < 150 ? whole / 4 : 150))
[ "$WANTED" -gt 0 ] && longest=400

kills=0 timed=0 session=0 saves=0 halfway=0
while { [ "$WANTED" = 0 ] && [ "$session" -lt 28 ]; } || [ "$kills" -lt "$WANTED" ]; do
    session=$((session + 1))
    before=$(readlink "$WORK/run/latest" 2>/dev/null)
    left=$(ls -di "$WORK"/run/tmp-* 2>/dev/null)
    if by_time "$session"; then
        "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.steps=$steps train.out="$WORK/run" \
            > /dev/null 2> "$WORK/err" &
        pid=$!
        STARTED="$STARTED $pid"
        sleep "0.$(printf '%03d' "$(draw "$session" "$longest")")"
        kill -9 "$pid" 2>/dev/null
        wait "$pid"
        code=$?
        what="kill after a while"
        [ "$code" = 137 ] && timed=$((timed + 1))
    else
        # A save is about 32 changes, and a dozen more after one that was killed; the first twelve come before the first
        # step.
        at=$(draw "$session" 120)
        RIVERRUN_TEST_FAULT=kill:$at "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.steps=$steps \
            train.out="$WORK/run" > /dev/null 2> "$WORK/err"
        code=$?
        what="kill in place of change $at to the disk"
    fi 2> /dev/null # where the shell tells of the kill
    [ "$code" = 137 ] || [ "$code" = 0 ] || fail "$what: exit code $code: $(cat "$WORK/err")"
    [ "$code" = 137 ] && kills=$((kills + 1))
    after=$(readlink "$WORK/run/latest" 2>/dev/null)
    [ "$after" = "$before" ] || saves=$((saves + 1))
    [ "$(printf '%s\n%s\n' "$before" "$after" | sort | tail -n 1)" = "$after" ] ||
        fail "$what: latest went from $before to $after"
    now=$(ls -di "$WORK"/run/tmp-* 2>/dev/null)
    [ -n "$now" ] && [ "$now" != "$left" ] && halfway=$((halfway + 1)) # a directory of this session
    check_latest "$what"
    [ "$code" = 0 ] || continue
    [ "$WANTED" = 0 ] && break
    steps=$((steps + 84))
done
[ "$kills" -ge 10 ] || fail "only $kills kills before the run was over"
[ "$saves" -ge 4 ] || fail "only $saves sessions came as far as a save"
steps=$((steps + 3))
begun=$(date +%s%3N)
train train.out="$WORK/whole" > /dev/null 2> "$WORK/err" || fail "the uninterrupted run failed: $(cat "$WORK/err")"
train train.out="$WORK/run" > /dev/null 2> "$WORK/err" || fail "the last session failed: $(cat "$WORK/err")"
same_weights "$WORK/whole" "$WORK/run" "after $kills kills"
same_curve "$WORK/whole" "$WORK/run" "after $kills kills"

# Nothing is left over but what belongs to a run.
left=$(ls -A "$WORK/run" | grep -v -e '^config.ini$' -e '^lock$' -e '^log.jsonl$' -e '^latest$' -e '^step-[0-9]*$')
[ -z "$left" ] || fail "left behind: $left"
[ "$(ls -d "$WORK"/run/step-* | wc -l)" = 2 ] || fail "keep = 2 left $(ls "$WORK/run")"

# A full disk at any change ends the session with one sentence; the run goes on when there is room again.
SHORT='train.steps=8 eval.every=0 schedule.kind=constant'
for at in $(seq 1 13 110); do
    rm -rf "$WORK/full"
    RIVERRUN_TEST_FAULT=fail:$at "$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/full" $SHORT \
        > /dev/null 2> "$WORK/err"
    code=$?
    [ "$code" = 0 ] || [ "$code" = 1 ] || fail "full disk at change $at: exit code $code: $(tail -n 1 "$WORK/err")"
    [ "$code" = 0 ] || [ "$(grep -c '^riverrun: ' "$WORK/err")" = 1 ] ||
        fail "full disk at change $at: $(cat "$WORK/err")"
    train train.out="$WORK/full" $SHORT > /dev/null 2> "$WORK/err" ||
        fail "after a full disk at change $at: $(cat "$WORK/err")"
    if [ "$at" = 1 ]; then cp -R "$WORK/full" "$WORK/never"; fi
    cmp -s "$WORK/full/latest/model.safetensors" "$WORK/never/latest/model.safetensors" ||
        fail "after a full disk at change $at the weights differ"
done
echo "$kills kills in $session sessions, $timed of them after a time;" \
    "$saves sessions came to a save, $halfway ended within one; $steps steps"
finish
