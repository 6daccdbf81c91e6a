#!/bin/sh
# test_shards.sh: `riverrun tokenize` and `riverrun shards` as commands: text of every kind goes in and comes back byte
# for byte, another program reads the same shards, exit codes and messages, and no failing or killed operation of the
# file layer, nor a signal, leaves a data set that is half of something.
set -u
. test/support.sh
PYTHON=${PYTHON:-python3}

# must CODE COMMAND...: standard output and error go to $WORK/stdout and $WORK/stderr.
must() {
    want=$1
    shift
    "$@" >"$WORK/stdout" 2>"$WORK/stderr"
    got=$?
    [ $got = "$want" ] || fail "exit code $got, expected $want: $* ($(tail -n 1 "$WORK/stderr"))"
}

# says TEXT: the last message has one line and it holds TEXT.
says() {
    grep -qF -- "$1" "$WORK/stderr" || fail "the message lacks '$1': $(cat "$WORK/stderr")"
    [ "$(wc -l <"$WORK/stderr")" = 1 ] || fail "not one line: $(cat "$WORK/stderr")"
}

# gives_back DIRECTORY FILE
gives_back() {
    "$RIVERRUN" shards cat "$1" >"$WORK/back" 2>"$WORK/stderr" || fail "shards cat $1: $(cat "$WORK/stderr")"
    cmp -s "$WORK/back" "$2" || fail "shards cat $1 does not give back $2"
}

echo "== text in, text out"
make_text "$WORK/a.txt" 700000 3
printf 'no newline at the end' >"$WORK/b.txt"
printf 'x\n<|endoftext|>\n<|endoftext|>\r\n\000\377<|endoftext|>\n<|endoftext|>' >"$WORK/c.txt"
: >"$WORK/empty"
gzip -c "$WORK/a.txt" >"$WORK/a.gz"
cat "$WORK/a.txt" "$WORK/b.txt" "$WORK/c.txt" "$WORK/empty" "$WORK/a.txt" >"$WORK/all"
must 0 "$RIVERRUN" tokenize --out "$WORK/plain" --shard-tokens 300k --threads 2 "$WORK/a.txt" "$WORK/b.txt" \
    "$WORK/c.txt" "$WORK/empty" "$WORK/a.gz"
grep -q 'tokens, .* documents, 5 shards' "$WORK/stderr" || fail "no summary: $(cat "$WORK/stderr")"
gives_back "$WORK/plain" "$WORK/all"
must 0 "$RIVERRUN" shards verify --threads 2 "$WORK/plain"
[ "$(grep -c '^ok ' "$WORK/stdout")" = 5 ] || fail "verify: $(cat "$WORK/stdout")"
"$RIVERRUN" tokenize --out "$WORK/piped" - <"$WORK/a.gz" 2>/dev/null || fail "standard input"
gives_back "$WORK/piped" "$WORK/a.txt"
if command -v zstd >/dev/null 2>&1; then
    zstd -q --long=27 "$WORK/a.txt" -o "$WORK/a.zst"
    zstd -qc "$WORK/b.txt" | cat "$WORK/a.zst" - >"$WORK/ab"
    must 0 "$RIVERRUN" tokenize --out "$WORK/zst" "$WORK/ab"
    cat "$WORK/a.txt" "$WORK/b.txt" >"$WORK/all"
    gives_back "$WORK/zst" "$WORK/all"
fi
# JSON lines make the shards that files with the same texts make.
printf '{"id":1,"text":"x\\n<|endoftext|>\\ny"}\n\n{"text":"no newline at the end","meta":{"text":"m"}}' \
    >"$WORK/ab.jsonl"
printf 'x\n<|endoftext|>\ny' >"$WORK/ab"
must 0 "$RIVERRUN" tokenize --out "$WORK/jsonl" --jsonl-key text "$WORK/ab.jsonl"
must 0 "$RIVERRUN" tokenize --out "$WORK/files" --separator= "$WORK/ab" "$WORK/b.txt"
diff -r "$WORK/jsonl" "$WORK/files" || fail 'JSON lines make other shards than files do'
gzip -c "$WORK/ab.jsonl" | "$RIVERRUN" tokenize --out "$WORK/jsonl-gz" --jsonl-key text - 2>/dev/null
diff -r "$WORK/jsonl" "$WORK/jsonl-gz" || fail 'compressed JSON lines make other shards'
mkdir -p "$WORK/tree/b" "$WORK/tree/c"
cp "$WORK/b.txt" "$WORK/tree/b/x"
cp "$WORK/c.txt" "$WORK/tree/b.txt"
cat "$WORK/c.txt" "$WORK/b.txt" >"$WORK/all"
must 0 "$RIVERRUN" tokenize --out "$WORK/walked" --separator= --prefix p "$WORK/tree"
[ "$(ls -A "$WORK/walked" | tr '\n' ' ')" = 'p-00000.rrs tokenizer.json ' ] || fail "$(ls -A "$WORK/walked")"
gives_back "$WORK/walked" "$WORK/all"
"$RIVERRUN" shards info --json "$WORK/walked" | grep -q '"documents":2,.*"separator":""' || fail 'documents of files'
"$RIVERRUN" tokenize --out "$WORK/one" --threads 1 --shard-tokens 300k "$WORK/a.txt" 2>/dev/null
"$RIVERRUN" tokenize --out "$WORK/four" --threads 4 --shard-tokens 300k "$WORK/a.txt" 2>/dev/null
diff -r "$WORK/one" "$WORK/four" || fail 'the number of threads shows'

