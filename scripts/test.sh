#!/bin/sh
# test.sh: installs what is missing (sudo where needed), then runs every test. Needs only a shell and apt.
set -u
cd "$(dirname "$0")/.." || exit 1
sh scripts/deps.sh test || exit 1
make test "$@"
code=$?
# After a failure make has the last word; the count belongs there.
[ "$code" = 0 ] || tail -n 1 "${BUILD:-build}/test-logs/summary" 2>/dev/null
exit "$code"
