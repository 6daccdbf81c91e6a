#!/bin/sh
# bench.sh: the figures of docs/measurements/cpu-speed.md, measured here: training of the two models of configs/bench
# beside transformers on the same shape, the loader, and verification of shards. Prints a table to standard output,
# progress to standard error, and leaves every JSON line in $BUILD/bench/.
#
#     sh scripts/bench.sh [TEXT...]
#
# TEXT (plain, .gz or .zst) is what the loader and the verification read, as 2-byte tokens; without it, generated text.
# From the environment: BUILD (build), THREADS (2), STEPS (20), PEER_STEPS (3; 0 leaves transformers out), DATA_BYTES of
# generated text (100000000), BATCHES the loader delivers (8000). The machine should have nothing else to do.
# $BUILD/bench/data is used again; remove it to measure with other text.
set -eu
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}
THREADS=${THREADS:-2}
STEPS=${STEPS:-20}
PEER_STEPS=${PEER_STEPS:-3}
DATA_BYTES=${DATA_BYTES:-100000000}
BATCHES=${BATCHES:-8000}
OUT=$BUILD/bench
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS="$THREADS"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-active}"
say() { echo "bench.sh: $*" >&2; }

make -j"$(nproc)" BUILD="$BUILD" all >&2
RIVERRUN=$BUILD/riverrun
mkdir -p "$OUT"
rm -f "$OUT"/*.json

for model in mamba mamba2; do
    say "training, configs/bench/$model.ini"
    "$RIVERRUN" bench train configs/bench/$model.ini --steps "$STEPS" > "$OUT/train-$model.json"
done

if [ "$PEER_STEPS" -gt 0 ]; then
    if peer=$(BUILD="$BUILD" sh scripts/make_venv.sh | tail -n 1) && [ -x "$peer" ]; then
        for model in mamba mamba2; do
            say "transformers, $model (slow)"
            "$peer" scripts/bench_transformers.py $model --steps "$PEER_STEPS" > "$OUT/peer-$model.json"
        done
    else
        say "transformers left out: $peer"
    fi
fi

# Two sources, so that the loader has something to mix.
if [ ! -e "$OUT/data/done" ]; then
    rm -rf "$OUT/data"
    mkdir -p "$OUT/data"
    if [ $# = 0 ]; then
        say "generating $DATA_BYTES bytes of text"
        "$PYTHON" - "$DATA_BYTES" > "$OUT/data/text.txt" <<'PYTHON'
import random, sys
draw, size = random.Random(1), 0
words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(1, 9))) for _ in range(20000)]
weights = [1 / (rank + 3) for rank in range(len(words))]
while size < int(sys.argv[1]):
    line = " ".join(draw.choices(words, weights, k=5000)) + "\n<|endoftext|>\n"
    sys.stdout.write(line)
    size += len(line)
PYTHON
        set -- "$OUT/data/text.txt"
    fi
    for part in a b; do
        say "tokenizing for source $part"
        "$RIVERRUN" tokenize --out "$OUT/data/$part" "$@" >&2
    done
    touch "$OUT/data/done"
fi
cat "$OUT"/data/?/*.rrs > /dev/null # warm
say "loader"
"$RIVERRUN" bench loader "$OUT/data/a" "$OUT/data/b" --threads "$THREADS" --batches "$BATCHES" > "$OUT/loader.json"
say "verification"
"$RIVERRUN" bench verify "$OUT/data/a" --threads "$THREADS" > "$OUT/verify.json"

"$PYTHON" - "$OUT" <<'PYTHON'
import json, os, pathlib, platform, sys
out = pathlib.Path(sys.argv[1])
def read(name):
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() and path.stat().st_size else None
lines = open("/proc/cpuinfo").read().splitlines()
cpu = next((l.split(":", 1)[1].strip() for l in lines if l.startswith("model name")), platform.machine())
train = {m: read(f"train-{m}") for m in ("mamba", "mamba2")}
print(f"{cpu}, {train['mamba2']['machine']}, commit {train['mamba2']['commit']}, "
      f"load average {os.getloadavg()[0]:.1f} at the end\n")
print("| what | figure |\n|---|---|")
for model, r in train.items():
    print(f"| {model}, {r['parameters']} parameters, {r['batch']} x {r['seq']} | {r['tokens_per_s']:.0f} tokens/s, "
          f"a step {1e3 * r['step_s']:.0f} ms ({1e3 * r['step_s_min']:.0f} to {1e3 * r['step_s_max']:.0f}), "
          f"{1e3 * r['step_cpu_s']:.0f} ms of processor time |")
    print(f"| {model}: 6 N tokens/s beside a product of {r['product']} squared | {1e-9 * r['flops_per_s_6n']:.1f} of "
          f"{1e-9 * r['product_flops_per_s']:.1f} GFLOP/s: {100 * r['ratio']:.1f} % (by processor time "
          f"{100 * r['ratio_by_cpu']:.1f} %) |")
    peer = read(f"peer-{model}")
    if peer:
        print(f"| {model}: transformers {peer['transformers']}, torch {peer['torch']}, eager | "
              f"{peer['tokens_per_s']:.0f} tokens/s; riverrun is "
              f"{r['tokens_per_s'] / peer['tokens_per_s']:.1f} times as fast "
              f"(by processor time {peer['step_cpu_s'] / r['step_cpu_s']:.1f}) |")
loader, verify = read("loader"), read("verify")
print(f"| loader, keyed shuffle, T {loader['seq']}, {loader['sources']} sources, warm, {loader['threads']} threads | "
      f"{1e-6 * loader['tokens_per_s']:.1f} million tokens/s |")
print(f"| shards verify, {verify['threads']} threads | {1e-6 * verify['bytes_per_s']:.0f} MB/s decompressed "
      f"({1e-6 * verify['file_bytes']:.0f} MB on disk) |")
PYTHON
