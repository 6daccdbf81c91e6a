#!/bin/sh
# test_tasks.sh: generated tasks from the command line: learned, validated and evaluated; the same run from any ranks
# and after an interruption; what is refused.
set -u
. "$(dirname "$0")/support.sh"

cat > "$WORK/c.ini" <<CONFIG
[model]
d_model = 24
pattern = m*2
[block.m]
mixer = mamba2
d_state = 16
head_dim = 8
chunk = 16
[task.pairs]
kind = even_pairs
length = 6
valid_samples = 200
[data]
train = task:pairs
valid = task:pairs
seq_len = 5
[train]
steps = 150
batch = 16
micro_batch = 4
log_every = 50
[optimizer]
lr = 1e-2
weight_decay = 0
[schedule]
kind = constant
[eval]
every = 50
[checkpoint]
every = 60
CONFIG
train() {
    out=$1
    shift
    "$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/$out" "$@" > "$WORK/out" 2> "$WORK/err" < /dev/null ||
        fail "$out: $(cat "$WORK/err")"
}
# refuse WORDS COMMAND...: exit code 2 and one line with the words.
refuse() {
    words=$1
    shift
    "$RIVERRUN" "$@" > "$WORK/out" 2> "$WORK/err" < /dev/null
    [ $? = 2 ] || fail "$*: not exit code 2: $(cat "$WORK/err")"
    [ "$(wc -l < "$WORK/err")" = 1 ] && grep -qF -- "$words" "$WORK/err" ||
        fail "$*: '$(cat "$WORK/err")' does not say '$words'"
}
# value KEY FILE: of the last line with that key.
value() { sed -n 's/.*"'"$1"'":\([^,}]*\).*/\1/p' "$2" | tail -n 1; }

# ---- learning, and the same numbers everywhere
train one
grep '"type":"valid"' "$WORK/one/log.jsonl" > "$WORK/valid.jsonl"
awk -v a="$(value sequence_accuracy "$WORK/valid.jsonl")" 'BEGIN { exit !(a >= 0.95) }' ||
    fail "even pairs are not learned: $(tail -n 1 "$WORK/valid.jsonl")"
[ "$(value sequences "$WORK/valid.jsonl")" = 200 ] || fail "not 200 samples: $(tail -n 1 "$WORK/valid.jsonl")"
"$RIVERRUN" eval "$WORK/one" --data task:pairs > "$WORK/eval" || fail 'eval'
for key in loss accuracy sequence_accuracy tokens; do # the batch differs, and with it the last digits
    awk -v a="$(value "$key" "$WORK/eval")" -v b="$(value "$key" "$WORK/valid.jsonl")" \
        'BEGIN { d = a - b; exit !(a != "" && b != "" && d < 1e-9 && d > -1e-9) }' ||
        fail "$key: eval says $(value "$key" "$WORK/eval"), validation $(value "$key" "$WORK/valid.jsonl")"
done
[ "$(value bits_per_byte "$WORK/eval")" = null ] || fail "text of a task: $(cat "$WORK/eval")"
"$RIVERRUN" eval "$WORK/one" --data task:long task.long.kind=even_pairs task.long.min_length=20 task.long.length=30 \
    task.long.valid_samples=50 > "$WORK/eval" || fail 'eval of a new task'
[ "$(value window "$WORK/eval")" = 29 ] && [ "$(value sequences "$WORK/eval")" = 50 ] ||
    fail "long: $(cat "$WORK/eval")"

