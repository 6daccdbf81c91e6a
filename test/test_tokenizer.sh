#!/bin/sh
# test_tokenizer.sh: Hugging Face's tokenizers gives the ids that riverrun writes (test/check_tokenizer.py). Skipped
# (77) where the Python environment can't be had; the last line says why.
set -u
. test/support.sh
python=$(sh scripts/make_venv.sh)
code=$?
echo "$python"
[ $code = 0 ] || exit $code
"$(echo "$python" | tail -n 1)" test/check_tokenizer.py "$RIVERRUN" "$WORK" || fail 'ids differ'
finish
