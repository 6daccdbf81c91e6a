#!/bin/sh
# test_configs.sh: every config of configs/ is one that riverrun understands: it plans, holds the number of parameters
# and names the path that its first comment says; and the papers' recipes have the papers' numbers.
set -u
. "$(dirname "$0")/support.sh"
cd "$(dirname "$0")/.." || exit 1

# planned FILE: what plan says of it, in $WORK/plan.json. A config that leaves the vocabulary to the tokenizer gets that
# of bytes; a generated task brings its own.
planned() {
    vocab=''
    grep -Eq '^vocab_size = *[1-9]|^\[task\.' "$1" || vocab=model.vocab_size=257
    # shellcheck disable=SC2086
    "$RIVERRUN" plan "$1" $vocab --json > "$WORK/plan.json" 2> "$WORK/err" || fail "$1: $(cat "$WORK/err")"
}
# planned_number KEY: of the plan's outer object; the inner ones count memory.
planned_number() { sed -e 's/:{[^}]*}/:0/g' -e 's/.*"'"$1"'":\([0-9.e+]*\).*/\1/' "$WORK/plan.json"; }
# given FILE KEY: the value in the config.
given() { sed -n "s/^$2 = \([^ ;]*\).*/\1/p" "$1"; }

count=0
for config in $(find configs -name '*.ini' | sort); do
    count=$((count + 1))
    planned "$config"
    said=$(sed -n '/^#/s/.*[ :]\([0-9][0-9,]*,[0-9][0-9][0-9]\) parameters.*/\1/p' "$config" | head -n 1 | tr -d ,)
    [ -z "$said" ] || [ "$said" = "$(planned_number parameters)" ] ||
        fail "$config says $said parameters, and has $(planned_number parameters)"
    for path in $(sed -n '/^#/s/.*\(configs\/[^ ]*\.ini\).*/\1/p' "$config"); do
        [ "$path" = "$config" ] || fail "$config speaks of $path"
    done
done
[ "$count" -ge 20 ] || fail "only $count configs were found"

# recipe FILE PARAMETERS STEPS BATCH-TOKENS LR: the improved recipe of the Mamba papers.
recipe() {
    planned "$1"
    [ "$(planned_number parameters)" = "$2" ] || fail "$1: $(planned_number parameters) parameters, not $2"
    [ "$(planned_number steps)" = "$3" ] || fail "$1: $(planned_number steps) steps, not $3"
    [ "$(($(given "$1" batch) * $(given "$1" seq_len)))" = "$4" ] || fail "$1: a batch is not $4 tokens"
    [ "$(given "$1" lr)" = "$5" ] || fail "$1: lr is $(given "$1" lr), not $5"
    [ "$(given "$1" warmup)" = "$(($3 / 10))" ] || fail "$1: warm-up is not a tenth of $3 steps"
    for pair in kind=cosine min_lr=1e-5 beta1=0.9 beta2=0.95 weight_decay=0.1 clip=1.0 decay_steps= decay= z_loss=; do
        [ "$(given "$1" "${pair%%=*}")" = "${pair#*=}" ] || fail "$1: not $pair"
    done
}
half=524288 whole=1048576
recipe configs/mamba/130m.ini 129135360 572205 $half 3e-3
recipe configs/mamba/370m.ini 371516416 572205 $half 1.5e-3
recipe configs/mamba/790m.ini 793204224 572205 $half 1.25e-3
recipe configs/mamba/1.4b.ini 1372178432 286102 $whole 1e-3
recipe configs/mamba/2.8b.ini 2768345600 286102 $whole 4.8e-4
recipe configs/mamba2/130m.ini 128989632 572205 $half 3e-3
recipe configs/mamba2/370m.ini 368346624 572205 $half 1.5e-3
recipe configs/mamba2/780m.ini 780161280 572205 $half 1.25e-3
recipe configs/mamba2/1.3b.ini 1343757312 286102 $whole 1e-3
recipe configs/mamba2/2.7b.ini 2702599680 286102 $whole 8e-4
recipe configs/llama/124m.ini 123575040 572205 $half 3e-3
recipe configs/llama/1.3b.ini 1317341184 286102 $whole 1e-3
recipe configs/llama/350m.ini 359826432 572205 $half 1.5e-3
recipe configs/llama/760m.ini 756794880 572205 $half 1.25e-3
recipe configs/llama/2.7b.ini 2666457600 286102 $whole 4.8e-4
recipe configs/scaling/transformer-125m.ini 123562752 4800 $half 3e-3
recipe configs/scaling/transformer-350m.ini 359810048 13500 $half 1.5e-3
recipe configs/scaling/transformer-760m.ini 756770304 29000 $half 1.25e-3
recipe configs/scaling/transformer-1.3b.ini 1317308416 50000 $half 1e-3
recipe configs/hybrid/mamba2-350m-attention.ini 353895872 13500 $half 1.5e-3
recipe configs/hybrid/mamba2-2.7b-attention.ini 2697245280 286102 $whole 8e-4
recipe configs/hybrid/jamba.ini 862358016 29000 $half 1.25e-3
recipe configs/hybrid/samba.ini 822498816 29000 $half 1.25e-3
recipe configs/hybrid/griffin.ini 368215040 13500 $half 1.5e-3
recipe configs/hybrid/apriel-h1.ini 736535552 29000 $half 1.25e-3
recipe configs/scaling/mamba-125m.ini 129123072 4800 $half 3e-3
recipe configs/scaling/mamba-350m.ini 371500032 13500 $half 1.5e-3
recipe configs/scaling/mamba-760m.ini 793179648 29000 $half 1.25e-3
recipe configs/scaling/mamba-1.3b.ini 1372145664 50000 $half 1e-3
recipe configs/scaling/mamba2-125m.ini 128977344 4800 $half 3e-3
recipe configs/scaling/mamba2-350m.ini 368330240 13500 $half 1.5e-3
recipe configs/scaling/mamba2-760m.ini 780136704 29000 $half 1.25e-3
recipe configs/scaling/mamba2-1.3b.ini 1343724544 50000 $half 1e-3
recipe configs/tables/mamba2-125m.ini 126602688 4800 $half 3e-3
recipe configs/tables/mamba2-350m.ini 362008064 13500 $half 1.5e-3
recipe configs/wikitext103/mamba.ini 129123072 27000 131072 1.5e-3
recipe configs/wikitext103/mamba2.ini 128977344 27000 131072 1.5e-3

