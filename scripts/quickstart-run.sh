#!/bin/sh
# quickstart-run.sh: real text to a trained model and a sample, in a few minutes on two cores. Called by `make
# quickstart` after the build. The text is what every such machine has: the C headers under /usr/include, one document a
# file, every 40th file kept for validation. TEXT=path (a file or a directory) trains on your own instead.
# Everything it makes is under $BUILD/quickstart.
set -eu
BUILD=${BUILD:-build}
RIVERRUN=${RIVERRUN:-$BUILD/riverrun}
TEXT=${TEXT:-/usr/include}
WORK=$BUILD/quickstart
SEPARATOR='<|endoftext|>'

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 2; }

# Join the files named on standard input into one text, a separator line between documents. Binary files are left out,
# and what comes after the first 32 MB: more would not be read in this time.
join_documents() {
    tr '\n' '\0' | LC_ALL=C xargs -0 grep -lI '' 2>/dev/null |
        LC_ALL=C awk -v separator="$SEPARATOR" -v limit=32000000 '
        bytes < limit {
            if (documents++) print separator
            while ((getline line < $0) > 0) { print line; bytes += length(line) + 1 }
            close($0)
        }'
}

[ -e "$TEXT" ] || fail "TEXT=$TEXT does not exist; give a text file or a directory of text files"
rm -rf "$WORK"
mkdir -p "$WORK"

say "text: $TEXT"
if [ -d "$TEXT" ]; then
    pattern='*'
    [ "$TEXT" = /usr/include ] && pattern='*.h'
    find "$TEXT" -type f -name "$pattern" -size +0 -size -400k 2>/dev/null | LC_ALL=C sort > "$WORK/files"
    awk 'NR % 40 == 20' "$WORK/files" | head -n 40 > "$WORK/files.valid"
    awk 'NR % 40 != 20' "$WORK/files" > "$WORK/files.train"
    [ -s "$WORK/files.valid" ] ||
        fail "TEXT=$TEXT holds fewer than 20 text files; give a directory with more, or one file"
    join_documents < "$WORK/files.train" > "$WORK/train.txt"
    join_documents < "$WORK/files.valid" > "$WORK/valid.txt"
else
    lines=$(wc -l < "$TEXT")
    [ "$lines" -ge 200 ] || fail "TEXT=$TEXT has $lines lines; at least 200 are needed to keep some for validation"
    held=$((lines / 20))
    [ "$held" -le 4000 ] || held=4000
    head -n $((lines - held)) "$TEXT" > "$WORK/train.txt"
    tail -n "$held" "$TEXT" > "$WORK/valid.txt"
fi
ls -l "$WORK/train.txt" "$WORK/valid.txt" | awk '{print $5 " bytes  " $NF}'

say "tokenize"
"$RIVERRUN" tokenize --out "$WORK/train" "$WORK/train.txt"
"$RIVERRUN" tokenize --out "$WORK/valid" "$WORK/valid.txt"

say "train"
"$RIVERRUN" train configs/quickstart.ini train.out="$WORK/run" data.train="$WORK/train" data.valid="$WORK/valid" \
    > "$WORK/train.out" || exit $?
# The trainer's last line on standard output is the validation loss; it is shown at the very end.
result=$(tail -n 1 "$WORK/train.out")

say "sample"
if [ -d "$TEXT" ] && [ "$TEXT" = /usr/include ]; then prompt='#ifndef _'; else prompt=''; fi
"$RIVERRUN" generate "$WORK/run/latest" --prompt "$prompt" --tokens 500 --temperature 0.7 --seed 1
printf '\n'

say "what is there now"
cat <<TXT
checkpoint   $WORK/run/latest   (transformers opens this directory)
log          $WORK/run/log.jsonl
evaluate     $RIVERRUN eval $WORK/run/latest --data $WORK/valid
generate     $RIVERRUN generate $WORK/run/latest --prompt 'static int '
TXT
printf '\n%s\n' "$result"
