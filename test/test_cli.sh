#!/bin/sh
# test_cli.sh: the command line: help, version, docs/config.md, results on standard output, and bad input, which is
# one line that names the key and the value, exit code 2, with nothing written.
set -u
. "$(dirname "$0")/support.sh"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
make_data
make_config "$WORK/c.ini"

# refuse 'WORDS' ARGUMENT...: riverrun ARGUMENT... fails with 2 and one line that holds the words (a basic regular
# expression).
refuse() {
    words=$1
    shift
    "$RIVERRUN" "$@" > "$WORK/out" 2> "$WORK/err" < /dev/null
    code=$?
    [ "$code" = 2 ] || fail "riverrun $*: exit code $code"
    [ "$(wc -l < "$WORK/err")" = 1 ] || fail "riverrun $*: not one line: $(cat "$WORK/err")"
    grep -q -- "^riverrun: .*$words" "$WORK/err" || fail "riverrun $*: $(cat "$WORK/err") does not say '$words'"
    [ ! -s "$WORK/out" ] || fail "riverrun $*: writes to standard output: $(head -n 2 "$WORK/out")"
    [ ! -e "$WORK/run" ] || { fail "riverrun $*: made the run's directory"; rm -rf "$WORK/run"; }
}
refuse_train() {
    words=$1
    shift
    refuse "$words" train "$WORK/c.ini" train.out="$WORK/run" "$@"
}
accept() {
    "$RIVERRUN" "$@" > "$WORK/out" 2> "$WORK/err" < /dev/null || fail "riverrun $*: $(cat "$WORK/err")"
}

# ---- help and version
accept --help
for command in train eval generate tokenize shards plan bench import export; do
    grep -q "riverrun $command " "$WORK/out" || fail "--help does not name $command"
    "$RIVERRUN" $command --help > "$WORK/help" 2>&1 || fail "$command --help fails"
    grep -q "^riverrun $command" "$WORK/help" || fail "$command --help: $(head -n 1 "$WORK/help")"
    "$RIVERRUN" help $command | cmp -s - "$WORK/help" || fail "help $command is not $command --help"
done
accept train --help
for section in train ramp optimizer group.NAME schedule data source.NAME task.NAME eval checkpoint solver comm; do
    grep -qF "[$section]" "$WORK/out" || fail "train --help does not list [$section]"
done
grep -q 'half_life = 0' "$WORK/out" || fail "train --help does not list the options"
accept --version
grep -Eq '^riverrun [0-9]+\.[0-9]+\.[0-9]+ \(' "$WORK/out" || fail "--version: $(cat "$WORK/out")"
accept help config
cmp "$WORK/out" "$ROOT/docs/config.md" || fail "docs/config.md is not what 'riverrun help config' prints; write it anew"
accept --help
for word in help --help; do
    "$RIVERRUN" help $word | cmp -s - "$WORK/out" || fail "help $word is not --help"
done
"$RIVERRUN" > "$WORK/out" 2> "$WORK/err"
[ $? = 2 ] && grep -q 'riverrun train' "$WORK/err" || fail "without arguments: $(cat "$WORK/err")"

# ---- commands and flags
refuse "'trian' is no command; did you mean train?" trian
refuse "'xyzzy' is no command; riverrun --help lists them" xyzzy
refuse "'evil' is no command; did you mean eval?" help evil
refuse 'eval takes CHECKPOINT \[task.NAME.key=value ...\], but 0 arguments' eval --data x
refuse 'eval needs --data' eval x
refuse "'--dta' is no option of riverrun eval; did you mean --data?" eval x --dta y
refuse '--window 0: must be a whole number of tokens from 1' eval x --data y --window 0
refuse '--mode windw: must be one of window, carry; did you mean window?' eval x --data y --mode windw
refuse '--batch is given twice' eval x --data y --batch 1 --batch 2
refuse '--tokens needs a value' eval x --data y --tokens
refuse "'-x' is no option" eval x -x
refuse "'--steps' is no option of riverrun train; .* what a config holds is given as section.key=value" \
    train "$WORK/c.ini" --steps 5
