#!/bin/sh
# test_prepare.sh: scripts/prepare_data.py against a small hub on this machine: the same shards as a direct
# tokenization, whatever is interrupted, damaged or refused on the way. Skipped (77) where pyarrow can't be had; the
# last line says why.
set -u
. test/support_python.sh
need_python data
need_shard_reader
PYTHONDONTWRITEBYTECODE=1 "$python" test/check_prepare.py "$RIVERRUN" "$WORK"