echo "== what is in shards"
must 0 "$RIVERRUN" shards info "$WORK/plain" "$WORK/walked/p-00000.rrs"
[ "$(grep -c '\.rrs ' "$WORK/stdout")" = 6 ] || fail "info: $(cat "$WORK/stdout")"
must 0 "$RIVERRUN" shards info --json "$WORK/plain"
[ "$(grep -c '^{"path":.*}$' "$WORK/stdout")" = 5 ] || fail "info --json: $(cat "$WORK/stdout")"

echo "== another reader"
if ! command -v "$PYTHON" >/dev/null 2>&1; then
    echo "left out: there is no $PYTHON"
elif ! reads_zstd "$PYTHON"; then
    echo "left out: scripts/read_shard.py needs the program zstd (Debian package zstd)"
else
    must 0 "$PYTHON" scripts/read_shard.py --text "$WORK/plain"
    "$RIVERRUN" shards cat "$WORK/plain" | cmp -s - "$WORK/stdout" || fail 'read_shard.py reads another text'
    must 0 "$PYTHON" scripts/read_shard.py --tokens test/golden/shard-good.rrs
    [ "$(cksum <"$WORK/stdout")" = '2855671199 261' ] || fail "read_shard.py reads other tokens"
    for bad in test/golden/shard-bad-*.rrs; do
        must 1 "$PYTHON" scripts/read_shard.py --tokens "$bad"
        grep -q "^$bad: " "$WORK/stderr" || fail "read_shard.py on $bad: $(cat "$WORK/stderr")"
    done
fi

echo "== refusals"
must 2 "$RIVERRUN" tokenize "$WORK/a.txt"
says 'riverrun tokenize needs --out'
must 2 "$RIVERRUN" tokenize --out "$WORK/new"
must 2 "$RIVERRUN" tokenize --out "$WORK/new" "$WORK/missing"
says "cannot read input $WORK/missing: No such file or directory"
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --levle 3 "$WORK/a.txt"
says "did you mean --level?"
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --level 23 "$WORK/a.txt"
says '--level 23'
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --tokenizer gpt2 "$WORK/a.txt"
says "there is no tokenizer 'gpt2'"
must 2 "$RIVERRUN" tokenize --out "$WORK/plain" "$WORK/b.txt"
says 'already holds shards'
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --jsonl-key meta.text "$WORK/ab.jsonl"
says "$WORK/ab.jsonl:1: 'meta.text' is missing, it must be a string"
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --jsonl-key text "$WORK/ab"
says "$WORK/ab:1: is not valid JSON: a value is expected (column 1)"
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --jsonl-key '' "$WORK/ab.jsonl"
says 'the key of JSON lines must have 1 to 255 bytes; this one has 0'
must 2 "$RIVERRUN" tokenize --out "$WORK/new" --jsonl-key text --separator x "$WORK/ab.jsonl"
says 'does not go with --jsonl-key text'
head -c 268435457 /dev/zero | "$RIVERRUN" tokenize --out "$WORK/new" --jsonl-key text - 2>"$WORK/stderr"
[ $? = 2 ] || fail 'a line of more than 256 MiB'
says 'standard input:1: the line has more than 256 MiB'
head -c 1000 "$WORK/a.gz" >"$WORK/cut.gz"
must 2 "$RIVERRUN" tokenize --out "$WORK/new" "$WORK/a.txt" "$WORK/cut.gz"
says 'is cut off: it ends inside gzip data'
[ ! -e "$WORK/new" ] || fail "something is left: $(ls -A "$WORK/new")"
must 2 "$RIVERRUN" shards
must 2 "$RIVERRUN" shards verfiy "$WORK/plain"
says 'did you mean verify?'
must 2 "$RIVERRUN" shards info "$WORK"
says 'holds no shards'
must 2 "$RIVERRUN" shards cat "$WORK/plain" "$WORK/missing"
for bad in test/golden/shard-bad-*.rrs; do
    must 2 "$RIVERRUN" shards verify test/golden/shard-good.rrs "$bad"
    says "riverrun: $bad is "
    [ "$(cut -c 1-5 "$WORK/stdout" | tr '\n' '/')" = 'ok   /bad  /' ] || fail "verify: $(cat "$WORK/stdout")"
done
must 2 "$RIVERRUN" shards verify test/golden
says 'faults, of which the first: test/golden/shard-bad-count.rrs'
cp -r "$WORK/plain" "$WORK/mixed"
cp test/golden/shard-good.rrs "$WORK/mixed/other.rrs"
must 2 "$RIVERRUN" shards verify "$WORK/mixed"
says 'were made with different tokenizers'
must 2 "$RIVERRUN" shards cat test/golden/shard-good.rrs
says "there is no tokenizer 'sample'"
if [ -e /dev/full ]; then
    "$RIVERRUN" shards cat "$WORK/plain" 2>"$WORK/stderr" >/dev/full
    [ $? = 1 ] || fail 'a full disk goes unnoticed'
    says 'No space left on device'