refuse "'y' is not about a task: behind the checkpoint only task.NAME.key=value" eval x y --data z
refuse 'takes CHECKPOINT, but 2 arguments were given; one too many is y' generate x y --prompt z
refuse 'there is no prompt' generate x
refuse '--prompt and --prompt-file are both given' generate x --prompt a --prompt-file b
refuse '--temperature -1: must be a number from 0' generate x --prompt a --temperature=-1
refuse '--temperature nan: must be a number' generate x --prompt a --temperature nan
refuse '--top-p 0: must be a number' generate x --prompt a --top-p 0
refuse '--top-p 1.5: must be a number' generate x --prompt a --top-p 1.5
refuse '--top-k -3: must be a whole number' generate x --prompt a --top-k=-3
refuse '--tokens 0: must be a whole number' generate x --prompt a --tokens 0
refuse '--seed 1.5: must be a whole number' generate x --prompt a --seed 1.5
refuse 'no-such-file' generate x --prompt-file "$WORK/no-such-file"

# ---- configs
refuse 'train takes CONFIG' train
refuse 'no-such.ini' train "$WORK/no-such.ini"
refuse "'steps=3' is not an override" train "$WORK/c.ini" steps=3
refuse_train 'has no option stps; did you mean steps?' train.stps=3
refuse_train 'there is no section \[trian\]; did you mean \[train\]?' trian.steps=3
refuse_train 'has no option seq_len; it belongs to \[data\]' train.seq_len=3
refuse_train 'train.steps=-1: must be a whole number of steps from 1' train.steps=-1
refuse_train 'train.steps=many' train.steps=many
refuse_train 'optimizer.lr=inf' optimizer.lr=inf
refuse_train 'optimizer.lr=1e-3x' optimizer.lr=1e-3x
refuse_train 'schedule.kind=cosin: must be one of .* did you mean cosine?' schedule.kind=cosin
refuse_train 'schedule.warmup = 41 is longer than train.steps = 40' schedule.warmup=41
refuse_train 'schedule.min_lr = 0.01 is above the peak optimizer.lr = 0.005' schedule.min_lr=0.01
refuse_train 'train.batch = 7 is no multiple of .* train.batch = 6 or 8, or train.micro_batch = 1' train.batch=7
refuse_train 'train.micro_batch = 1 \* 4 = 4; .* train.micro_batch = 3' train.micro_batch=4
refuse_train 'data.train.*no-data' data.train="$WORK/no-data"
refuse_train 'data.valid.*no-data' data.valid="$WORK/no-data"
refuse_train 'no training data' data.train=
refuse_train 'data.train = .*source.a' source.a.path="$WORK/train"
refuse_train 'vocab_size' model.vocab_size=100
refuse_train 'model.pattern' model.pattern='m*'
refuse_train 'train.init: .*no-checkpoint' train.init="$WORK/no-checkpoint"
refuse_train 'tokens' data.seq_len=1000000
refuse_train 'head_dim' block.m.head_dim=7
# What is wrong comes before what is left over.
refuse_train "names the block x, but the config has no section \[block.x\]" model.pattern='m x'
refuse_train '\[block.s\] is not used' model.pattern=m
refuse_train 'block.m.d_state means nothing with mixer = attention, but with mamba, mamba2' block.m.mixer=attention block.m.heads=4
refuse_train 'block.r.heads = 16 makes heads 1 wide.* the nearest number that does is 8' \
    model.pattern='m s r' block.r.mixer=rat block.r.heads=16
usual=$RIVERRUN_DEVICE RIVERRUN_DEVICE=gpu
refuse_train 'RIVERRUN_DEVICE = gpu .* must be cpu, cuda or auto'
RIVERRUN_DEVICE=$usual
if ! "$RIVERRUN" --version | grep -q ' cuda'; then
    refuse_train 'precision bf16 needs a GPU.*: choose precision fp32' train.precision=bf16
    refuse_train 'device cuda is not in this build.*: choose device cpu' train.device=cuda
fi
refuse 'train.out is empty' train "$WORK/c.ini"
refuse 'train.out = .*c.ini is a file' train "$WORK/c.ini" train.out="$WORK/c.ini"
printf '[train]\nsteps = 4\nsteps = 5\n' > "$WORK/twice.ini"
refuse 'twice.ini:3: \[train\] steps is given a second time, the first is in line 2' \
    train "$WORK/twice.ini" train.out="$WORK/run"
