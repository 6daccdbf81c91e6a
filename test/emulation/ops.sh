#!/bin/sh
# ops.sh PROGRAM PRECISION: cases of every operation that an emulated GPU gets through in a minute. Each way a kernel
# has through its data is walked: single and several blocks, ragged edges, several chunks, groups of states and heads.
# In fp32 on a chip with little shared memory: every kernel has to do with that.
set -e
[ "$2" = fp32 ] && chip=86 || chip=80
RIVERRUN_EMULATE_CHIP=$chip "$1" test --device cuda --precision "$2" \
    'embedding R=1,17 D=7,16 V=1,5' 'embedding R=311 D=257 V=13,257' 'embedding R=4500 D=4 V=513 hot=2' \
    'add_norm R=2,17 D=7,16 layer=0,1 branch=0,1 dnext=0,1' 'add_norm R=37 D=257,768,2560 layer=0,1 branch=1' \
    'add_norm R=5 D=1,2 eps=1000000' 'add_norm R=5 D=2 layer=1 eps=1000000' \
    'add_norm R=5 D=13 branch=1 dbranch=0,1 dnext=0,1 inplace=0,1' 'add_norm R=1700 D=67 layer=0,1' \
    'scaled_norm R=17 D=7,16 layer=0,1 branch=0,1' 'scaled_norm R=37 D=257,2560' 'scaled_norm R=1700 D=67' \
    'linear R=1,17 I=7,16 O=5 bias=0,1 strided=0,1' 'linear R=131 I=257 O=67 bias=1 add=1 dw=1,2' \
    'linear R=17 I=64 O=1,8 bias=0,1 real=1 strided=0,1' \
    'gated_rmsnorm R=2,17 n=7,16 groups=1,4 eps=300000 strided=0,1' 'gated_rmsnorm R=37 n=67,768,2568 groups=1,2' \
    'gated_rmsnorm R=37 n=67,2568 strided=1 again=1,2' 'gated_rmsnorm R=1700 n=67' \
    'gated_rmsnorm R=17 n=7,16 groups=4 eps=300000 first=1' 'gated_rmsnorm R=37 n=67,2568 strided=1 again=1 first=1' \
    'glu R=17 F=7,40 gated=0,1 act=0,1,2,3' \
    'head_norm R=2,17 H=1,3 P=7,16 skip=0,1 gate=0,1 sigmoid=0,1 eps=300000' \
    'head_norm R=5 H=2 P=67,192,384 strided=0,1,2' \
    'head_norm R=5 H=2 P=1280 skip=0,1 sigmoid=1' 'head_norm R=3 H=1 P=4104' 'head_norm R=400 H=2 P=64' \
    'block_linear R=1,17 G=1,3 I=1,4,5 O=4,3 strided=0,1' 'block_linear R=5 G=2 I=4,12 O=4,9 add=0,1 strided=0,2' \
    'block_linear R=700 G=33 add=1' 'block_linear R=0 G=2 I=4,12' \
    convert sum_squares step_scalars worst_reports 'adamw n=0,1,257 segments=1,7 skip=0,1' 'adamw n=40009' \
    'head_loss R=1,17 D=7 V=1,11 mask=0,1 zloss=30' 'head_loss R=9 D=8 V=13 losses=0,1 dx=0,1 dw=0,1 mask=2' \
    'head_loss R=67 D=33 V=257 zloss=1 dw=1,2' 'head_loss R=3 D=8 V=4104' 'head_loss R=5 D=7 V=13 zloss=30 cap=4' \
    'conv T=1,3,17,97 C=3 W=2,4,8 doc=0,4' 'conv T=17 C=5 doc=4 initial=0,1,2 final=0,1,2 strided=0,1' \
    'conv T=7,300 C=64,65,200 doc=4' 'conv T=7,40 C=64 W=2,8 doc=0,4' 'conv_step C=1,7,130 W=2,4,8' \
    'conv T=17,97 C=3,64 W=2,4 doc=0,4 silu=0' 'conv B=180 T=300 C=1 doc=4' 'conv_step C=7 silu=0' \
    'ssd_dt T=1,7,97 H=1,8 min=100 max=900 spread=1,30 strided=0,1' \
    'ssd T=1,7,97 G=1,2 Q=16 doc=0,4' 'ssd T=17 H=4 P=5 G=2 N=7 Q=16 doc=2 initial=0,1,2 final=0,2' \
    'ssd T=17 Q=16 doc=2 initial=1 final=1 d=0,1 strided=1' 'ssd B=1 T=130 H=4 P=64 G=4 N=33 Q=64 doc=4 strided=1' \
    'ssd B=1 T=65,128 H=6 P=8 N=16 Q=64 doc=5 strided=0,2' 'ssd B=1 T=70 H=14 P=24 G=7 N=100 Q=64 doc=4' \
    'ssd B=1 T=257 H=2 P=8 N=24 Q=64 doc=1 extreme=1' 'ssd B=1 T=97 H=2 P=64 N=128 Q=16 doc=4 extreme=1 strided=2' \
    'ssd_step B=1,3 H=4 P=5,64 N=7,64 d=0,1 strided=0,1' \
    'scan T=1,7,33,97 D=1,33 doc=0,4' 'scan T=33 D=5 N=3 doc=2 initial=0,1,2 final=0,2 d=0,1 z=0,1' \
    'scan T=40 D=31,65 N=1,16 doc=4 strided=0,1' 'scan T=40 D=40 N=256 doc=4 strided=1' \
    'scan B=1 T=130 D=200 N=16 doc=4 spread=30 strided=1' 'scan_step B=3 D=1,130 N=7,16 d=0,1 z=0,1 strided=1' \
    'rope T=7 H=3 P=6,16 norm=0,1 doc=4 initial=100000 strided=1' 'rope T=7 H=5 P=64 norm=0,1 doc=4 strided=2' \
    'rope T=7 in_place=1 doc=4 strided=2' 'attention_store T=1,19 C=1,8 doc=4 initial=3,13 strided=1' \
    'attention_step G=1,2 P=2,8 C=8 initial=2,29 window=0,3 tiled=1 strided=1' \
    'attention_step B=1 H=2 G=1 P=80 C=300 initial=3000 window=260 strided=2' 'attention T=7,33 H=4 G=2 P=4 doc=4' \
    'attention B=1 T=33 H=2 G=1 P=16,40 window=0,20 doc=4 strided=2' \
    'attention B=1 T=70 H=2 G=1 P=8 doc=4 initial=13 C=60 window=0,30 strided=2' \
    'attention B=1 T=130 H=2 G=1 P=72 strided=2' \
    'mlstm B=1 T=17 H=1 K=8 V=7 Q=16 rule=0,1,2,4 doc=2' 'mlstm B=1 T=130 H=2 K=33 V=96 Q=64 doc=4 strided=1' \
    'mlstm B=1 T=520 H=1 K=8 V=24 Q=64 f=6 doc=1' 'mlstm B=1 T=70 H=1 K=136 V=136 Q=64 doc=4 initial=0 final=0' \
    'mlstm_step B=1,3 H=2 K=5,64 V=7,96 rule=0,2,4 strided=0,1' \
    'rat T=7,33 H=4 G=2 Q=1,3 doc=4' 'rat T=12 H=2 G=1 P=6 Q=2,64 doc=2 final=1 C=32 strided=1' \
    'rat B=3 T=9 H=2 Q=2,5 doc=2 initial=13 final=0,1 C=3,32' 'rat_step H=4 G=2 Q=1,3 strided=1' \
    'rat B=1 T=150 H=4 G=2 P=64 Q=2 doc=4 strided=2' 'rat B=1 T=70 H=2 G=1 P=128 Q=16 doc=0,4 strided=2' \
    'rat B=2 T=40 H=2 P=72 Q=2 initial=300 final=1 C=70 doc=0,3 strided=2' 'rat_step H=2 P=64 Q=16 C=20 strided=2' \
    'rat B=1 T=270 H=1 G=1 P=8 Q=70,260 doc=0,3 initial=0,90 C=4 strided=2' \
    'cell cell=0,1,2 method=0,1,2 Q=3 T=17 P=5,40 doc=4' \
    'cell cell=0,1 method=2 Q=9 T=130 H=3 P=24 doc=4 K=1 strided=1,2' \
    'cell cell=1 B=1 T=300 H=1 P=32 method=0,2 K=1 Q=140 doc=2' \
    'cell cell=0,1 method=1,2 T=33 K=1 Q=4 limit=14 report=1 doc=4' \
    'cell cell=1 B=1 T=28000 H=1 P=1 method=2 K=1 doc=4' 'cell_step cell=0,1,2 P=5,67 strided=0,1' \
    'slstm T=1,7 P=5,16 doc=0,2 clip=3' 'slstm B=9 T=3 H=3 P=40 doc=4 strided=1' \
    'slstm_step B=3,9 P=5,67 strided=0,1'
