#!/usr/bin/env python3
"""check_transformers_loss.py: does transformers find the loss of a checkpoint that riverrun eval finds?

    python3 scripts/check_transformers_loss.py CHECKPOINT SHARDS [--riverrun build/riverrun] [--device cuda]
        [--precision fp32|bf16|both] [--window 2048] [--tokens 131072] [--batch 2] [--ids FILE]

Both sides take the first --tokens predictions of SHARDS in windows of --window tokens, each from an empty state that no
document resets (transformers' Mamba and Mamba-2 know no documents; eval --no-reset), and mean the loss over all. It may
differ by 1e-4 nats in fp32 and 5e-3 in bf16. transformers computes with its slow path where its kernels are not
installed; with Mamba-2 that takes 7 GB for a window of 2048 in chunks of 256, so it is told to work in chunks of 64
here (chunks change nothing but rounding). Prints a line for people for each precision and one JSON line; exit code 1 if any
differs.

Python files that lie beside the weights are run: give checkpoints that you trust.

Tokens are read from the shards by scripts/read_shard.py, which needs a module or program for zstd; --ids takes them
from a file instead, one id a line (what read_shard.py --tokens wrote elsewhere).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402

LIMITS = {"fp32": 1e-4, "bf16": 5e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_ids(options):
    """The first tokens + 1 ids of the data set."""
    wanted = options.tokens + 1
    if options.ids:
        with open(options.ids) as lines:
            return [int(line.split()[0]) for line in itertools.islice(lines, wanted)]
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from read_shard import shards
    ids = []
    for shard in shards([options.shards]):
        for frame, _ in shard.tokens():
            ids += frame
            if len(ids) >= wanted:
                return ids[:wanted]
    return ids


def loss_of_riverrun(options, precision, predictions):
    command = [options.riverrun, "eval", options.checkpoint, "--data", options.shards, "--mode", "window", "--window",
               str(options.window), "--tokens", str(predictions), "--batch", "8", "--no-reset", "--device",
               options.device, "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    result = json.loads(done.stdout)
    if result["tokens"] != predictions:
        sys.exit(f"riverrun eval predicted {result['tokens']} tokens, not {predictions}: does the data set mask some?")
    return result["loss"]


def loss_of_transformers(options, precision, ids):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=DTYPES[precision], output_loading_info=True, trust_remote_code=True)
    trouble = {kind: names for kind, names in info.items() if names}
    if trouble:
        sys.exit(f"{options.checkpoint}: tensors without a place, or places without a tensor: {trouble}")
    model.to(options.device).eval()
    for module in model.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = min(module.chunk_size, 64)
    # Without its cache transformers' xLSTM multiplies float32 by bfloat16, which fails.
    cached = model.config.model_type == "xlstm" and precision == "bf16"
    windows = [ids[at:at + options.window + 1] for at in range(0, len(ids) - 1, options.window)]
    total, count = 0.0, 0
    # Windows of one length go together; the last may be shorter.
    for _, group in itertools.groupby(windows, len):
        group = list(group)
        for at in range(0, len(group), options.batch):
            rows = torch.tensor(group[at:at + options.batch], device=options.device)
            with torch.no_grad():
                logits = model(rows[:, :-1], use_cache=cached).logits
            for row, targets in zip(logits, rows[:, 1:]):
                losses = torch.nn.functional.cross_entropy(row.float(), targets, reduction="none")
                total += float(losses.double().sum())
                count += targets.numel()
    return total / count, type(model).__name__


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("shards")
    parser.add_argument("--riverrun", default="build/riverrun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--ids")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    ids = read_ids(options)
    failures = 0
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
        ours = loss_of_riverrun(options, precision, len(ids) - 1)
        theirs, name = loss_of_transformers(options, precision, ids)
        good = abs(ours - theirs) <= LIMITS[precision]
        failures += not good
        print(f"{'ok   ' if good else 'FAIL '} {name}, {precision}, {len(ids) - 1} tokens in windows of "
              f"{options.window}: riverrun {ours:.6f}, transformers {theirs:.6f}, difference {abs(ours - theirs):.1e} "
              f"nats, limit {LIMITS[precision]:.0e}", file=sys.stderr, flush=True)
        print(json.dumps({"check": "transformers-loss", "checkpoint": options.checkpoint, "model": name,
                          "precision": precision, "device": options.device, "tokens": len(ids) - 1,
                          "window": options.window, "riverrun": ours, "transformers": theirs,
                          "difference": abs(ours - theirs), "limit": LIMITS[precision], "good": good,
                          "versions": {"transformers": transformers.__version__, "torch": torch.__version__}}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
