#!/bin/sh
# test_full_disk.sh: a disk that is really full, and a limit on the size of files. Training and tokenizing onto a file
# system too small for them end with one sentence, leave what was there, and go on when there is room. The file system
# is a tmpfs in a user namespace of its own; where the machine does not permit that, only the limit is tested.
set -u
. "$(dirname "$0")/support.sh"
OMP_NUM_THREADS=1

# Inside the namespace: every file system begins with so little room, and gets more until the command succeeds.
if [ "${FULL_DISK_INSIDE:-}" = 1 ]; then
    rm -rf "$WORK"
    WORK=$FULL_DISK_WORK
    trap - EXIT
    disk=$WORK/disk
    train() {
        "$RIVERRUN" train "$WORK/c.ini" train.out="$disk/run" train.steps=14 checkpoint.keep=1 \
            > /dev/null 2> "$WORK/err"
    }
    tokenize() {
        "$RIVERRUN" tokenize --out "$disk/out" --overwrite --shard-tokens 30000 "$WORK/train.txt" \
            > /dev/null 2> "$WORK/err"
    }
    # fill COMMAND WHOLE FIRST STEP: WHOLE is the directory or checkpoint that a command with room has made.
    fill() {
        size=$3 refused=0
        mount -t tmpfs -o "size=${size}k" tmpfs "$disk" || { echo "mounting failed"; exit 1; }
        until "$1"; do
            code=$?
            refused=$((refused + 1))
            [ "$code" = 1 ] || fail "$1 in $size KiB: exit code $code: $(cat "$WORK/err")"
            [ "$(grep -c '^riverrun: ' "$WORK/err")" = 1 ] || fail "$1 in $size KiB: $(cat "$WORK/err")"
            tail -n 1 "$WORK/err" | grep -q '^riverrun: .*: No space left on device$' ||
                fail "$1 in $size KiB: $(cat "$WORK/err")"
            if [ -L "$disk/run/latest" ]; then
                "$RIVERRUN" export "$disk/run/latest" --out "$WORK/exported" > /dev/null 2> "$WORK/err" ||
                    fail "$1 in $size KiB: latest: $(cat "$WORK/err")"
                rm -rf "$WORK/exported"
            fi
            [ ! -e "$disk/out" ] || fail "$1 in $size KiB: $(ls -A "$disk/out") left behind"
            [ "$refused" -lt 60 ] || { fail "$1 never succeeds: $(cat "$WORK/err")"; break; }
            size=$((size + $4))
            mount -o "remount,size=${size}k" "$disk"
        done
        echo "$1: refused $refused times, done in $size KiB"
        [ "$refused" -ge 5 ] || fail "$1 was refused only $refused times"
        for file in $(cd "$WORK/$2" && ls); do
            case $file in trainer.json | config.ini) continue ;; esac # holds times, and the name of the run
            cmp "$WORK/$2/$file" "$disk/${5:-out}/$file" || fail "$1: $file differs"
        done
        umount "$disk"
    }
    fill tokenize room/out 4 8
    fill train room/run/latest 4 12 run/latest
    finish
fi

make_data
make_config "$WORK/c.ini"
mkdir "$WORK/disk" "$WORK/room"
"$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/room/run" train.steps=14 checkpoint.keep=1 \
    > /dev/null 2> "$WORK/err" || fail "training: $(cat "$WORK/err")"
"$RIVERRUN" tokenize --out "$WORK/room/out" --shard-tokens 30000 "$WORK/train.txt" 2> "$WORK/err" ||
    fail "tokenizing: $(cat "$WORK/err")"

# No file may be larger than 8 blocks of 512 bytes.
limited() { (ulimit -f 8 && exec "$@") > /dev/null 2> "$WORK/err"; }
limited "$RIVERRUN" tokenize --out "$WORK/small" "$WORK/train.txt"
code=$?
[ "$code" = 1 ] && tail -n 1 "$WORK/err" | grep -q '^riverrun: .*: File too large$' ||
    fail "tokenize under a limit: exit code $code: $(cat "$WORK/err")"
[ ! -e "$WORK/small" ] || fail "tokenize under a limit leaves $(ls -A "$WORK/small")"
limited "$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/limited" train.steps=14
code=$?
[ "$code" = 1 ] && tail -n 1 "$WORK/err" | grep -q '^riverrun: .*: File too large$' ||
    fail "train under a limit: exit code $code: $(cat "$WORK/err")"
[ ! -e "$WORK/limited/latest" ] || fail "train under a limit leaves a checkpoint"

if ! unshare -rm sh -c 'mount -t tmpfs tmpfs "$1" && umount "$1"' sh "$WORK/disk" 2> /dev/null; then
    echo "no tmpfs in a user namespace here: only the limit on file sizes was tested"
    finish
fi
FULL_DISK_INSIDE=1 FULL_DISK_WORK=$WORK unshare -rm sh "$0" || fail "on a full disk"
finish
