#!/bin/sh
# make_venv.sh: a Python environment of pinned versions from PyPI; prints the path of its Python as its last line.
#
#   sh scripts/make_venv.sh         for the tests against other software, in $BUILD/venv: torch, transformers and
#                                   tokenizers of the versions in requirements-test.txt
#   sh scripts/make_venv.sh data    for scripts/prepare_data.py, in $BUILD/venv-data: requirements-data.txt
#
# An environment that was made of the same requirements is used again. Where it can't be had (no python3 of a fitting
# version, no venv module, no network, no wheels for this machine) it ends with code 77 and one line that says why.
#
# PyPI has torch for x86-64 Linux only as its CUDA build: a wheel of 540 MB that would bring 1.9 GB of NVIDIA's
# libraries with it, because they are loaded when torch is. So nothing is installed but what requirements-test.txt
# names, and torch_stand_ins.py puts empty libraries in the place of NVIDIA's: 0.6 GB to download in place of 2.5. The
# versions are pinned, so what works once goes on working, and it is tried out before it is believed.
set -u
here=$(dirname "$0")
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-python3}
purpose=${1:-test}
case $purpose in
test) venv=$BUILD/venv ;;
data) venv=$BUILD/venv-data ;;
*)
    echo "make_venv: '$purpose' is no environment, it must be test or data" >&2
    exit 2
    ;;
esac
requirements=$here/requirements-$purpose.txt

unavailable() {
    echo "the Python environment can't be made: $*"
    exit 77
}

command -v "$PYTHON" >/dev/null 2>&1 || unavailable "there is no $PYTHON (Debian package python3)"
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || unavailable "$PYTHON does not run"
case $version in
3.11 | 3.12 | 3.13 | 3.14) ;;
*) unavailable "$PYTHON is version $version, the packages need 3.11 to 3.14" ;;
esac

stand_ins=''
[ "$purpose" = test ] && stand_ins=$here/torch_stand_ins.py
mkdir -p "$BUILD"
# Of tests that run beside each other, the first one makes it and the others wait.
command -v flock >/dev/null 2>&1 && exec 9>"$venv.lock" && flock 9
# shellcheck disable=SC2086
state=$(cat "$requirements" $stand_ins "$0" | cksum)" $version"
if [ "$(cat "$venv/state" 2>/dev/null)" = "$state" ]; then
    echo "$venv/bin/python"
    exit 0
fi

"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    unavailable "$PYTHON has no venv module (Debian package python3-venv)"
if [ "$purpose" = test ]; then
    CC=${CC:-cc}
    command -v "$CC" >/dev/null 2>&1 || CC=cc # several words, like "ccache gcc"
    for program in "$CC" readelf; do
        command -v "$program" >/dev/null 2>&1 || unavailable "there is no $program"
    done
    export CC
fi

rm -rf "$venv"
log=$venv.log
: >"$log"
why() { unavailable "$1: $(grep -v '^ *$' "$log" | tail -n 1) (see $log)"; }
pip() {
    "$venv/bin/python" -m pip install -q --no-input --retries 2 --no-compile --only-binary=:all: "$@" >>"$log" 2>&1
}
works() { "$venv/bin/python" -c "$1" >>"$log" 2>&1; }

"$PYTHON" -m venv "$venv" >>"$log" 2>&1 || why 'python -m venv'
if [ "$purpose" = test ]; then
    echo "installing torch and transformers into $venv (0.6 GB to download)"
else
    echo "installing pyarrow into $venv (50 MB to download)"
fi
pip --no-deps -r "$requirements" || why 'pip could not get the packages (is there a network?)'
if [ "$purpose" = test ]; then
    "$venv/bin/python" "$here/torch_stand_ins.py" >>"$log" 2>&1 ||
        why "the stand-ins for NVIDIA's libraries can't be built"
    works 'import torch; a = torch.eye(3); assert float((a @ a).sum()) == 3
import tokenizers; from transformers import Mamba2ForCausalLM' || why 'torch and transformers do not load'
else
    works 'import pyarrow.parquet' || why 'pyarrow does not load'
fi
echo "$state" >"$venv/state"
echo "$venv/bin/python"