# xlstm FILE PARAMETERS STEPS BATCH-TOKENS LR MIN_LR: the recipe of the xLSTM paper.
xlstm() {
    planned "$1"
    [ "$(planned_number parameters)" = "$2" ] || fail "$1: $(planned_number parameters) parameters, not $2"
    [ "$(planned_number steps)" = "$3" ] || fail "$1: $(planned_number steps) steps, not $3"
    [ "$(($(given "$1" batch) * $(given "$1" seq_len)))" = "$4" ] || fail "$1: a batch is not $4 tokens"
    for pair in lr="$5" min_lr="$6" warmup=750 kind=cosine beta1=0.9 beta2=0.95 eps=1e-5 weight_decay=0.1 decay=head \
        norm=layer init=small tie_embeddings=false; do
        [ "$(given "$1" "${pair%%=*}")" = "${pair#*=}" ] || fail "$1: not $pair"
    done
}
xlstm configs/xlstm/125m-1-0.ini 163806144 600000 $half 1.5e-3 1.5e-4
xlstm configs/xlstm/125m-7-1.ini 163690928 600000 $half 1.5e-3 1.5e-4
xlstm configs/xlstm/350m-1-0.ini 409290112 600000 $half 7.5e-4 7.5e-5
xlstm configs/xlstm/350m-7-1.ini 408436048 600000 $half 7.5e-4 7.5e-5
xlstm configs/xlstm/760m-1-0.ini 840427392 600000 $half 6.25e-4 6.25e-5
xlstm configs/xlstm/760m-7-1.ini 839736144 600000 $half 6.25e-4 6.25e-5
xlstm configs/xlstm/1.3b-1-0.ini 1422559616 300000 $whole 5e-4 5e-5
xlstm configs/xlstm/1.3b-7-1.ini 1420065104 300000 $whole 5e-4 5e-5
xlstm configs/xlstm/2.7b-1-0.ini 2788396032 28170 $half 8e-4 8e-5

