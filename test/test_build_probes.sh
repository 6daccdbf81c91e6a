#!/bin/sh
# test_build_probes.sh: what the Makefile says about the machine is what the machine has. Parts are taken away by a
# compiler that hides headers, and a CUDA toolkit with GPUs is put there by scripts that only answer questions.
set -u
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
make=${RIVERRUN_MAKE:-make}
MAKEFLAGS='' failures=0
export MAKEFLAGS
# The switches of a `make test CUDA=0` that runs this script.
unset OPENBLAS OPENMP MPI CUDA NCCL CUDNN CUDA_ARCH CUDA_HOME CUDNN_FRONTEND EMULATE SAN CPU_ARCH
real=$(command -v cc || command -v gcc)

mkdir -p "$work/bin" "$work/cuda/bin" "$work/cuda/include" "$work/cuda/lib64"
cat >"$work/bin/hiding-cc" <<END
#!/bin/sh
# A probe comes through standard input; everything else goes straight on.
case " \$* " in
*' - '*) ;;
*) exec $real "\$@" ;;
esac
output=\$($real "\$@") || exit
for header in \${HIDE:-}; do
    # The line markers name every file that was really included.
    case \$output in *"/\$header\""*) exit 1 ;; esac
done
END
cat >"$work/cuda/bin/nvcc" <<'END'
#!/bin/sh
echo 'Cuda compilation tools, release 12.4, V12.4.131'
END
cat >"$work/bin/nvidia-smi" <<'END'
#!/bin/sh
[ -n "${CAPS:-}" ] || exit 9
for cap in $CAPS; do echo "$cap"; done
END
echo '#define HERE' >"$work/cuda/include/nccl.h"
echo '#define HERE' >"$work/cuda/include/cudnn.h"
mkdir -p "$work/frontend" && : >"$work/frontend/cudnn_frontend.h"
chmod +x "$work/bin/hiding-cc" "$work/bin/nvidia-smi" "$work/cuda/bin/nvcc"
PATH=$work/bin:$PATH
export PATH

# report WORDS...: what `make report` says, in $out, its exit code in $code.
report() {
    out=$("$make" --no-print-directory report BUILD="$work/build" CC=hiding-cc "$@" 2>&1)
    code=$?
}
# expect WHAT PATTERN: a line of the report must match.
expect() {
    printf '%s\n' "$out" | grep -Eq -- "$2" && return 0
    echo "$1: no line matches '$2' in"
    printf '%s\n' "$out"
    failures=$((failures + 1))
}

HIDE='' CAPS=''
export HIDE CAPS
report CUDA=0
expect 'everything there' '^  libraries .*zstd .*xxhash .*jansson .*inih .*zlib .*utf8proc '
expect 'the compiler' '^  compiler .*-march=native'
expect 'CUDA=0' '^  CUDA +left out by CUDA=0'
report CUDA=0 OPENBLAS=0 OPENMP=0 MPI=0
for part in OpenBLAS:OPENBLAS OpenMP:OPENMP MPI:MPI; do
    expect "${part#*:}=0" "^  ${part%:*} +left out by ${part#*:}=0"
done

for pair in cblas.h:OpenBLAS omp.h:OpenMP mpi.h:MPI; do
    HIDE=${pair%:*}
    report CUDA=0
    expect "without $HIDE" "^  ${pair#*:} +not found"
    [ "$code" = 0 ] || { echo "without $HIDE: report fails" && failures=$((failures + 1)); }
done
for pair in zstd.h:libzstd-dev xxhash.h:libxxhash-dev jansson.h:libjansson-dev ini.h:libinih-dev zlib.h:zlib1g-dev \
    utf8proc.h:libutf8proc-dev; do
    HIDE=${pair%:*}
    report CUDA=0
    expect "without $HIDE" "install the Debian package.* ${pair#*:}: .make deps. does it"
    [ "$code" != 0 ] || { echo "without $HIDE: report succeeds" && failures=$((failures + 1)); }
done

HIDE=''
cuda="CUDA_HOME=$work/cuda CUDA_SOURCES=kernels/cuda/x.cu"
# shellcheck disable=SC2086  # two words
{
    report $cuda
    expect 'no GPU' '^  CUDA +12\.4 in .*, for sm_80 sm_90a and compute_80 PTX '
    expect 'NCCL' '^  NCCL +found '
    report $cuda CUDNN_FRONTEND="$work/frontend"
    expect 'cuDNN' '^  cuDNN +found '
    report $cuda CUDNN_FRONTEND="$work/nothing"
    expect 'no cuDNN' '^  cuDNN +not found: '
    report $cuda CUDNN=0
    expect 'CUDNN=0' '^  cuDNN +left out by CUDNN=0'
    CAPS='8.6 9.0 8.6'
    report $cuda
    expect 'own GPUs' '^  CUDA +12\.4 in .*, for sm_86 sm_90a +\['
    report $cuda CUDA_ARCH='sm_80,100a'
    expect 'asked for' '^  CUDA +12\.4 in .*, for sm_80 sm_100a +\['
    report $cuda NCCL=0
    expect 'NCCL=0' '^  NCCL +left out by NCCL=0'
}
report CUDA_HOME="$work/nothing"
expect 'no CUDA' '^  CUDA +not found'

# The flags file changes when a switch does, and only then: everything compiled depends on it.
report CUDA=0
state() { stat -c %Y%y%s "$work/build/flags"; }
fail() { echo "$1" && failures=$((failures + 1)); }
first=$(state)
report CUDA=0
[ "$first" = "$(state)" ] || fail 'the same switches change flags'
report CUDA=0 OPENBLAS=0
[ "$first" = "$(state)" ] && fail 'another switch leaves flags as they are'

[ "$failures" = 0 ]
