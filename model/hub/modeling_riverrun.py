"""modeling_riverrun.py: the language models that riverrun trains, for Hugging Face transformers:

    r = embedding of the token;  for each block: r = r + mixer(norm(r)), then r = r + mlp(norm2(r)) where it has one
    logits = norm_f(r) W^T, W the embedding's weights where they are tied; with a cap: cap tanh(logits / cap)

What a block mixes with is in mixers_riverrun.py. Nothing but PyTorch and transformers is needed. Tensors have
riverrun's names, and riverrun's tests compare the two.

What riverrun has and this has not: several documents in a row (every row is one text), and solvers that work in
parallel along time: recurrences run token by token. Rows can't begin with padding, for a recurrence would read it.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_riverrun import RiverrunConfig, check_settings
from .mixers_riverrun import MIXERS, MLP, HeadNorm, RMSNorm


class RiverrunCache(Cache):
    """What a model knows of the tokens it has read: for each block a tuple of tensors, rows first."""

    def __init__(self, blocks):
        super().__init__(layers=[])
        self.states = [None] * blocks
        self.tokens = 0

    def get_seq_length(self, layer_idx=0):
        return self.tokens

    def change_rows(self, change):
        self.states = [state and tuple(change(tensor) for tensor in state) for state in self.states]

    def batch_select_indices(self, indices):
        self.change_rows(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.change_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self):
        self.states, self.tokens = [None] * len(self.states), 0

    def crop(self, *_):
        raise NotImplementedError("a recurrent state can't forget its last tokens; keep a copy from before them")

    @property
    def is_croppable(self):
        return False

    @property
    def batch_size(self):
        return next((state[0].shape[0] for state in self.states if state), -1)


class Block(nn.Module):
    """r = r + mixer(norm(r)), or with a learnt scale r = scale r + ...; then the MLP likewise, never scaled."""

    OPTIONS = {"mixer", "mlp", "mlp_width", "residual_scale"}
    TRAINING = {"recompute"}

    def __init__(self, model, options):
        super().__init__()
        D, eps = model["d_model"], model["norm_eps"]
        norm, mixer = {"rms": RMSNorm, "layer": HeadNorm}[model["norm"]], MIXERS[options["mixer"]]
        check_settings("block", options, self.OPTIONS, self.TRAINING, mixer.OPTIONS, mixer.TRAINING)
        self.norm = norm(D, eps)
        self.residual_scale = nn.Parameter(torch.ones(D)) if options.get("residual_scale") else None
        self.mixer = mixer(D, eps, options)
        if options["mlp"] != "none":
            self.norm2 = norm(D, eps)
            self.mlp = MLP(D, options)

    def forward(self, r, state, start):
        y, state = self.mixer(self.norm(r), state, start)
        r = r + y if self.residual_scale is None else self.residual_scale.float() * r + y
        if hasattr(self, "mlp"):
            r = r + self.mlp(self.norm2(r))
        return r, state


def check_padding(mask, cached):
    """Padding behind a text changes nothing before it, but in front of a text, or in a state, it would be read."""
    if mask is None or mask.shape[1] == 0 or bool(mask.all()):
        return
    if mask.dim() != 2:
        raise ValueError("attention_mask must be two-dimensional: (rows, tokens)")
    if cached or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "this model is recurrent and would read padding as text: give texts of one length; or, where no cache is "
            "wanted (use_cache=False), pad them on the right")


class RiverrunPreTrainedModel(PreTrainedModel):
    config_class = RiverrunConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["Block"]
    _is_stateful = True  # what was read can't be taken back: no assisted generation
    # What stays float32 where a narrower type is asked for, as in riverrun's exports: parts of the names of tensors.
    _keep_in_fp32_modules_strict = ["norm", "conv1d", "bias", "A_log", "mixer.D", "learnable_skip", "residual_scale",
                                    "cell.weight"]

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward makes a RiverrunCache


class RiverrunModel(RiverrunPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        model = config.model
        self.embeddings = nn.Embedding(config.vocab_size, model["d_model"])
        self.layers = nn.ModuleList(Block(model, options) for options in config.blocks)
        self.norm_f = {"rms": RMSNorm, "layer": HeadNorm}[model["norm"]](model["d_model"], model["norm_eps"])
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, embeddings):
        self.embeddings = embeddings

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=None, return_dict=None, **_):
        """A cache is made where use_cache asks for one; one that is passed is read and brought up to date in place."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        cache = past_key_values
        if cache is None and use_cache:
            cache = RiverrunCache(len(self.layers))
        if cache is not None and not isinstance(cache, RiverrunCache):
            raise ValueError(f"past_key_values must be a RiverrunCache, not a {type(cache).__name__}")
        check_padding(attention_mask, cache is not None)
        r = (self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds).float()
        start, streams = 0 if cache is None else cache.tokens, []
        for i, block in enumerate(self.layers):
            streams.append(r)
            r, state = block(r, None if cache is None else cache.states[i], start)
            if cache is not None:
                cache.states[i] = state
        if cache is not None:
            cache.tokens += r.shape[1]
        r = self.norm_f(r)
        out = BaseModelOutputWithPast(last_hidden_state=r, past_key_values=cache,
                                      hidden_states=(*streams, r) if output_hidden_states else None)
        return out if return_dict is not False else out.to_tuple()


class RiverrunForCausalLM(RiverrunPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.backbone = RiverrunModel(config)
        self.lm_head = nn.Linear(config.model["d_model"], config.vocab_size, bias=False)
        self.logit_cap = config.model["logit_cap"]
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.embeddings

    def set_input_embeddings(self, embeddings):
        self.backbone.embeddings = embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, output_hidden_states=None, return_dict=None, logits_to_keep=0, **kwargs):
        """`labels` are ids as in input_ids (the shift is made here), -100 for those that don't count."""
        out = self.backbone(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, rows].to(self.lm_head.weight.dtype)).float()
        if self.logit_cap > 0:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values,
                                     hidden_states=out.hidden_states)
        return out if return_dict is not False else out.to_tuple()