# The same paper's Llama: no recurrence, and learning rates of its own.
llama() {
    planned "$1"
    [ "$(planned_number parameters)" = "$2" ] || fail "$1: $(planned_number parameters) parameters, not $2"
    [ "$(given "$1" lr) $(given "$1" min_lr)" = "$3 $4" ] || fail "$1: lr is $(given "$1" lr), not $3"
}
llama configs/llama/xlstm-125m.ini 162220800 3e-3 3e-4
llama configs/llama/xlstm-350m.ini 406635520 1.5e-3 1.5e-4
llama configs/llama/xlstm-760m.ini 834086400 1.25e-3 1.25e-4
llama configs/llama/xlstm-1.3b.ini 1420396544 1e-3 1e-4
llama configs/llama/fla-340m.ini 373867520 3e-4 3e-5
llama configs/llama/fla-1b.ini 1364297728 3e-4 3e-5

# rat FILE PARAMETERS STEPS LR: the rules of RAT's code, which decays everything and warms up over a twentieth.
rat() {
    planned "$1"
    [ "$(planned_number parameters)" = "$2" ] || fail "$1: $(planned_number parameters) parameters, not $2"
    [ "$(planned_number steps)" = "$3" ] || fail "$1: $(planned_number steps) steps, not $3"
    for pair in lr="$4" min_lr=1e-6 warmup="$(($3 / 20))" kind=cosine beta1=0.9 beta2=0.95 weight_decay=0.1 decay=all \
        clip=1.0 seq_len=4096 shuffle=false reset=false init=normal norm_eps=1e-6 vocab_size=32000 mlp=gelu; do
        [ "$(given "$1" "${pair%%=*}" | head -n 1)" = "${pair#*=}" ] || fail "$1: not $pair"
    done
}
for model in 16=1298810880 64=1298810880 16-local=1286203392 attention=1273595904 attention-local=1273595904 \
    rnn=1298810880; do
    rat configs/rat/1.3b-${model%=*}.ini "${model#*=}" 52452 8e-4
    [ "$(given configs/rat/1.3b-${model%=*}.ini batch)" = 512 ] || fail "rat $model: not 512 sequences"
done
for model in 16=186946560 64=186946560 16-local=185367552 attention=183788544; do
    rat configs/rat/185m-${model%=*}.ini "${model#*=}" 14000 1e-3
done

# pararnn FILE PARAMETERS STEPS BATCH-TOKENS LR WEIGHT-DECAY Z-LOSS: the recipe of the ParaRNN paper, its four
# architectures alike. The parameters are those of its table 3, to the digits that are printed.
pararnn() {
    planned "$1"
    [ "$(planned_number parameters)" = "$2" ] || fail "$1: $(planned_number parameters) parameters, not $2"
    [ "$(planned_number steps)" = "$3" ] || fail "$1: $(planned_number steps) steps, not $3"
    [ "$(($(given "$1" batch) * $(given "$1" seq_len)))" = "$4" ] || fail "$1: a batch is not $4 tokens"
    for pair in lr="$5" weight_decay="$6" z_loss="$7" warmup="$(($3 / 10))" kind=cosine min_lr=0 beta1=0.9 beta2=0.95 \
        eps=1e-8 clip=1.0 decay=all decay_mode=detached tie_embeddings=false; do
        [ "$(given "$1" "${pair%%=*}")" = "${pair#*=}" ] || fail "$1: not $pair"
    done
}
pararnn configs/pararnn/gru-400m.ini 405644288 20000 $half 5e-3 1e-3 1e-4
pararnn configs/pararnn/gru-1b.ini 1415268352 55000 $half 3e-3 1e-4 1e-4
pararnn configs/pararnn/gru-2.9b.ini 2901854720 55000 $whole 2e-3 1e-4 1e-4
pararnn configs/pararnn/gru-7b.ini 6756896768 33000 4194304 3e-3 1e-4 5e-6
pararnn configs/pararnn/lstm-400m.ini 405693440 20000 $half 3e-3 1e-3 1e-4
pararnn configs/pararnn/lstm-1b.ini 1415366656 55000 $half 3e-3 1e-4 1e-4
pararnn configs/pararnn/lstm-2.9b.ini 2902018560 55000 $whole 2e-3 1e-4 1e-4
pararnn configs/pararnn/lstm-7b.ini 6757158912 33000 4194304 3e-3 1e-4 5e-6
pararnn configs/pararnn/transformer-400m.ini 411622400 20000 $half 3e-3 1e-3 1e-4
pararnn configs/pararnn/transformer-1b.ini 1439801344 55000 $half 2e-3 1e-4 1e-4
pararnn configs/pararnn/transformer-2.9b.ini 2795937280 55000 $whole 3e-3 1e-4 1e-4
pararnn configs/pararnn/transformer-7b.ini 6889418752 33000 4194304 3e-3 1e-4 5e-6
pararnn configs/pararnn/mamba2-400m.ini 409072640 20000 $half 5e-3 1e-3 1e-4
pararnn configs/pararnn/mamba2-1b.ini 1425263104 55000 $half 5e-3 1e-4 1e-4
pararnn configs/pararnn/mamba2-2.9b.ini 2832074240 55000 $whole 3e-3 1e-4 1e-4
pararnn configs/pararnn/mamba2-7b.ini 6959771648 33000 4194304 3e-3 1e-4 5e-6

