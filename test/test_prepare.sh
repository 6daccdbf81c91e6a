#!/bin/sh
# test_prepare.sh: scripts/prepare_data.py against a small hub on this machine: the same shards as a direct
# tokenization, whatever is interrupted, damaged or refused on the way. Skipped (77) where pyarrow can't be had; the
# last line says why.
set -u
BUILD=${BUILD:-build}
RIVERRUN=${RIVERRUN:-$BUILD/riverrun}
python=$(sh scripts/make_venv.sh data)
code=$?
echo "$python"
[ $code = 0 ] || exit $code
python=$(echo "$python" | tail -n 1)
work=$(mktemp -d "${TMPDIR:-/tmp}/prepare.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
PYTHONDONTWRITEBYTECODE=1 "$python" test/check_prepare.py "$RIVERRUN" "$work"
