#!/bin/sh
# quickstart.sh: installs what is missing (sudo where needed), then builds riverrun and trains a small model on text
# that this machine has. Needs only a shell and apt. TEXT=path trains on text of one's own.
set -eu
cd "$(dirname "$0")/.."
sh scripts/deps.sh build
exec make quickstart "$@"