[ "$2" = bf16 ] || exit 0
# The same chip: what takes less shared memory there than it would have.
RIVERRUN_EMULATE_CHIP=86 "$1" test --device cuda --precision "$2" \
    'head_loss R=5 D=7 V=13 zloss=30 cap=4' 'add_norm R=5 D=5120 branch=1' 'scan B=1 T=70 D=66 N=16 doc=4 strided=0' \
    'ssd B=1 T=70 H=6 P=8 N=16 Q=64 doc=5 strided=0,2' 'attention B=1 T=70 H=2 G=1 P=72 doc=0,4 strided=2' \
    'attention B=1 T=40 H=2 G=1 P=250 doc=4' 'mlstm B=1 T=130 H=1 K=33 V=96 Q=64 doc=4 strided=1' \
    'rat B=1 T=70 H=2 G=1 P=128 Q=2 doc=4 strided=2' 'rat B=1 T=40 H=2 G=1 P=200 Q=4 doc=4' \
    'slstm T=3 P=16 doc=2 clip=3'
# A newer chip, which only bf16 uses: clusters of one to sixteen blocks, full and ragged, and products of warpgroups.
RIVERRUN_EMULATE_CHIP=90 "$1" test --device cuda --precision "$2" \
    'slstm T=1,7 P=8,16 doc=2 initial=0,1 final=0,1,2 clip=3' 'slstm B=9 T=5 P=24,64 doc=4 strided=0,2' \
    'slstm B=1 T=5 H=1 P=136,192 doc=4 strided=2' 'slstm B=1 T=3 H=1 P=200,264,400 doc=0' \
    'attention B=1 T=33 H=2 G=1 P=16,40 window=0,20 doc=4 strided=2' \
    'attention B=1 T=130 H=2 G=1 P=64,128 doc=0,4 strided=2' \
    'ssd B=1 T=97 H=2 P=64 N=128 Q=16 doc=4 extreme=1 strided=2' 'ssd B=1 T=65,128 H=6 P=8 N=16 Q=64 doc=5 strided=2' \
    'ssd B=1 T=300 H=2 P=24 N=72 Q=64 doc=4 strided=2' 'ssd B=1 T=70 H=14 P=8 N=16 Q=64 doc=4 strided=2' \
    'attention B=1 T=300 H=2 G=1 P=64 doc=5 strided=2' 'attention B=1 T=300 H=2 G=1 P=128 window=100 doc=5 strided=2'
