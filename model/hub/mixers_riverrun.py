"""mixers_riverrun.py: what mixes along time in the blocks of a riverrun model, and the MLP, in plain PyTorch.

A mixer is called as y, state = mixer(x, state, start): x and y are (B, T, D); `start` says how many tokens of every row
came before these; `state` is a tuple of tensors with B first: all that the mixer knows of them, None where there were
none. So a text may be read at once, in pieces, or token by token, with the same result.

Recurrences are loops over time, in the order of their equations. They are exact and have a gradient, but riverrun's own
kernels are what is fast. Matrix products are done in the type of their weights; everything between them in float32.

Letters: B rows, T tokens, D width of the model, I inner width, H heads, P width of a head, N states of a channel.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ---- parts -----------------------------------------------------------------------------------------------------------


class Projection(nn.Linear):
    """W x + b: the product in the weights' type, the rest in float32."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x):
        y = F.linear(x.to(self.weight.dtype), self.weight).float()
        return y if self.bias is None else y + self.bias.float()


class BlockDiagonal(nn.Module):
    """Square or other matrices side by side: block g of the input gives block g of the output."""

    def __init__(self, blocks, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, outputs, inputs))

    def forward(self, x):
        blocks, outputs, inputs = self.weight.shape
        x = x.unflatten(-1, (blocks, inputs)).to(self.weight.dtype)
        return torch.einsum("...gi,goi->...go", x, self.weight).flatten(-2).float()