# ---- interrupted, and on two ranks
train two train.steps=100
train two
same_curve "$WORK/one" "$WORK/two" 'resumed'
same_weights "$WORK/one" "$WORK/two" 'resumed'
train threads data.threads=3 data.ahead=1
same_curve "$WORK/one" "$WORK/threads" 'three loader threads'
if have_mpi; then
    mpi 2 "$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/ranks" train.steps=3 eval.every=0 > "$WORK/out" \
        2> "$WORK/err" || fail "two ranks: $(cat "$WORK/err")"
    # One step of the same samples has the same loss up to rounding, and counts the same answers.
    first() { sed -n '/"type":"step"/{s/.*"loss":\([0-9.]*\).*"valid":\([0-9]*\).*/\1 \2/p;q;}' "$1/log.jsonl"; }
    first "$WORK/one" > "$WORK/a"
    first "$WORK/ranks" > "$WORK/b"
    paste "$WORK/a" "$WORK/b" | awk '{ d = $1 - $3; exit !(d < 1e-5 && d > -1e-5 && $2 == $4) }' ||
        fail "two ranks: $(cat "$WORK/a") and $(cat "$WORK/b")"
fi

# ---- a mixture, and a finite training set
sed -e '/^train = /d' "$WORK/c.ini" > "$WORK/mix.ini"
cat >> "$WORK/mix.ini" <<CONFIG
[task.odd]
kind = parity
length = 6
samples = 100
[source.a]
path = task:pairs
weight = 2
[source.b]
path = task:odd
CONFIG
"$RIVERRUN" train "$WORK/mix.ini" train.out="$WORK/mix" train.steps=20 > "$WORK/out" 2> "$WORK/err" ||
    fail "mixture: $(cat "$WORK/err")"

# ---- refusals
refuse 'no tokenizer.json' generate "$WORK/one" --prompt a
refuse 'mode window' eval "$WORK/one" --data task:pairs --mode carry
refuse 'there is no section [task.pears]' eval "$WORK/one" --data task:pears
refuse 'did you mean length?' eval "$WORK/one" --data task:pairs task.pairs.lenght=9
refuse 'is not about a task' eval "$WORK/one" --data task:pairs eval.batch=9
refuse 'has a vocabulary of 4 ids' eval "$WORK/one" --data task:pairs task.pairs.vocab=4
refuse 'rows of 4 tokens' eval "$WORK/one" --data task:pairs --window 4
refuse 'rows of 5 tokens' train "$WORK/c.ini" train.out="$WORK/no" task.pairs.length=7
refuse 'eval.mode' train "$WORK/c.ini" train.out="$WORK/no" eval.mode=carried
refuse 'mode window' train "$WORK/c.ini" train.out="$WORK/no" eval.mode=carry
refuse 'must be one of selective_copying' train "$WORK/c.ini" train.out="$WORK/no" task.pairs.kind=pairs
refuse 'task.pairs.seed = 2 differs' train "$WORK/c.ini" train.out="$WORK/one" task.pairs.seed=2 train.steps=200
refuse 'vocabularies of 3 and 12 ids' train "$WORK/mix.ini" train.out="$WORK/no" task.odd.kind=reverse
refuse 'was trained on a task with 3 ids, the training data has 5' \
    train "$WORK/c.ini" train.out="$WORK/no" train.init="$WORK/one" task.pairs.vocab=5
train init train.init="$WORK/one" task.pairs.kind=parity train.steps=2
[ ! -e "$WORK/no" ] || fail 'a refused run left a directory'
make_text "$WORK/train.txt" 20000 1
"$RIVERRUN" tokenize --out "$WORK/train" "$WORK/train.txt" 2> "$WORK/err" || fail "tokenize: $(cat "$WORK/err")"
refuse 'is a generated task and' train "$WORK/c.ini" train.out="$WORK/no" data.valid="$WORK/train"
refuse 'no tokenizer.json' eval "$WORK/one" --data "$WORK/train"
"$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/text" data.train="$WORK/train" data.valid= train.steps=2 \
    > "$WORK/out" 2> "$WORK/err" || fail "text: $(cat "$WORK/err")"
refuse 'is a model of text' eval "$WORK/text" --data task:pairs
refuse 'was trained on text' train "$WORK/c.ini" train.out="$WORK/no" train.init="$WORK/text"
finish
