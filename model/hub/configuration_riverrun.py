"""configuration_riverrun.py: the config of a model that riverrun trained, as Hugging Face transformers wants it.

config.json holds riverrun's own settings of the model, as docs/config.md of riverrun explains them:

    "settings": {
      "model":   {"d_model": 768, "pattern": "(r a)*12", ...},
      "block.r": {"mixer": "rat", "heads": 12, "chunk": 16, "mlp": "gelu", ...},
      "block.a": {"mixer": "attention", "heads": 12, "window": 1025, "mlp": "gelu", ...}
    }

`pattern` lists the blocks by the names of their sections. riverrun writes this file beside the weights of a model that
transformers has no class for; docs/transformers.md says how to open one.
"""

import re

from transformers import PretrainedConfig

# Settings of [model] by what they decide: the function computed, or only how it is trained.
MODEL_OPTIONS = {"d_model", "vocab_size", "pad_vocab_to", "tie_embeddings", "norm", "norm_eps", "logit_cap", "pattern"}
MODEL_TRAINING = {"init", "recompute_span"}


def expand_pattern(pattern):
    """The names of the blocks in order: "(m*2 a)*2 m" is m m a m m a m."""
    levels = [[]]  # of parentheses; each a list of items, an item a list of names
    for token in re.findall(r"[A-Za-z_][\w-]*|\d+|[()*]", pattern):
        if token == "(":
            levels.append([])
        elif token == ")":
            group = sum(levels.pop(), [])
            levels[-1].append(group)
        elif token.isdigit():
            levels[-1][-1] = levels[-1][-1] * int(token)
        elif token != "*":
            levels[-1].append([token])
    return sum(levels[0], [])


def check_settings(section, given, *known):
    """What this code does not know it would leave out of the computation without a word."""
    unknown = set(given) - set().union(*known)
    if unknown:
        raise ValueError(f"config.json: '{section}' has {', '.join(sorted(unknown))}, which this code does not know")


class RiverrunConfig(PretrainedConfig):
    model_type = "riverrun"

    def __init__(self, settings=None, **kwargs):
        self.settings = settings or {}
        super().__init__(**kwargs)

    @property
    def model(self):
        """The settings of [model]."""
        check_settings("model", self.settings["model"], MODEL_OPTIONS, MODEL_TRAINING)
        return self.settings["model"]

    @property
    def blocks(self):
        """The settings of each block, first to last."""
        return [self.settings["block." + name] for name in expand_pattern(self.settings["model"]["pattern"])]
