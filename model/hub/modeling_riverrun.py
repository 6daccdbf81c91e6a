"""modeling_riverrun.py: the language models that riverrun trains, for Hugging Face transformers:

    r = embedding of the token;  for each block: r = r + mixer(norm(r)), then r = r + mlp(norm2(r)) where it has one
    logits = norm_f(r) W^T, W the embedding's weights where they are tied; with a cap: cap tanh(logits / cap)

What a block mixes with is in mixers_riverrun.py. Nothing but PyTorch and transformers is needed. Tensors have
riverrun's names, and riverrun's tests compare the two.

What riverrun has and this has not: several documents in a row (every row is one text), and solvers that work in
parallel along time: recurrences run token by token.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_riverrun import RiverrunConfig, check_settings
from .mixers_riverrun import MIXERS, MLP, HeadNorm, RMSNorm


class Rows:
    """Rows of a batch with equally much padding in front, and what the model knows of their tokens: for each block a
    tuple of tensors, rows first."""

    def __init__(self, rows, padding, blocks):
        self.rows, self.padding = rows, padding
        self.states, self.tokens = [None] * blocks, 0

    def select(self, source):
        """Go on with the rows `source` of the whole batch; those of other Rows are left out."""
        place = self.rows.new_full((int(max(source.max(), self.rows.max())) + 1,), -1)
        place[self.rows] = torch.arange(len(self.rows), device=place.device)
        mine = place[source]
        self.rows, mine = (mine >= 0).nonzero()[:, 0], mine[mine >= 0]
        self.states = [state and tuple(tensor.index_select(0, mine) for tensor in state) for state in self.states]


class RiverrunCache(Cache):
    """The state of every row of a batch. A recurrence can't skip padding, so rows with differently much of it in front
    are run apart; usually there is none, and all rows are together."""

    def __init__(self):
        super().__init__(layers=[])
        self.groups = []

    def get_seq_length(self, layer_idx=0):
        return self.groups[0].padding + self.groups[0].tokens if self.groups else 0

    def batch_select_indices(self, indices):
        for group in self.groups:
            group.select(indices.to(group.rows.device))
        self.groups = [group for group in self.groups if len(group.rows)]

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self):
        self.groups = []

    def crop(self, *_):
        raise NotImplementedError("a recurrent state can't forget its last tokens; keep a copy from before them")

    @property
    def is_croppable(self):
        return False

    @property
    def batch_size(self):
        return sum(len(group.rows) for group in self.groups) or -1


def group_rows(mask, r, blocks, cached):
    """Rows by the padding in front of them. Padding behind a text changes nothing before it, but it must not get into a
    state."""
    B, T = r.shape[:2]
    if mask is None or bool(mask.all()):
        return [Rows(torch.arange(B, device=r.device), 0, blocks)]
    if mask.shape != (B, T):
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, it must be (rows, tokens), {(B, T)}")
    mask = mask.bool()
    padding = T - mask.cumsum(1).bool().sum(1)
    behind = mask.flip(1).cumsum(1).flip(1).bool()  # up to the last token of the text
    if bool((padding == T).any()):
        raise ValueError("attention_mask leaves a row without a token")
    if cached and not bool(behind[:, -1].all()):
        raise ValueError("padding on the right would get into the state: pad on the left, or set use_cache=False")
    if not bool((mask.sum(1) == behind.sum(1) - padding).all()):
        raise ValueError("attention_mask has gaps: padding may stand in front of a text and behind it")
    return [Rows((padding == pad).nonzero()[:, 0], int(pad), blocks) for pad in padding.unique()]


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


# Parts of the names of tensors that a model is sensitive to.
FLOAT32 = ("norm", "conv1d", "bias", "A_log", "mixer.D", "learnable_skip", "residual_scale", "cell.weight")


class RiverrunPreTrainedModel(PreTrainedModel):
    config_class = RiverrunConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["Block"]
    _is_stateful = True  # what was read can't be taken back: no assisted generation

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward makes a RiverrunCache

    def _get_dtype_plan(self, dtype):
        """What is loaded as float32 where a narrower type is asked for, as in riverrun's exports."""
        plan = super()._get_dtype_plan(dtype)
        if dtype in (torch.float16, torch.bfloat16):
            plan.update(dict.fromkeys(FLOAT32, torch.float32))
        return plan


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

    def run(self, r, group):
        """All blocks over rows of one group: the stream before each block and behind the last, normed."""
        streams = []
        for i, block in enumerate(self.layers):
            streams.append(r)
            r, group.states[i] = block(r, group.states[i], group.tokens)
        group.tokens += r.shape[1]
        return [*streams, self.norm_f(r)]

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=None, return_dict=None, **_):
        """A cache is made where use_cache asks for one; one that is passed is read and brought up to date in place. The
        mask is read in the first call only: what follows a state is text."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        cache = past_key_values
        if cache is None and use_cache:
            cache = RiverrunCache()
        if cache is not None and not isinstance(cache, RiverrunCache):
            raise ValueError(f"past_key_values must be a RiverrunCache, not a {type(cache).__name__}")
        r = (self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds).float()
        first = cache is None or not cache.groups
        groups = group_rows(attention_mask, r, len(self.layers), cache is not None) if first else cache.groups
        if len(groups) == 1 and not (first and groups[0].padding):
            streams = self.run(r, groups[0])
        else:
            streams = [torch.zeros_like(r) for _ in range(len(self.layers) + 1)]  # and so at padding
            for group in groups:
                at = group.padding if first else 0
                for whole, part in zip(streams, self.run(r[group.rows, at:], group)):
                    whole[group.rows, at:] = part
        if cache is not None:
            cache.groups = groups
        out = BaseModelOutputWithPast(last_hidden_state=streams[-1], past_key_values=cache,
                                      hidden_states=tuple(streams) if output_hidden_states else None)
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