fi
for command in tokenize shards 'shards info' 'shards verify' 'shards cat'; do
    # shellcheck disable=SC2086
    must 0 "$RIVERRUN" $command --help
    grep -q '^riverrun ' "$WORK/stdout" || fail "$command --help"
done

echo "== signals"
# A shell without job control starts background commands with SIGINT ignored, and what is ignored stays ignored.
signals='TERM HUP' defaults=''
if env --default-signal=INT true 2>/dev/null; then
    signals='INT TERM HUP' defaults='env --default-signal=INT'
fi
mkfifo "$WORK/pipe"
for signal in $signals; do
    $defaults "$RIVERRUN" tokenize --out "$WORK/new" "$WORK/a.txt" "$WORK/pipe" 2>"$WORK/stderr" &
    pid=$!
    STARTED="$STARTED $pid"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ -e "$WORK/new" ] && break
        sleep 0.2
    done
    kill -s $signal $pid
    wait $pid
    code=$?
    [ $code = 1 ] || fail "SIG$signal: exit code $code, $(cat "$WORK/stderr")"
    says 'interrupted by a signal; nothing was left in'
    [ ! -e "$WORK/new" ] || fail "SIG$signal leaves $(ls -A "$WORK/new")"
done

echo "== every operation fails, or is the last before a kill"
head -c 250 "$WORK/a.txt" >"$WORK/small"
head -c 170 "$WORK/c.txt" >"$WORK/former"
must 0 "$RIVERRUN" tokenize --out "$WORK/old" --shard-tokens 50 "$WORK/former"
files='shard-00000.rrs shard-00001.rrs shard-00002.rrs tokenizer.json '

# attempt FAULT: tokenize into $WORK/out with the N-th operation failing or killing.
attempt() {
    RIVERRUN_TEST_FAULT=$1 "$RIVERRUN" tokenize --out "$WORK/out" --overwrite --shard-tokens 100 "$WORK/small" \
        2>"$WORK/stderr"
}

# rehearse KIND START: KIND is fail or kill; START is a directory to begin with, or nothing. Counts what happened.
rehearse() {
    n=0 undisturbed=0 failed=0
    while [ $undisturbed -lt 3 ] && [ $n -lt 100 ]; do
        n=$((n + 1))
        rm -rf "$WORK/out"
        [ -z "$2" ] || cp -r "$2" "$WORK/out"
        attempt "$1:$n"
        code=$?
        if [ $code = 0 ]; then
            gives_back "$WORK/out" "$WORK/small"
            # A leftover of the temporary directory may stay if its removal is what failed.
            [ "$(ls "$WORK/out" | tr '\n' ' ')" = "$files" ] || fail "$1:$n succeeds with $(ls -A "$WORK/out")"
            undisturbed=$((undisturbed + 1))
            continue
        fi
        undisturbed=0 failed=$((failed + 1))
        if [ "$1" = fail ]; then
            [ $code = 1 ] || fail "fail:$n: exit code $code"
            if [ -z "$2" ]; then
                [ ! -e "$WORK/out" ] || fail "fail:$n leaves $(ls -A "$WORK/out")"
            else
                diff -r "$2" "$WORK/out" >"$WORK/stdout" || fail "fail:$n leaves another state: $(cat "$WORK/stdout")"
            fi
            continue
        fi
        [ $code = 137 ] || fail "kill:$n: exit code $code"
        # What is there is the old state, the new one, or is refused.
        if "$RIVERRUN" shards cat "$WORK/out" >"$WORK/back" 2>"$WORK/stderr"; then
            cmp -s "$WORK/back" "$WORK/small" || { [ -n "$2" ] && cmp -s "$WORK/back" "$WORK/former"; } ||
                fail "kill:$n leaves a data set that is neither the old nor the new one"
        elif [ -n "$2" ]; then
            grep -q 'is not complete' "$WORK/stderr" || fail "kill:$n: $(cat "$WORK/stderr")"
        fi
        "$RIVERRUN" tokenize --out "$WORK/out" --overwrite --shard-tokens 100 "$WORK/small" 2>"$WORK/stderr" ||
            fail "after kill:$n: $(cat "$WORK/stderr")"
        [ "$(ls -A "$WORK/out" | tr '\n' ' ')" = "$files" ] || fail "after kill:$n there is $(ls -A "$WORK/out")"
        gives_back "$WORK/out" "$WORK/small"
    done
    echo "$1${2:+ over former shards}: $failed of $n operations disturbed"
    [ $failed -ge 20 ] && [ $undisturbed = 3 ] || fail "$1: too few or too many operations to be true"
}
rehearse fail ''
rehearse kill ''
rehearse fail "$WORK/old"
rehearse kill "$WORK/old"
finish
