# support_python.sh: what the scripts share that hold riverrun against software in Python; sourced by them, in the
# repository's root. All of support.sh, and what is here.

. test/support.sh

# need_python [data]: $python is that of the environment that scripts/make_venv.sh makes. Where it can't be had the test
# is skipped (77), and its last line says why.
need_python() {
    python=$(sh scripts/make_venv.sh "$@")
    code=$?
    echo "$python"
    [ $code = 0 ] || exit $code
    python=$(echo "$python" | tail -n 1)
}

# need_shard_reader: skip where scripts/read_shard.py can't decompress.
need_shard_reader() {
    reads_zstd "$python" || skip 'scripts/read_shard.py needs the program zstd (Debian package zstd)'
}

# must COMMAND...: it succeeds, or the test ends with what it wrote.
must() {
    "$@" >"$WORK/output" 2>&1 && return 0
    echo "FAIL  exit code $? from: $*"
    cat "$WORK/output"
    exit 1
}
