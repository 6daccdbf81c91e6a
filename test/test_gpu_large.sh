#!/bin/sh
# test_gpu_large.sh: operations on tensors of more than 2^31 elements, on a GPU: a slice at the far end of each result
# against the double CPU table (riverrun bench ops --check). An offset that was cut to 32 bits shows there. Needs 56 GB
# of device memory for the largest; what does not fit is left out, and said.
set -u
. "$(dirname "$0")/support.sh"
need_gpu
OMP_NUM_THREADS=$(nproc)
OMP_WAIT_POLICY=active
export OMP_NUM_THREADS OMP_WAIT_POLICY
free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits 2>/dev/null | head -n 1)
[ -n "$free" ] || skip "nvidia-smi does not tell how much memory the GPU has left"
[ "$free" -ge 12000 ] || skip "the GPU has $free MiB of free memory, tensors of 2^31 elements need 12000"

# large MIB OPERATION SHAPE [PRECISION]: some tensor of the operation has more than 2^31 elements and is not the last.
large() {
    if [ "$free" -lt "$1" ]; then
        echo "left out for want of memory ($1 MiB): $2 $3"
        return
    fi
    "$RIVERRUN" bench ops --check --device cuda --precision "${4:-bf16}" --shape "$3" "$2" > "$WORK/out" \
        2> "$WORK/err" ||
        fail "$2 $3: $(cat "$WORK/out" "$WORK/err")"
    head -n 1 "$WORK/out"
}
large 19000 conv/width "B=17 T=32768 C=4096"
large 20000 glu "R=1100000 F=1024"
large 26000 gated_rmsnorm/1.34B "R=1100000 I=2048"
large 56000 add_norm/1.34B "R=1100000 D=2048"
large 22000 embedding "R=1500000 D=1536 V=1000"
large 14000 convert "n=2200000000"
large 40000 adamw "n=2200000000" fp32
large 48000 scan/width "B=9 T=65536 D=4096"
large 45000 ssd/width "B=9 T=65536 H=64"
large 11000 head_loss "R=65536 D=256 V=50304"
large 40000 attention "B=11 T=8192 H=192 P=128"
large 24000 rope "B=8 T=65536 H=33 P=128"
large 21000 head_norm "R=2200000 I=1024 H=4 z=1 a=3"
large 21000 slstm "B=36 T=8192 H=8 P=256"
large 60000 mlstm/255M "B=2 T=8192 H=256 K=256 V=512 d=1"
large 23000 linear/x_proj "R=1100000 I=2048 O=2048"
finish