# An unknown key is told even where the data is missing too.
refuse_train 'has no option stps' data.train="$WORK/no-data" train.stps=3

# ---- results
accept train "$WORK/c.ini" train.out="$WORK/ok" train.steps=12 schedule.warmup=0
[ "$(wc -l < "$WORK/out")" = 1 ] || fail "train writes more than its result to standard output: $(cat "$WORK/out")"
loss=$(sed -n 's|^validation loss \([0-9.]*\) nats/byte$|\1|p' "$WORK/out")
"$RIVERRUN" train "$WORK/ok/config.ini" > "$WORK/again" 2>&1 ||
    fail "the effective config is refused: $(cat "$WORK/again")"
accept eval "$WORK/ok" --data "$WORK/valid"
[ "$(wc -l < "$WORK/out")" = 1 ] || fail "eval does not print one line"
case $(sed 's/.*"loss":\([0-9.]*\).*/\1/' "$WORK/out" | awk '{ printf "%.3f", $1 }') in
"$loss") ;;
*) fail "eval gives $(cat "$WORK/out"), the trainer $loss" ;;
esac
for key in perplexity bits_per_byte accuracy tokens bytes mode window reset precision step checkpoint data; do
    grep -q "\"$key\":" "$WORK/out" || fail "eval's line has no $key: $(cat "$WORK/out")"
done
accept eval "$WORK/ok/latest" --data "$WORK/valid" --mode carry --window 13 --no-reset --precision fp64 --tokens 100
grep -q '"tokens":100,.*"mode":"carry","window":13,"reset":false,"precision":"fp64","step":12' "$WORK/out" ||
    fail "eval with options: $(cat "$WORK/out")"
accept generate "$WORK/ok" --prompt 'the ' --tokens 40 --ignore-eod --seed 3 --echo
mv "$WORK/out" "$WORK/first"
printf 'the ' > "$WORK/prompt"
"$RIVERRUN" generate "$WORK/ok" --prompt-file - --tokens 40 --ignore-eod --seed 3 --echo \
    < "$WORK/prompt" > "$WORK/out" 2>&1 ||
    fail "a prompt on standard input: $(cat "$WORK/out")"
cmp -s "$WORK/first" "$WORK/out" || fail "the prompt on standard input gives another text"
[ "$(wc -c < "$WORK/out")" -ge 30 ] || fail "40 tokens are $(wc -c < "$WORK/out") bytes"
accept generate "$WORK/ok" --prompt '' --tokens 5 --ignore-eod --temperature 0
accept train "$WORK/c.ini" train.out="$WORK/forgets" train.steps=2 schedule.warmup=0 model.pattern='m s a' \
    block.a.mixer=attention block.a.heads=4 block.a.context=8
accept generate "$WORK/forgets" --prompt 'the ' --tokens 4 --ignore-eod
grep -qa 'note:' "$WORK/out" "$WORK/err" && fail "8 tokens fit into a context of 8: $(cat "$WORK/out" "$WORK/err")"
"$RIVERRUN" generate "$WORK/forgets" --prompt 'the ' --tokens 5 > /dev/null 2> "$WORK/err" ||
    fail "generating beyond the context: $(cat "$WORK/err")"
grep -q 'note: block.a.context = 8: with 4 tokens of prompt and at most 5 behind' "$WORK/err" ||
    fail "no word on what is forgotten: $(cat "$WORK/err")"
refuse_train 'train.init: .*in_proj.weight has shape (64, 16); the model of the config needs (84, 16)' \
    train.init="$WORK/ok" model.pattern='m m s'
refuse '--tokenizer: .*c.ini:1: is not valid JSON' tokenize --out "$WORK/run" --tokenizer "$WORK/c.ini" \
    "$WORK/train.txt"
