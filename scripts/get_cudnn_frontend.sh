#!/bin/sh
# get_cudnn_frontend.sh: cuDNN's frontend, C++ headers, from PyPI into $BUILD/cudnn-frontend/include, where make looks
# for them. Needs python3 with pip; 12 MB. Without them, or without cuDNN's own header, riverrun's own attention serves.
set -u
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-python3}
version=1.32.0
to=$BUILD/cudnn-frontend
if [ -e "$to/include/cudnn_frontend.h" ]; then
    echo "$to/include is there"
    exit 0
fi
mkdir -p "$to" || exit 1
if ! "$PYTHON" -m pip download -q --no-deps --only-binary=:all: -d "$to" "nvidia-cudnn-frontend==$version" >&2; then
    echo "get_cudnn_frontend: nvidia-cudnn-frontend $version can't be had from PyPI here" >&2
    rm -rf "$to"
    exit 1
fi
# A wheel is a zip archive; python3 can read it anywhere.
"$PYTHON" - "$to" <<'PYTHON'
import glob
import sys
import zipfile

for wheel in glob.glob(sys.argv[1] + "/*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sys.argv[1], [name for name in archive.namelist() if name.startswith("include/")])
PYTHON
rm -f "$to"/*.whl
[ -e "$to/include/cudnn_frontend.h" ] && echo "$to/include"