class Convolution(nn.Conv1d):
    """A causal convolution of each channel with the last W tokens, then SiLU. The state is the last W - 1 inputs."""

    def __init__(self, channels, width, silu=True):
        super().__init__(channels, channels, width, groups=channels)
        self.silu = silu

    def forward(self, x, state):
        if state is None:
            state = x.new_zeros(x.shape[0], self.kernel_size[0] - 1, x.shape[2])
        row = torch.cat([state, x], 1)
        y = F.conv1d(row.transpose(1, 2), self.weight.float(), self.bias.float(), groups=self.groups).transpose(1, 2)
        return F.silu(y) if self.silu else y, row[:, x.shape[1]:]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean over each of `groups` parts of the channels."""

    def __init__(self, width, eps, groups=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.groups = eps, groups

    def forward(self, x):
        parts = x.float().unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return parts.flatten(-2) * self.weight.float()


class HeadNorm(nn.Module):
    """LayerNorm of every head's channels, with a gain and no bias; one head: the usual LayerNorm."""

    def __init__(self, width, eps, heads=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.heads = eps, heads

    def forward(self, x):
        parts = x.float().unflatten(-1, (self.heads, -1))
        parts = parts - parts.mean(-1, keepdim=True)
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return parts.flatten(-2) * self.weight.float()


class GatedNorm(RMSNorm):
    """norm(y silu(z)) or, norm_first, norm(y) silu(z)."""

    def __init__(self, width, eps, groups=1, norm_first=False):
        super().__init__(width, eps, groups)
        self.norm_first = norm_first

    def forward(self, y, z):
        return super().forward(y) * F.silu(z) if self.norm_first else super().forward(y * F.silu(z))


def rotate(x, positions, base):
    """Rotary positions: turn channels i and i + P/2 of x (B, T, heads, P) by the angle position * base^(-2i/P)."""
    if base == 0:
        return x
    P = x.shape[-1]
    rates = base ** (-2 * torch.arange(P // 2, device=x.device, dtype=torch.float64) / P)
    angles = positions.double()[:, None, None] * rates
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


# ---- Mamba and Mamba-2 (arXiv 2312.00752, 2405.21060) ----------------------------------------------------------------


class Mamba(nn.Module):
    """x, z = W_in u;  x = silu(conv(x));  low, b, c = W_x x;  delta = softplus(W_dt low + bias);  A = -exp(A_log)
    h[t] = exp(delta A) h[t-1] + delta b[t] x[t];  y[t] = c[t] . h[t] + D x[t];  output = W_out (y silu(z))"""

    OPTIONS = {"d_state", "expand", "d_conv", "dt_rank"}
    TRAINING = {"dt_min", "dt_max", "dt_init_floor", "dt_scale"}

    def __init__(self, D, eps, o):
        super().__init__()
        I, N, rank = o["expand"] * D, o["d_state"], o["dt_rank"] or math.ceil(D / 16)
        self.cuts = [rank, N, N]
        self.in_proj = Projection(D, 2 * I)
        self.conv1d = Convolution(I, o["d_conv"])
        self.x_proj = Projection(I, rank + 2 * N)
        self.dt_proj = Projection(rank, I, bias=True)
        self.A_log = nn.Parameter(torch.zeros(I, N))
        self.D = nn.Parameter(torch.ones(I))
        self.out_proj = Projection(I, D)

    def forward(self, u, state, start):
        conv, h = state or (None, 0)
        x, z = self.in_proj(u).chunk(2, -1)
        x, conv = self.conv1d(x, conv)
        low, b, c = self.x_proj(x).split(self.cuts, -1)
        delta = F.softplus(self.dt_proj(low))
        A = -self.A_log.float().exp()
        y = []
        for t in range(x.shape[1]):
            step = delta[:, t, :, None]  # (B, I, 1); h is (B, I, N)
            h = torch.exp(step * A) * h + step * x[:, t, :, None] * b[:, t, None]
            y.append((h * c[:, t, None]).sum(-1))
        y = torch.stack(y, 1) + self.D.float() * x
        return self.out_proj(y * F.silu(z)), (conv, h)


class Mamba2(nn.Module):
    """z, xbc, dt = W_in u;  x, b, c = silu(conv(xbc));  dt = softplus(dt + bias), clamped;  A = -exp(A_log), one a head
    S[t] = exp(dt A) S[t-1] + dt x[t] (outer) b[t];  y[t] = S[t] c[t] + D x[t];  output = W_out gated norm(y, z)
    The heads of a group share b and c, and are normed together."""

    OPTIONS = {"d_state", "head_dim", "expand", "n_groups", "d_conv", "dt_limit_min", "dt_limit_max"}
    TRAINING = {"chunk", "dt_min", "dt_max", "dt_init_floor", "A_init_min", "A_init_max"}

    def __init__(self, D, eps, o):
        super().__init__()
        I, P, G, N = o["expand"] * D, o["head_dim"], o["n_groups"], o["d_state"]
        H = I // P
        self.heads, self.groups = H, G
        self.limits = o["dt_limit_min"], o["dt_limit_max"] or math.inf
        self.cuts, self.conv_cuts = [I, I + 2 * G * N, H], [I, G * N, G * N]
        self.in_proj = Projection(D, sum(self.cuts))
        self.conv1d = Convolution(sum(self.conv_cuts), o["d_conv"])
        self.dt_bias = nn.Parameter(torch.zeros(H))
        self.A_log = nn.Parameter(torch.zeros(H))
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedNorm(I, eps, groups=G)
        self.out_proj = Projection(I, D)

    def forward(self, u, state, start):
        conv, S = state or (None, 0)
        z, xbc, dt = self.in_proj(u).split(self.cuts, -1)
        xbc, conv = self.conv1d(xbc, conv)
        x, b, c = xbc.split(self.conv_cuts, -1)
        x = x.unflatten(-1, (self.heads, -1))
        share = self.heads // self.groups
        b, c = (part.unflatten(-1, (self.groups, -1)).repeat_interleave(share, 2) for part in (b, c))
        dt = F.softplus(dt + self.dt_bias.float()).clamp(*self.limits)
        decay = torch.exp(-self.A_log.float().exp() * dt)
        y = []
        for t in range(u.shape[1]):
            S = decay[:, t, :, None, None] * S + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
            y.append(torch.einsum("bhpn,bhn->bhp", S, c[:, t]))
        y = torch.stack(y, 1) + self.D.float()[:, None] * x
        return self.out_proj(self.norm(y.flatten(-2), z)), (conv, S)


# ---- xLSTM (arXiv 2405.04517, 2503.13427) ----------------------------------------------------------------------------


def mlstm(q, k, v, i, f, state, eps, sigmoid_input=False, normalise=True):
    """m[t] = max(log sigmoid(f) + m[t-1], i);  f' = exp(log sigmoid(f) + m[t-1] - m[t]);  i' = exp(i - m[t])
    C[t] = f' C[t-1] + i' k (outer) v;  n[t] = f' n[t-1] + i' k;  h = C^T q / (max(|n . q|, exp(-m[t])) + eps)
    with q scaled by its width^-1/2. With sigmoid_input i' = sigmoid(i), f' = sigmoid(f), and 1 in place of exp(-m).
    q, k, v are (B, T, H, P); i, f (B, T, H)."""
    B, T, H, K = q.shape
    C, n, m = state or (q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K), q.new_zeros(B, H))
    q = q / math.sqrt(K)
    h = []
    for t in range(T):
        if sigmoid_input:
            keep, add, floor = torch.sigmoid(f[:, t]), torch.sigmoid(i[:, t]), 1.0
        else:
            kept = F.logsigmoid(f[:, t]) + m
            m = torch.maximum(kept, i[:, t])
            keep, add, floor = torch.exp(kept - m), torch.exp(i[:, t] - m), torch.exp(-m)
        key = add[..., None] * k[:, t]
        C = keep[..., None, None] * C + key[..., None] * v[:, t, :, None]
        n = keep[..., None] * n + key
        out = torch.einsum("bhkv,bhk->bhv", C, q[:, t])
        if normalise:
            size = (n * q[:, t]).sum(-1).abs()
            out = out / (size.clamp(min=floor) + eps)[..., None]
        h.append(out)
    return torch.stack(h, 1), (C, n, m)


class MLSTM(nn.Module):
    """The layer of xLSTM 7B: q, k, v, o, i, f = projections of x;  i, f = c tanh(i / c), c tanh(f / c) with a cap c
    output = W_out (sigmoid(o) head norm(mLSTM(q, k, v, i, f)))"""

    OPTIONS = {"heads", "qk_factor", "v_factor", "input_gate", "normalise", "gate_soft_cap", "eps"}
    TRAINING = {"chunk", "backward"}

    def __init__(self, D, eps, o):
        super().__init__()
        H = self.heads = o["heads"]
        K, V = int(o["qk_factor"] * D) // H, int(o["v_factor"] * D) // H
        self.cap = o["gate_soft_cap"]
        self.rule = {"eps": o["eps"], "sigmoid_input": o["input_gate"] == "sigmoid", "normalise": o["normalise"]}
        self.q, self.k, self.v = Projection(D, H * K), Projection(D, H * K), Projection(D, H * V)
        self.ogate_preact = Projection(D, H * V)
        self.igate_preact, self.fgate_preact = Projection(D, H, bias=True), Projection(D, H, bias=True)
        self.multihead_norm = HeadNorm(H * V, eps, H)
        self.out_proj = Projection(H * V, D)

    def forward(self, x, state, start):
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        i, f = self.igate_preact(x), self.fgate_preact(x)
        if self.cap > 0:
            i, f = (self.cap * torch.tanh(gate / self.cap) for gate in (i, f))
        h, state = mlstm(q, k, v, i, f, state, **self.rule)
        h = self.multihead_norm(h.flatten(-2)) * torch.sigmoid(self.ogate_preact(x))
        return self.out_proj(h), state


class MLSTMPreUp(nn.Module):
    """xm, z = W_up u;  xc = silu(conv(xm));  q, k = small matrices of xc;  v of xm;  i, f from [q | k | v], one a head
    output = W_down ((head norm(mLSTM(q, k, v, i, f)) + skip xc) silu(z))"""

    OPTIONS = {"heads", "expand", "d_conv", "qkv_block", "eps"}
    TRAINING = {"chunk"}

    def __init__(self, D, eps, o):
        super().__init__()
        H, block = o["heads"], o["qkv_block"]
        I = (o["expand"] * D + 63) // 64 * 64
        self.heads, self.mlstm_eps = H, o["eps"]
        self.proj_up = Projection(D, 2 * I)
        self.conv1d = Convolution(I, o["d_conv"])
        self.q_proj, self.k_proj, self.v_proj = (BlockDiagonal(I // block, block, block) for _ in range(3))
        self.igate, self.fgate = Projection(3 * I, H, bias=True), Projection(3 * I, H, bias=True)
        self.outnorm = HeadNorm(I, eps, H)
        self.learnable_skip = nn.Parameter(torch.ones(I))
        self.proj_down = Projection(I, D)

    def forward(self, u, state, start):
        conv, memory = (state[0], state[1:]) if state else (None, None)
        xm, z = self.proj_up(u).chunk(2, -1)
        xc, conv = self.conv1d(xm, conv)
        q, k, v = self.q_proj(xc), self.k_proj(xc), self.v_proj(xm)
        qkv = torch.cat([q, k, v], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        h, memory = mlstm(q, k, v, self.igate(qkv), self.fgate(qkv), memory, self.mlstm_eps)
        h = self.outnorm(h.flatten(-2)) + self.learnable_skip.float() * xc
        return self.proj_down(h * F.silu(z)), (conv, *memory)


class SLSTM(nn.Module):
    """The inputs of the gates i, f, z, o are small matrices of u (z, o) and of silu(conv(u)) (i, f). Per head, with the
    recurrent matrices r:  raw_g = input_g + bias_g + r_g y[t-1]
    m[t] = max(raw_i, log sigmoid(raw_f) + m[t-1]), or raw_i where n[t-1] = 0
    ig = exp(raw_i - m[t]);  fg = exp(log sigmoid(raw_f) + m[t-1] - m[t]), both at most 1
    c[t] = fg c[t-1] + ig tanh(raw_z);  n[t] = fg n[t-1] + ig;  y[t] = sigmoid(raw_o) c[t] / n[t]
    output = head norm(y)"""

    OPTIONS = {"heads", "d_conv"}
    TRAINING = {"recurrent_init", "clip"}

    def __init__(self, D, eps, o):
        super().__init__()
        H = self.heads = o["heads"]
        P = D // H
        self.igate, self.fgate, self.zgate, self.ogate = (BlockDiagonal(H, P, P) for _ in range(4))
        self.recurrent_kernel = nn.Parameter(torch.zeros(H, 4 * P, P))
        self.bias = nn.Parameter(torch.zeros(4, D))
        self.group_norm = HeadNorm(D, eps, H)
        self.conv1d = Convolution(D, o["d_conv"]) if o["d_conv"] > 0 else None

    def forward(self, u, state, start):
        *conv, memory = state or (None, u.new_zeros(u.shape[0], 4, u.shape[2], dtype=torch.float32))
        seen = u
        if self.conv1d is not None:
            seen, *conv = self.conv1d(u, conv[0])
        x = torch.stack([self.igate(seen), self.fgate(seen), self.zgate(u), self.ogate(u)], 2) + self.bias.float()
        r = self.recurrent_kernel.float().unflatten(1, (4, -1))  # (H, gate, P, P)
        y, c, n, m = memory.unbind(1)
        out = []
        for t in range(u.shape[1]):
            back = torch.einsum("hgpk,bhk->bghp", r, y.unflatten(-1, (self.heads, -1))).flatten(-2)
            i, f, z, o = (x[:, t] + back).unbind(1)
            kept = F.logsigmoid(f) + m
            m = torch.where(n == 0, i, torch.maximum(i, kept))
            add, keep = torch.exp(i - m).clamp(max=1), torch.exp(kept - m).clamp(max=1)
            c, n = keep * c + add * torch.tanh(z), keep * n + add
            y = torch.sigmoid(o) * c / n
            out.append(y)
        memory = torch.stack([y, c, n, m], 1)
        return self.group_norm(torch.stack(out, 1)), (memory,) if self.conv1d is None else (*conv, memory)


# ---- attention and RAT (arXiv 1706.03762, 2507.04416) ----------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention over the last `window` tokens (0: all) with rotary positions. The state is the keys, rotated,
    and values of the last `context` tokens, or of the window where that is less; older ones are forgotten."""

    OPTIONS = {"heads", "kv_heads", "head_dim", "window", "context", "rope_base", "qk_norm"}
    TRAINING = set()

    def __init__(self, D, eps, o):
        super().__init__()
        H, G, P = o["heads"], o["kv_heads"] or o["heads"], o["head_dim"] or D // o["heads"]
        self.width, self.window, self.base = P, o["window"], o["rope_base"]
        self.room = min(o["context"], o["window"] or o["context"])
        self.q_proj, self.k_proj, self.v_proj = Projection(D, H * P), Projection(D, G * P), Projection(D, G * P)
        self.o_proj = Projection(H * P, D)
        self.q_norm = RMSNorm(P, eps) if o["qk_norm"] else None
        self.k_norm = RMSNorm(P, eps) if o["qk_norm"] else None

    def forward(self, x, state, start):
        T = x.shape[1]
        q, k, v = (project(x).unflatten(-1, (-1, self.width)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        at = torch.arange(start, start + T, device=x.device)
        q, k = rotate(q, at, self.base), rotate(k, at, self.base)
        if state:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        if T == 1:  # a token that is read alone takes the place of the oldest
            k, v = k[:, -self.room:], v[:, -self.room:]
        there = torch.arange(start + T - k.shape[1], start + T, device=x.device)  # the positions of the keys
        visible = there <= at[:, None]
        if self.window > 0:
            visible &= there > at[:, None] - self.window
        repeat = q.shape[2] // k.shape[2]
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.repeat_interleave(repeat, 2).transpose(1, 2),
            v.repeat_interleave(repeat, 2).transpose(1, 2), attn_mask=visible)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), (k[:, -self.room:], v[:, -self.room:])


class RAT(nn.Module):
    """A gated recurrence within chunks of L tokens, attention over the ends of the chunks before:
    z, v, g, q, k = W_in x;  a = sigmoid(g + gate_bias);  head h has q and k of group h mod `groups`
    k~[t] = a k~[t-1] + (1 - a) k[t];  v~ likewise; both from 0 at each chunk's start
    o = softmax over {q . k~ at the end of every earlier chunk, both rotated by the index of their chunk} and
    {q . k~[t]} of v~;  output = W_out (sigmoid(z) o)
    The state is k~ (rotated) and v~ at the ends of the last `context` / L chunks, and k~, v~ of the last token."""

    OPTIONS = {"heads", "groups", "chunk", "context", "rope_base"}
    TRAINING = set()

    def __init__(self, D, eps, o):
        super().__init__()
        self.heads, self.groups, self.chunk, self.base = o["heads"], o["groups"], o["chunk"], o["rope_base"]
        self.width = D // self.heads
        self.room = -(-o["context"] // self.chunk)
        self.cuts = [D, D, D, self.groups * self.width, self.groups * self.width]
        self.in_proj = Projection(D, sum(self.cuts))
        self.gate_bias = nn.Parameter(torch.zeros(D))
        self.out_proj = Projection(D, D)

    def recur(self, k, v, g, running, start):
        """k~ and v~ of every token, (B, T, H, P) each."""
        pairs, a, rest = torch.stack([k, v], 2), torch.sigmoid(g)[:, :, None], torch.sigmoid(-g)[:, :, None]
        out = []
        for t in range(k.shape[1]):
            if (start + t) % self.chunk == 0:
                running = 0
            running = a[:, t] * running + rest[:, t] * pairs[:, t]
            out.append(running)
        return torch.stack(out, 1).unbind(2)

    def forward(self, x, state, start):
        T, L, H = x.shape[1], self.chunk, self.heads
        z, v, g, q, k = self.in_proj(x).split(self.cuts, -1)
        g = g + self.gate_bias.float()
        v, g = v.unflatten(-1, (H, -1)), g.unflatten(-1, (H, -1))
        q, k = (part.unflatten(-1, (self.groups, -1)).repeat(1, 1, H // self.groups, 1) for part in (q, k))
        past_k, past_v, running = state or (k[:, :0], v[:, :0], 0)
        k, v = self.recur(k, v, g, running, start)

        at = torch.arange(start, start + T, device=x.device)
        ends = slice((L - 1 - start) % L, None, L)  # the tokens that end a chunk
        ends_k = torch.cat([past_k, rotate(k[:, ends], at[ends] // L, self.base)], 1)
        ends_v = torch.cat([past_v, v[:, ends]], 1)
        chunks = torch.arange(ends_k.shape[1], device=x.device) + (start + T) // L - ends_k.shape[1]

        earlier = torch.einsum("bthp,bjhp->bhtj", rotate(q, at // L, self.base), ends_k)
        earlier = earlier.masked_fill(chunks >= (at // L)[:, None], -math.inf)
        own = (q * k).sum(-1).transpose(1, 2)  # both sides turned alike, which drops out
        share = torch.softmax(torch.cat([earlier, own[..., None]], -1) / math.sqrt(self.width), -1)
        o = torch.einsum("bhtj,bjhp->bthp", share[..., :-1], ends_v) + share[..., -1].transpose(1, 2)[..., None] * v
        state = ends_k[:, -self.room:], ends_v[:, -self.room:], torch.stack([k[:, -1], v[:, -1]], 1)
        return self.out_proj(torch.sigmoid(z) * o.flatten(-2)), state


# ---- ParaRNN (arXiv 2510.21450) --------------------------------------------------------------------------------------
# A cell: new states from the last ones, the inputs (biases included) and the weights. Every channel is a recurrence of
# its own. Training may solve it in parallel over time; token after token it is exact.


def gru(states, inputs, weights):
    (h,), (z, r, c), (w_z, w_r, w_c) = states, inputs, weights
    z, r = torch.sigmoid(z + w_z * h), torch.sigmoid(r + w_r * h)
    c = torch.tanh(c + w_c * h * r)
    return (z * c + (1 - z) * h,)


def lstm(states, inputs, weights):
    (c, h), (f, o, q), (w_f, w_o, w_q, peep_f, peep_o) = states, inputs, weights
    f = torch.sigmoid(f + w_f * h + peep_f * c)
    c = f * c + (1 - f) * torch.tanh(q + w_q * h)
    return c, torch.sigmoid(o + w_o * h + peep_o * c) * torch.tanh(c)


def mgru(states, inputs, weights):
    (h,), (f, c), (w_f, w_c) = states, inputs, weights
    f = torch.sigmoid(f + w_f * h)
    return ((1 - f) * h + f * torch.tanh(c + w_c * h),)


# Of a channel: the equations, how many states, inputs and weights there are, which state is the output.
CELLS = {"gru": (gru, 1, 3, 3, 0), "lstm": (lstm, 2, 3, 5, 1), "mgru": (mgru, 1, 2, 2, 0)}


class Cell(nn.Module):
    """u = small matrices of x, each making all inputs of its channels;  s[t] = cell(s[t-1], u[t] + bias; weight)"""

    def __init__(self, name, D, heads):
        super().__init__()
        if name not in CELLS:
            raise ValueError(f"the equations of the cell {name} are missing in CELLS of mixers_riverrun.py")
        self.step, self.states, self.inputs, weights, self.output = CELLS[name]
        self.heads = heads
        self.in_proj = BlockDiagonal(heads, self.inputs * D // heads, D // heads)
        self.bias = nn.Parameter(torch.zeros(self.inputs, D))
        self.weight = nn.Parameter(torch.zeros(weights, D))

    def forward(self, x, state):
        u = self.in_proj(x).unflatten(-1, (self.heads, self.inputs, -1)).transpose(2, 3).flatten(3)
        u = (u + self.bias.float()).unbind(2)  # of (B, T, inputs, D)
        weights = self.weight.float().unbind(0)
        states = x.new_zeros(self.states, x.shape[0], x.shape[2]) if state is None else state.unbind(1)
        y = []
        for t in range(x.shape[1]):
            states = self.step(states, [part[:, t] for part in u], weights)
            y.append(states[self.output])
        return torch.stack(y, 1), torch.stack(list(states), 1)


class ParaRNN(nn.Module):
    """a, z = W_in x;  y = cell(silu(conv(a)));  output = W_out gated norm(y, z). Convolution or SiLU may be missing."""

    OPTIONS = {"cell", "heads", "d_conv", "conv_silu", "gate_order"}
    TRAINING = {"solver", "iterations", "chunk", "bounded", "weight_limit", "cell_init"}

    def __init__(self, D, eps, o):
        super().__init__()
        self.in_proj = Projection(D, 2 * D)
        self.conv1d = Convolution(D, o["d_conv"], silu=o["conv_silu"]) if o["d_conv"] > 0 else None
        self.cell = Cell(o["cell"], D, o["heads"])
        self.norm = GatedNorm(D, eps, norm_first=o["gate_order"] == "norm_first")
        self.out_proj = Projection(D, D)

    def forward(self, x, state, start):
        *conv, states = state or (None, None)
        a, z = self.in_proj(x).chunk(2, -1)
        if self.conv1d is not None:
            a, *conv = self.conv1d(a, conv[0])
        y, states = self.cell(a, states)
        return self.out_proj(self.norm(y, z)), (*conv, states) if self.conv1d is not None else (states,)


MIXERS = {"mamba": Mamba, "mamba2": Mamba2, "mlstm": MLSTM, "mlstm_preup": MLSTMPreUp, "slstm": SLSTM,
          "attention": Attention, "rat": RAT, "pararnn": ParaRNN}

# ---- the MLP ---------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(act(gate(x)) up(x)), or down(act(up(x))) without a gate."""

    ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}

    def __init__(self, D, o):
        super().__init__()
        self.act, gated = self.ACTIVATIONS[o["mlp"]], o["mlp"] in ("swiglu", "geglu")
        width = o["mlp_width"] or (math.ceil(8 * D / (3 * 128)) * 128 if gated else 4 * D)
        self.gate = Projection(D, width) if gated else None
        self.up, self.down = Projection(D, width), Projection(width, D)

    def forward(self, x):
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))
