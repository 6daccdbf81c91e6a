#!/usr/bin/env python3
"""random_transformers_model.py: small Mamba and Mamba-2 models made and saved by transformers, for testing `riverrun import`.

    python3 scripts/random_transformers_model.py DIRECTORY

saves one to each of DIRECTORY/untied, tied, bf16 (saved in bf16), sharded (several files and an index), limited (step sizes
are clamped): these are Mamba-2; mamba, and mamba-unusual (untied, other sizes than the usual ones).
Every parameter is moved away from its initial value, so that no gain is 1, no bias 0 and no two heads alike.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

KINDS = ("untied", "tied", "bf16", "sharded", "limited", "mamba", "mamba-unusual")
IDS = dict(bos_token_id=256, eos_token_id=256, pad_token_id=256)


def make(kind):
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=40, state_size=16, num_hidden_layers=3, **IDS))
    if kind == "mamba-unusual":
        return MambaForCausalLM(MambaConfig(
            vocab_size=272, hidden_size=40, expand=3, state_size=5, conv_kernel=3, time_step_rank=7, num_hidden_layers=2,
            layer_norm_epsilon=0.01, tie_word_embeddings=False, **IDS))
    limits = {"time_step_limit": (0.02, 0.5)} if kind == "limited" else {}
    return Mamba2ForCausalLM(Mamba2Config(
        vocab_size=272, hidden_size=48, expand=2, num_heads=6, head_dim=16, state_size=24, n_groups=1, conv_kernel=4,
        num_hidden_layers=3, chunk_size=32, tie_word_embeddings=kind == "tied", **IDS, **limits))


def save(kind, directory):
    torch.manual_seed(KINDS.index(kind))
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) * (1 + parameter.abs()))
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="60KB" if kind == "sharded" else "5GB")


def main():
    if len(sys.argv) != 2:
        print("usage: random_transformers_model.py DIRECTORY", file=sys.stderr)
        return 2
    disable_progress_bar()
    for kind in KINDS:
        save(kind, f"{sys.argv[1]}/{kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
