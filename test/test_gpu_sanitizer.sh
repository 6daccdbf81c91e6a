#!/bin/sh
# test_gpu_sanitizer.sh: compute-sanitizer over operations on a GPU: memcheck (addresses outside of what was allocated,
# misaligned ones) and racecheck (shared memory that one thread writes and another uses without a barrier between), in
# fp32 and bf16. A case or two of each row: ragged lengths, strided views, several chunks and blocks, documents.
# SANITIZE="memcheck racecheck initcheck synccheck" in the environment: these tools. Every tool runs several programs at
# once, since most of its time goes to the host.
set -u
. "$(dirname "$0")/support.sh"
need_gpu
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
    skip "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
OPS=${BUILD:-build}/test/ops
[ -x "$OPS" ] || skip "$OPS is not built"

# rows PART: cases of the operations, in parts that take about equally long.
rows() {
    case $1 in
    mamba) cat <<'ROWS' ;;
embedding R=33 D=40
add_norm R=17 D=130
linear R=33 I=40 O=24
conv B=2 T=67 C=40 doc=4 strided=1
conv_step C=33
scan B=2 T=70 D=33 N=16 doc=4 strided=1
scan B=1 T=200 D=40 N=16
scan_step D=33 N=16
glu R=17 F=40 act=0,1
head_loss R=33 D=24 V=101
convert n=1001
sum_squares n=100001
adamw n=1001
ROWS
    mamba2) cat <<'ROWS' ;;
ssd_dt T=67 H=5
ssd B=2 T=70 H=3 P=20 N=24 Q=16 doc=4 strided=1
ssd B=1 T=130 H=2 P=64 N=128 Q=64
ssd_step P=20 N=24
gated_rmsnorm R=17 n=130 groups=2 strided=1
ROWS
    attention) cat <<'ROWS' ;;
rope T=7 P=16,64 norm=0,1 doc=4 strided=2
attention B=1 T=70 H=2 G=1 P=6,40 doc=4 strided=2
attention B=1 T=130 H=2 G=1 P=128 doc=4 initial=90 C=70 window=66 strided=2
attention_step P=80 C=300 initial=3000
ROWS
    rat) cat <<'ROWS' ;;
rat T=33 H=4 G=2 Q=3 doc=4 strided=1
rat B=2 T=40 H=2 P=40 Q=5 initial=13 final=1 C=3
rat B=1 T=150 H=4 G=2 P=64 Q=2 doc=0,4 strided=2
rat B=2 T=40 H=2 P=128 Q=2 initial=300 final=1 C=70 strided=2
ROWS
    mlstm) cat <<'ROWS' ;;
head_norm R=17 H=2 P=67,192 strided=1
block_linear R=17 G=33 strided=1
block_linear R=17 G=2 I=24 O=16
mlstm B=1 T=70 H=2 K=33 V=40 Q=64 doc=4 strided=1
mlstm_step B=3 H=4 K=64 V=96 rule=0,2,4 strided=1
softcap R=257 N=8,33 strided=1
ROWS
    mlstm_wide) echo 'mlstm B=1 T=70 H=1 K=256 V=264 Q=64 doc=4 strided=2' ;;
    slstm) cat <<'ROWS' ;;
slstm B=9 T=5 H=2 P=24,192 doc=4 strided=2
slstm T=7 P=5 doc=2 initial=1 final=1 clip=3
slstm_step B=9 P=67 strided=1
ROWS
    cell) cat <<'ROWS' ;;
cell cell=0,1,2 method=0,1,2 Q=3 T=17 P=5,40 doc=4
cell cell=1 B=1 T=300 P=32 method=2 K=1 Q=140 doc=2
cell_step P=67 strided=1
ROWS
    esac
}
PARTS="mamba mamba2 attention rat mlstm mlstm_wide slstm cell"

# check TOOL PRECISION PART: says what came of it; a file of that name where it failed.
check() {
    out=$WORK/$1-$2-$3
    rows "$3" > "$out.rows"
    begun=$(date +%s) what="$1, $2, $3" tool=$1 precision=$2
    set --
    while read -r row; do set -- "$@" "$row"; done < "$out.rows"
    "$sanitizer" --tool "$tool" --error-exitcode 9 --launch-timeout 60 "$OPS" test --device cuda \
        --precision "$precision" "$@" > "$out" 2>&1
    code=$?
    if [ $code = 0 ] && summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out"); then
        echo "$what: $(awk '/^ok/ { n += $3 } END { print n + 0 }' "$out") cases, $(($(date +%s) - begun)) s $summary"
    else
        echo "$what: exit code $code: $(grep -v '^ok' "$out" | head -n 40)"
        touch "$out.failed"
    fi
}

OMP_NUM_THREADS=1 # the reference's: the cases are small
for tool in ${SANITIZE:-memcheck racecheck}; do
    for precision in fp32 bf16; do
        for part in $PARTS; do
            check "$tool" "$precision" "$part" &
            STARTED="$STARTED $!"
        done
        wait
    done
done
for failed in "$WORK"/*.failed; do
    [ -e "$failed" ] && fail "$(basename "$failed" .failed)"
done
finish