accept tokenize --out "$WORK/nothing" /dev/null
grep -q ': 1 token, 1 document, 1 shard; ' "$WORK/err" || fail "an empty input: $(cat "$WORK/err")"
refuse 'is no shard' eval "$WORK/ok" --data "$WORK/c.ini"
refuse 'no-data' eval "$WORK/ok" --data "$WORK/no-data"
refuse 'nothing-here' eval "$WORK/nothing-here" --data "$WORK/valid"
refuse 'nothing-here' generate "$WORK/nothing-here" --prompt a
# ---- bench: that it runs and what it prints; how fast it is depends on the machine
parse() { # parse KEY...: standard output is one JSON object that has the keys
    [ "$(wc -l < "$WORK/out")" = 1 ] || fail "bench prints not one line: $(cat "$WORK/out")"
    grep -q '^{"bench":"[a-z]*",.*}$' "$WORK/out" || fail "bench prints no object: $(cat "$WORK/out")"
    if command -v python3 > /dev/null; then
        python3 -m json.tool < "$WORK/out" > "$WORK/parsed" || fail "bench prints no JSON: $(cat "$WORK/out")"
    fi
    for key; do grep -q "\"$key\":" "$WORK/out" || fail "bench's line has no $key: $(cat "$WORK/out")"; done
}
accept bench train "$WORK/c.ini" model.vocab_size=40 train.steps=9 --steps 12 --warmup 1 --product 64
parse tokens_per_s flops_per_s_6n product_flops_per_s ratio loss_first loss_last
grep -q '^loss  ' "$WORK/err" || fail "bench train says no loss: $(cat "$WORK/err")"
awk -F'[:,]' '{ for (i = 1; i < NF; i++) { if ($i ~ /loss_first/) a = $(i + 1); if ($i ~ /loss_last/) b = $(i + 1) }
    exit !(a + 0 > 3 && b + 0 < a - 0.1) }' "$WORK/out" || fail "bench train does not learn: $(cat "$WORK/out")"
accept bench train "$WORK/c.ini" model.vocab_size=40 train.steps=9 --steps 1 --warmup 1 --product 64 --csv "$WORK/t.csv"
accept bench train "$WORK/c.ini" model.vocab_size=40 train.steps=9 --steps 1 --warmup 1 --product 64 --csv "$WORK/t.csv"
[ "$(wc -l < "$WORK/t.csv")" = 3 ] || fail "bench train --csv: $(cat "$WORK/t.csv")"
accept bench ops conv/width --shape "T=40 C=8" --csv "$WORK/o.csv"
parse forward_ms forward_share both_ms both_gb_per_s difference right
[ "$(wc -l < "$WORK/o.csv")" = 2 ] || fail "bench ops --csv: $(cat "$WORK/o.csv")"
grep -q '"shape":"B=8 T=40 C=8".*"right":true' "$WORK/out" || fail "bench ops --shape: $(cat "$WORK/out")"
accept bench ops --check --shape "B=2 T=40 D=8 C=8 H=2 J=8 K=8 R=20 I=16 O=8 F=8 V=30 n=5000"
[ "$(grep -c '^ok ' "$WORK/out")" = "$("$RIVERRUN" bench ops --list | wc -l)" ] || fail "bench ops: $(cat "$WORK/out")"
accept bench ops --check --shape "B=2 T=9,40 H=2 J=8 m=0,1,2,3,4 e=0,1,2" 'cell/J=512 e=0 m=1 '
[ "$(grep -c '^ok ' "$WORK/out")" = 30 ] || fail "bench ops cell: $(cat "$WORK/out")"
refuse "'nothing' is no part of a case" bench ops nothing
refuse "'B' is no shape" bench ops --shape B
cat > "$WORK/layers.ini" <<'INI'
[model]
d_model = 32
vocab_size = 16
pattern = r a m
[block.r]
mixer = rat
heads = 4
chunk = 4
[block.a]
mixer = attention
heads = 4
context = 8
mlp = swiglu
[block.m]
mixer = mamba2
head_dim = 8
d_state = 8
[data]
seq_len = 20
[train]
batch = 2
INI
accept bench layer "$WORK/layers.ini" --block r --batch 3 --seq 18
parse forward_ms both_ms both_floor_ms saved_bytes_token prefill_ms step_ms call_ms state_bytes
grep -q '"mixer":"rat","width":32,"batch":3,"seq":18,.*"right":true,.*"decode_right":true' "$WORK/out" ||
    fail "bench layer: $(cat "$WORK/out")"
