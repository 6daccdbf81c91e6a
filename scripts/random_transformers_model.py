#!/usr/bin/env python3
"""random_transformers_model.py: small models made and saved by transformers, for testing `riverrun import`.

    python3 scripts/random_transformers_model.py DIRECTORY

saves one to each of DIRECTORY/untied, tied, bf16 (saved in bf16), sharded (several files and an index), limited (step
sizes are clamped): these are Mamba-2; mamba and xlstm, and mamba-unusual (untied, other sizes than the usual ones) and
xlstm-unusual; llama, llama-unusual (tied, grouped heads of another width, another base), arcee. Every parameter is
moved away from its initial value, so that no gain is 1, no bias 0 and no two heads alike; the input gates of xLSTM,
which start closed, are opened.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM  # noqa: E402
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers import xLSTMConfig, xLSTMForCausalLM  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

KINDS = ("untied", "tied", "bf16", "sharded", "limited", "mamba", "mamba-unusual", "xlstm", "xlstm-unusual",
         "llama", "llama-unusual", "arcee")
IDS = dict(bos_token_id=256, eos_token_id=256, pad_token_id=256)


def make(kind):
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=40, state_size=16, num_hidden_layers=3, **IDS))
    if kind == "mamba-unusual":
        return MambaForCausalLM(MambaConfig(
            vocab_size=272, hidden_size=40, expand=3, state_size=5, conv_kernel=3, time_step_rank=7,
            num_hidden_layers=2,
            layer_norm_epsilon=0.01, tie_word_embeddings=False, **IDS))
    # transformers' cache rounds the widths of q and k and of v up to multiples of 64, the layer does not.
    if kind == "xlstm":
        return xLSTMForCausalLM(xLSTMConfig(vocab_size=264, hidden_size=128, num_heads=2, num_hidden_layers=3, **IDS))
    if kind == "xlstm-unusual":
        return xLSTMForCausalLM(xLSTMConfig(
            vocab_size=272, hidden_size=128, num_heads=4, num_hidden_layers=2, norm_eps=0.01, eps=1e-3,
            qk_dim_factor=1.0,
            v_dim_factor=1.5, ffn_proj_factor=1.7, ffn_round_up_to_multiple_of=16, gate_soft_cap=2.0,
            output_logit_soft_cap=3.0, **IDS))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=264, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, **IDS))
    if kind == "llama-unusual":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=272, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=10, rms_norm_eps=0.01, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **IDS))
    if kind == "arcee":
        return ArceeForCausalLM(ArceeConfig(
            vocab_size=264, hidden_size=40, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, hidden_act="gelu", max_position_embeddings=128, tie_word_embeddings=True, **IDS))
    limits = {"time_step_limit": (0.02, 0.5)} if kind == "limited" else {}
    return Mamba2ForCausalLM(Mamba2Config(
        vocab_size=272, hidden_size=48, expand=2, num_heads=6, head_dim=16, state_size=24, n_groups=1, conv_kernel=4,
        num_hidden_layers=3, chunk_size=32, tie_word_embeddings=kind == "tied", **IDS, **limits))


def save(kind, directory):
    torch.manual_seed(KINDS.index(kind))
    model = make(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) * (1 + parameter.abs()))
            if "igate_preact.bias" in name:
                parameter.add_(11)
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
