#!/bin/sh
# test_tokenizer.sh: a model on byte-level BPE through every command, and Hugging Face's tokenizers giving the ids that
# riverrun writes (test/check_tokenizer.py for bytes, test/check_bpe.py for the others). The second part is left out
# where the Python environment can't be had; the script then ends with 77 and the last line says why.
set -u
. test/support_python.sh

# Also of support_python.sh, but here the script goes on.
must() { "$@" >"$WORK/out" 2>"$WORK/err" || { fail "exit code $? from: $*"; cat "$WORK/err"; }; }

# ---- tokenize, train, eval, generate, export ------------------------------------------------------------------------

TOKENIZER=test/tokenizer/neox.json
make_text "$WORK/train.txt" 60000 1
make_text "$WORK/valid.txt" 6000 2
printf 'caf\303\251 cafe\314\201 \377 <|endoftext|>  x\n' >>"$WORK/valid.txt"
must "$RIVERRUN" tokenize --tokenizer "$TOKENIZER" --out "$WORK/train" "$WORK/train.txt"
must "$RIVERRUN" tokenize --tokenizer "$TOKENIZER" --out "$WORK/valid" "$WORK/valid.txt"
make_config "$WORK/run.ini"
must "$RIVERRUN" train "$WORK/run.ini" train.out="$WORK/run" train.steps=8 eval.every=8
for directory in train valid run/latest; do
    cmp "$TOKENIZER" "$WORK/$directory/tokenizer.json" || fail "$directory: another tokenizer.json"
done
must "$RIVERRUN" export "$WORK/run" --out "$WORK/export"
for file in tokenizer.json tokenizer_config.json; do
    cmp "$WORK/run/latest/$file" "$WORK/export/$file" || fail "export: another $file"
done

# Bits per byte are per byte of the text that the targets stand for: all but the first token's, in NFC and with U+FFFD
# for what is no UTF-8, without the separators.
must "$RIVERRUN" shards cat "$WORK/valid"
text=$(grep -v '^<|endoftext|>$' "$WORK/out" | wc -c)
inside=13 # the marker inside a line is an end-of-document id, which stands for no text
first=$(head -c 4 "$WORK/valid.txt") # make_text begins with one of its words, and so does the first token
must "$RIVERRUN" eval "$WORK/run/latest" --data "$WORK/valid" --tokens 0
bytes=$(sed -n 's/.*"bytes":\([0-9]*\).*/\1/p' "$WORK/out")
loss=$(sed -n 's/.*"loss":\([0-9.]*\).*/\1/p' "$WORK/out")
bits=$(sed -n 's/.*"bits_per_byte":\([0-9.]*\).*/\1/p' "$WORK/out")
tokens=$(sed -n 's/.*"tokens":\([0-9]*\).*/\1/p' "$WORK/out")
least=$((text - inside - 16)) most=$((text - inside - 1))
[ "$bytes" -ge $least ] && [ "$bytes" -le $most ] ||
    fail "eval counts $bytes bytes of text, not $least to $most (the text after a first token, '$first')"
awk -v n="$loss" -v t="$tokens" -v b="$bytes" -v got="$bits" \
    'BEGIN { want = n * t / log(2) / b; exit !(got > want * 0.999999 && got < want * 1.000001) }' ||
    fail "bits per byte $bits do not follow from the loss $loss, $tokens tokens and $bytes bytes"

must "$RIVERRUN" generate "$WORK/run" --prompt 'the river' --tokens 20 --echo --temperature 0
cut -c 1-9 "$WORK/out" | grep -q '^the river' || fail 'generate does not begin with the prompt'
must "$RIVERRUN" generate "$WORK/run" --prompt '' --tokens 5 --ignore-eod

# Other data than the model's is refused.
must "$RIVERRUN" tokenize --out "$WORK/bytes" "$WORK/valid.txt"
"$RIVERRUN" eval "$WORK/run/latest" --data "$WORK/bytes" >"$WORK/out" 2>"$WORK/err"
[ $? = 2 ] || fail 'eval takes data of another tokenizer'
grep -q "made with the tokenizer 'bytes'" "$WORK/err" || { fail 'eval does not say why'; cat "$WORK/err"; }
"$RIVERRUN" tokenize --tokenizer test/tokenizer/ids.json --out "$WORK/none" "$WORK/valid.txt" 2>"$WORK/err"
[ $? = 2 ] && [ ! -e "$WORK/none" ] || fail 'tokenize takes any file for a tokenizer'

# ---- Hugging Face's library -----------------------------------------------------------------------------------------

[ "$FAILURES" = 0 ] || finish
need_python
need_shard_reader
mkdir "$WORK/hf"
"$python" test/check_tokenizer.py "$RIVERRUN" "$WORK/hf" || fail 'ids of bytes differ'
"$python" test/check_bpe.py "$RIVERRUN" "$WORK" || fail 'ids of byte-level BPE differ'
finish