accept bench layer "$WORK/layers.ini" --batch 2,1 --seq 70,9
cp "$WORK/out" "$WORK/layers.jsonl"
[ "$(grep -c '"right":true.*"decode_right":true' "$WORK/out")" = 6 ] || fail "bench layer: $(cat "$WORK/out")"
accept bench layer "$WORK/layers.ini" train.device=cpu train.precision=fp64 --mlp --what train
parse both_ms
refuse 'has no block x' bench layer "$WORK/layers.ini" --block x
refuse 'has no block m with an MLP' bench layer "$WORK/layers.ini" --block m --mlp
refuse "--seq '3,' is no list of sizes" bench layer "$WORK/layers.ini" --seq 3,
refuse '--batch has 2 sizes and --seq 3' bench layer "$WORK/layers.ini" --batch 1,2 --seq 1,2,3
# The tables that scripts make of these lines (plots need matplotlib).
if command -v python3 > /dev/null; then
    accept bench ops --shape "B=1,2 T=9,16 H=2 J=8 m=1,2,3,4 e=0,1" 'cell/J=512 e=0 m=1 '
    cp "$WORK/out" "$WORK/cells.jsonl"
    sed -e 's/"block":"r"/"block":"rat16"/' -e 's/"block":"a"/"block":"attention"/' "$WORK/layers.jsonl" \
        > "$WORK/rat.jsonl"
    for table in "layers $WORK/rat.jsonl" "rat $WORK/rat.jsonl" "pararnn $WORK/cells.jsonl"; do
        # shellcheck disable=SC2086
        python3 "$ROOT/scripts/plot_lengths.py" $table > "$WORK/out" 2> "$WORK/err" || fail "$table: $(cat "$WORK/err")"
        [ "$(grep -c '^|' "$WORK/out")" -ge 5 ] || fail "plot_lengths.py $table: $(cat "$WORK/out")"
    done
fi
accept bench gemm --size 33 --repeats 2 --precision fp64
parse flops_per_s
accept bench loader "$WORK/train" "$WORK/valid" --seq 64 --batch 3 --batches 7 --threads 2
parse tokens_per_s thread_read_s
grep -q '"sources":2,.*"batches":7,"tokens":1344,' "$WORK/out" || fail "bench loader: $(cat "$WORK/out")"
accept bench verify "$WORK/train" --repeats 1
parse bytes_per_s decompressed_bytes
refuse 'bench needs an action' bench
refuse 'bench gemm takes no arguments, but 1 argument was given; one too many is x' bench gemm x
refuse "'trian' is no action of riverrun bench; did you mean train?" bench trian
refuse 'model.vocab_size = 0' bench train "$WORK/c.ini"
refuse 'has no option stps' bench train "$WORK/c.ini" model.vocab_size=40 train.stps=1
refuse 'no-data' bench loader "$WORK/no-data"
refuse 'is no shard' bench verify "$WORK/c.ini"

# A result that can't be written is no success.
if [ -w /dev/full ]; then
    "$RIVERRUN" eval "$WORK/ok" --data "$WORK/valid" > /dev/full 2> "$WORK/err"
    [ $? = 1 ] && grep -q 'standard output' "$WORK/err" || fail "eval to a full disk: $(cat "$WORK/err")"
    "$RIVERRUN" generate "$WORK/ok" --prompt a > /dev/full 2> "$WORK/err"
    [ $? = 1 ] && grep -q 'standard output' "$WORK/err" || fail "generate to a full disk: $(cat "$WORK/err")"
fi

# An OpenBLAS that does not know the processor is told what it is: the program starts a second time, and no more.
printf 'char *openblas_get_corename(void) { return "Prescott"; }\n' > "$WORK/old.c"
if grep -q avx2 /proc/cpuinfo 2>/dev/null && ldd "$RIVERRUN" | grep -q openblas &&
    ${CC:-cc} -shared -fPIC -o "$WORK/old.so" "$WORK/old.c" 2>/dev/null; then
    starts=$(LD_PRELOAD="$WORK/old.so" OPENBLAS_VERBOSE=2 "$RIVERRUN" --version 2>&1 | grep -c '^Core:')
    [ "$starts" = 2 ] || fail "with an OpenBLAS that is too old the program starts $starts times, should be 2"
    starts=$(LD_PRELOAD="$WORK/old.so" OPENBLAS_VERBOSE=2 OPENBLAS_CORETYPE=Haswell "$RIVERRUN" --version 2>&1 |
        grep -c '^Core:')
    [ "$starts" = 1 ] || fail "with OPENBLAS_CORETYPE given the program starts $starts times, should be 1"
fi
finish
