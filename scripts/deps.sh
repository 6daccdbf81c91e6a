#!/bin/sh
# deps.sh: installs the Debian packages riverrun needs, where they are missing.
#
#   sh scripts/deps.sh build     what `make` needs (scripts/quickstart.sh calls this)
#   sh scripts/deps.sh test      that and what `make test` needs (scripts/test.sh and `make deps` call this)
#
# It looks first for the parts themselves, not for packages: where all are there, apt is not called, so a machine
# without a network or with another package manager works. A missing required part is an error, a missing optional part
# a warning.
set -u
level=${1:-build}
case $level in
build | test) ;;
*)
    echo "deps: '$level' is not a set of packages, it must be build or test" >&2
    exit 2
    ;;
esac

if [ -z "${CC:-}" ]; then
    CC=cc
    command -v cc >/dev/null 2>&1 || CC=gcc
fi

# header NAME...: can the compiler include them, in this order?
header() {
    command -v "$CC" >/dev/null 2>&1 || return 1
    for name in "$@"; do echo "#include <$name>"; done | "$CC" -x c -E - >/dev/null 2>&1
}
has() { command -v "$1" >/dev/null 2>&1; }
has_openblas() {
    [ -d "/usr/lib/$("$CC" -print-multiarch 2>/dev/null)/openblas-openmp" ] || header openblas_config.h cblas.h
}
has_mpi() { has mpicc && has mpirun; }
has_venv() { has python3 && python3 -c 'import ensurepip, venv' >/dev/null 2>&1; }
has_fuzzer() {
    has clang && ls "$(clang -print-resource-dir 2>/dev/null)"/lib/*/libclang_rt.fuzzer*.a >/dev/null 2>&1
}

# need LEVEL KIND PACKAGES WHAT IS LOST -- TEST...: note the packages as missing unless the test succeeds.
required='' optional='' lost=''
need() {
    of=$1 kind=$2 packages=$3 without=$4
    shift 5
    [ "$of" = test ] && [ "$level" = build ] && return 0
    "$@" && return 0
    if [ "$kind" = required ]; then
        required="$required $packages"
    else
        optional="$optional $packages"
        lost="${lost}deps: without $packages: $without
"
    fi
}

survey() {
    required='' optional='' lost=''
    need build required make '' -- has make
    need build required 'gcc libc6-dev' '' -- header stdio.h
    need build required libzstd-dev '' -- header zstd.h
    need build required libxxhash-dev '' -- header xxhash.h
    need build required libjansson-dev '' -- header jansson.h
    need build required libinih-dev '' -- header ini.h
    need build required zlib1g-dev '' -- header zlib.h
    need build required libutf8proc-dev '' -- header utf8proc.h
    need build optional libopenblas-openmp-dev 'matrix products run in slower loops' -- has_openblas
    need build optional 'openmpi-bin libopenmpi-dev' 'one process only' -- has_mpi
    need test required libcmocka-dev '' -- header stddef.h stdarg.h setjmp.h stdint.h cmocka.h
    need test optional g++ 'CUDA kernels are not tested on an emulated GPU' -- has g++
    need test optional 'python3 python3-venv' 'the tests in Python are skipped, transformers among them' -- has_venv
    need test optional zstd 'another reader of the token shards, and what it compares, is left out' -- has zstd
    need test optional 'clang libclang-rt-dev' 'the fuzzers are skipped' -- has_fuzzer
}

# The words before apt-get that make it run as root; fails if there is no way.
become_root() {
    if [ "$(id -u)" = 0 ]; then
        root=''
    elif has sudo && [ -t 0 ]; then
        root='sudo'
    elif has sudo; then
        root='sudo -n' # nobody is there to type a password
    else
        return 1
    fi
}

# apt_install PACKAGE...: without a network apt has a line for every archive, of which the last two say it all.
apt_install() {
    # shellcheck disable=SC2086  # the packages and the words of $root are separate arguments
    said=$($root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        --no-install-recommends install "$@" 2>&1) && return 0
    echo "$said" | tail -n 2 >&2
    return 1
}

# Not a package of Debian: the headers of cuDNN's frontend, where there is a CUDA toolkit with cuDNN's own.
cuda=${CUDA_HOME:-/usr/local/cuda}
if [ -e "$cuda/include/cudnn.h" ] && has python3; then
    sh "$(dirname "$0")/get_cudnn_frontend.sh" >/dev/null ||
        echo "deps: without cuDNN's frontend riverrun's own attention serves" >&2
fi

survey
if [ -z "$required$optional" ]; then
    echo "deps: every part is there"
    exit 0
fi

if ! has apt-get; then
    problem='there is no apt-get here'
elif ! become_root; then
    problem='installing packages needs root or sudo'
else
    problem=''
    echo "deps: installing$required$optional"
    # shellcheck disable=SC2086
    $root apt-get -qq -o DPkg::Lock::Timeout=120 update >&2 || echo "deps: apt-get update failed, trying without" >&2
    # shellcheck disable=SC2086
    if ! apt_install $required $optional; then
        # One at a time, so that an optional package that can't be had does not keep the others away.
        for package in $required $optional; do apt_install "$package"; done
    fi
    survey
fi

if [ -n "$required" ]; then
    problem=${problem:-apt-get could not install them, see above}
    echo "deps: these Debian packages are needed and missing:$required ($problem)" >&2
    exit 1
fi
printf '%s' "$lost" >&2
exit 0
