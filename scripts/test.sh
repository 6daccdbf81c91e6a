#!/bin/sh
# test.sh: installs what is missing (sudo where needed), then runs every test. Needs only a shell and apt.
set -eu
cd "$(dirname "$0")/.."
sh scripts/deps.sh test
exec make test "$@"