# What the comments offer as variants plans too.
"$RIVERRUN" plan configs/xlstm/350m-7-1.ini train.steps=28170 optimizer.lr=1e-3 schedule.min_lr=1e-4 \
    schedule.decay_steps=29250 > /dev/null 2> "$WORK/err" || fail "350m-7-1: $(cat "$WORK/err")"
for more in 'data.seq_len=8192 train.batch=64 train.micro_batch=1' 'optimizer.lr=3e-4 optimizer.beta2=0.999' \
    block.m.dt_rank=1 block.m.d_state=8; do
    # shellcheck disable=SC2086
    "$RIVERRUN" plan configs/scaling/mamba-350m.ini $more > /dev/null 2> "$WORK/err" || fail "$more: $(cat "$WORK/err")"
done

# Hybrids made small train, go on, are evaluated and generate.
make_data
tiny() { # tiny NAME OPTION...
    name=$1
    shift
    for steps in 1 2; do
        "$RIVERRUN" train "configs/$name.ini" "$@" model.d_model=32 model.vocab_size=257 data.train="$WORK/train" \
            data.seq_len=48 train.out="$WORK/tiny" train.steps=$steps train.batch=2 train.micro_batch=2 \
            schedule.warmup=0 > "$WORK/out" 2> "$WORK/err" || fail "$name, made small: $(tail -n 1 "$WORK/err")"
    done
    "$RIVERRUN" eval "$WORK/tiny" --data "$WORK/valid" --tokens 40 --mode carry > "$WORK/out" 2> "$WORK/err" &&
        "$RIVERRUN" generate "$WORK/tiny" --prompt 'the ' --tokens 3 --ignore-eod > "$WORK/out" 2>> "$WORK/err" ||
        fail "$name, made small: $(tail -n 1 "$WORK/err")"
    rm -rf "$WORK/tiny"
}
tiny hybrid/jamba 'model.pattern=m*4 a m*3' block.a.heads=4 block.a.kv_heads=2
tiny hybrid/samba 'model.pattern=(m a)*2' block.a.heads=2 block.a.window=20 block.a.context=20
tiny hybrid/griffin 'model.pattern=(r r a)*2' block.r.heads=2 block.a.heads=2 block.a.window=20 block.a.context=20
tiny hybrid/mamba2-350m-attention 'model.pattern=m*2 a m' block.m.head_dim=8 block.m.d_state=8 block.a.heads=2
tiny hybrid/apriel-h1 'model.pattern=t*3 m t m*4' block.t.heads=4 block.t.kv_heads=1
tiny rat/1.3b-16-local 'model.pattern=(r l)*2' block.r.heads=4 block.r.mlp_width=64 block.l.heads=4 block.l.window=20 \
    block.l.mlp_width=64

# The other papers' optimizers and schedules, on a model that is here: what docs/recipes.md writes out is understood.
awk '/^```ini/ { inside = 1; name = ++found; next } /^```/ { inside = 0 } inside { print > (dir "/doc" name ".ini") }' \
    dir="$WORK" docs/recipes.md
[ -e "$WORK/doc4.ini" ] || fail "docs/recipes.md has fewer than 4 recipes written out"
for recipe in "$WORK"/doc*.ini; do
    { sed -n '/^\[model\]/,/^\[data\]/p' configs/mamba2/130m.ini | sed '$d'; cat "$recipe"; } > "$WORK/whole.ini"
    "$RIVERRUN" plan "$WORK/whole.ini" > /dev/null 2> "$WORK/err" || fail "$recipe: $(cat "$WORK/err") $(cat "$recipe")"
done
finish
