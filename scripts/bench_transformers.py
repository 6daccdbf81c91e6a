#!/usr/bin/env python3
"""bench_transformers.py: how fast Hugging Face transformers trains on this CPU, beside `riverrun bench train`.

    OMP_NUM_THREADS=2 build/venv/bin/python scripts/bench_transformers.py mamba|mamba2 [--steps 5]

The model is that of configs/bench/ARCHITECTURE.ini: vocabulary 256, four blocks of width 256, tied embeddings, fp32. A
step is what a training loop there does: forward with the loss, backward, clipping of the gradient's norm, AdamW; eager
mode, the pure PyTorch path that transformers takes on a CPU. Tokens walk through a random order of the ids, so the loss
shows that the model learns. The environment comes from scripts/make_venv.sh. One JSON object to standard output.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402

VOCAB, WIDTH, BLOCKS = 256, 256, 4


def make_model(architecture):
    common = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=BLOCKS, expand=2, conv_kernel=4,
                  tie_word_embeddings=True, use_cache=False)
    if architecture == "mamba":
        config = transformers.MambaConfig(state_size=16, time_step_rank=16, **common)
        return transformers.MambaForCausalLM(config)
    config = transformers.Mamba2Config(state_size=128, head_dim=64, num_heads=8, n_groups=1, **common)
    return transformers.Mamba2ForCausalLM(config)


def make_optimizer(model):
    """Decay for matrices and convolutions only, as riverrun's tensor table has it."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def make_batch(order, batch, length, generator):
    at = torch.randint(0, VOCAB, (batch, 1), generator=generator)
    return order[(at + torch.arange(length)) % VOCAB]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("architecture", choices=("mamba", "mamba2"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them that are not")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(VOCAB, generator=generator)
    model = make_model(options.architecture).train()
    optimizer = make_optimizer(model)
    parameters = sum(p.numel() for p in model.parameters())
    seconds, cpu, losses = [], [], []
    for step in range(options.warmup + options.steps):
        ids = make_batch(order, options.batch, options.seq, generator)
        begun, begun_cpu = time.perf_counter(), time.process_time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step >= options.warmup:
            seconds.append(time.perf_counter() - begun)
            cpu.append(time.process_time() - begun_cpu)
    tokens = options.batch * options.seq
    median = statistics.median(seconds)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {options.architecture}: "
          f"{tokens / median:.0f} tokens/s, a step {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
          f"loss {losses[0]:.4f} to {losses[-1]:.4f}", file=sys.stderr)
    print(json.dumps({
        "bench": "transformers", "architecture": options.architecture, "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(), "parameters": parameters,
        "batch": options.batch, "seq": options.seq, "steps": options.steps, "step_s": median,
        "step_s_min": min(seconds), "step_s_max": max(seconds), "step_cpu_s": sum(cpu) / len(cpu),
        "tokens_per_s": tokens / median, "loss_first": losses[0], "loss_last": losses[-1]}))


if __name__ == "__main__":
    main()
