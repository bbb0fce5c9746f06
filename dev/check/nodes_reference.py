#!/usr/bin/env python3
"""What PyTorch computes of the course's second half: masks and scores, local-m, linear attention and the delta rule,
the LSTM with memory, glimpses, heads and dropout on the tape.

    python3 dev/check/nodes_reference.py [--seed N] [--out DIR]        default: dev/check/fixtures/attention/

For test_masks.c, test_fast_weights.c, test_nodes.c, test_tape_attention.c and test_dropout.c in dev/learn/attention.
Each mechanism is the formula of its paper, in matrices with one row a position; gradients are autograd's. Where
PyTorch has the mechanism itself (scaled_dot_product_attention; flex_attention, from 2.5 on), the formula is compared
with that first. The file is as tape_fixture.py says. Needs torch 1.13 or later.
"""

import math

import torch
import torch.nn.functional as F

from tape_fixture import Fixture

fixture = Fixture("nodes.txt", 5, __doc__)
write = fixture.write
try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    flex_attention = None
builtin = getattr(F, "scaled_dot_product_attention", getattr(F, "_scaled_dot_product_attention", None))


def rounded(*shape, scale=1.0):
    return (scale * fixture.rounded(*shape)).float().double().requires_grad_()


def case(name, inputs, results, write_inputs=True):
    """results: what is computed of inputs, both named. The loss: every result times random numbers, summed."""
    by = {label: rounded(*y.shape) for label, y in results.items()}
    for x in inputs.values():
        x.grad = None
    sum((y * by[label]).sum() for label, y in results.items()).backward()
    for label, y in results.items():
        write(f"{name}.{label}", y)
        write(f"{name}.by.{label}", by[label])
    for label, x in inputs.items():
        if write_inputs:
            write(f"{name}.{label}", x)
        write(f"{name}.d.{label}", x.grad)


def softmax(scores, mask):
    """Rows that see nothing get weights 0, where torch.softmax gives NaN."""
    empty = ~mask.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~mask & ~empty, -math.inf), -1).masked_fill(empty, 0)


# ======================================================================================================================
# masks.h: mask(b,h,i,j) and score(s,b,h,i,j) in flex_attention's form, of index tensors or of single numbers

B, H, M, N, D = 2, 2, 8, 9, 2
WIDTH, GAP, GLOBALS, REACH = 3, 2, 1, 5
lengths, prefixes = torch.tensor([6, 0]), torch.tensor([2, 5])
document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 9, 9, 9]])
slopes, cap = torch.tensor([0.25, 0.0625]), torch.tensor([1.5])
bias = rounded(H, 2 * REACH + 1)


def causal(b, h, i, j):
    return j <= i


masks = {
    "none": lambda b, h, i, j: j >= 0 * i,
    "causal": causal,
    "padding": lambda b, h, i, j: j < lengths[b],
    "window": lambda b, h, i, j: (j <= i) & (j > i - WIDTH),
    "dilated": lambda b, h, i, j: (j <= i) & (j > i - WIDTH * GAP) & ((i - j) % GAP == 0),
    "global": lambda b, h, i, j: (i < GLOBALS) | (j < GLOBALS) | ((i - j).abs() < WIDTH),
    "strided": lambda b, h, i, j: (j <= i) & torch.where(h % 2 == 0, j > i - WIDTH, (i - j) % WIDTH == 0),
    "fixed": lambda b, h, i, j: (j <= i) & torch.where(h % 2 == 0, i // WIDTH == j // WIDTH,
                                                       j % WIDTH >= WIDTH - GLOBALS),
    "prefix": lambda b, h, i, j: (j <= i) | (j < prefixes[b]),
    "documents": lambda b, h, i, j: (j <= i) & (document[b, i] == document[b, j]),
    "alibi": causal,
    "relative": lambda b, h, i, j: j >= 0 * i,
    "soft_cap": lambda b, h, i, j: (j <= i) & (j > i - WIDTH),
}
scores = {
    "alibi": lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(),
    "relative": lambda s, b, h, i, j: s + bias[h, REACH + (j - i).clamp(-REACH, REACH)],
    "soft_cap": lambda s, b, h, i, j: cap[0] * torch.tanh(s / cap[0]),
}


def compare_with_builtin(name, out, q, k, v, mask, changed):
    """Of the rows that see something."""
    sees = mask.any(-1)
    if builtin and name not in scores:
        o = builtin(q, k, v, attn_mask=mask)
        o = o[0] if isinstance(o, tuple) else o
        assert torch.allclose(o[sees], out[sees]), f"{name}: not what scaled_dot_product_attention computes"
    if flex_attention:
        blocks = create_block_mask(masks[name], B, H, M, N, device="cpu")
        o = flex_attention(q, k, v, score_mod=changed, block_mask=blocks)
        assert torch.allclose(o[sees], out[sees]), f"{name}: not what flex_attention computes"


def flex():
    q, k, v = rounded(B, H, M, D), rounded(B, H, N, D), rounded(B, H, N, D)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (B, H, M, N)), indexing="ij")
    for label, x in {"q": q, "k": k, "v": v, "lengths": lengths, "prefixes": prefixes, "document": document,
                     "slopes": slopes, "cap": cap, "bias": bias,
                     "pattern": torch.tensor([WIDTH, GAP, GLOBALS])}.items():
        write(f"masks.{label}", x)
    for name, sees in masks.items():
        s, mask, changed = q @ k.transpose(2, 3) / D**0.5, sees(b, h, i, j), scores.get(name)
        out = softmax(changed(s, b, h, i, j) if changed else s, mask) @ v
        with torch.no_grad():
            compare_with_builtin(name, out, q, k, v, mask, changed)
        inputs = {"q": q, "k": k, "v": v}
        case(name, {**inputs, "bias": bias} if name == "relative" else inputs, {"out": out}, write_inputs=False)


def local_m():
    """Luong's window around the same place, |j - i| <= 2, with the general score."""
    x = {"q": rounded(6, 4), "k": rounded(9, 3), "v": rounded(9, 2), "W": rounded(4, 3)}
    near = (torch.arange(6)[:, None] - torch.arange(9)).abs() <= 2
    case("local_m", x, {"out": softmax(x["q"] @ x["W"] @ x["k"].T, near) @ x["v"]})


# ======================================================================================================================
# fast_weights.h


def linear():
    x = {"q": rounded(11, 4), "k": rounded(11, 4), "v": rounded(11, 3)}
    similarity = ((F.elu(x["q"]) + 1) @ (F.elu(x["k"]) + 1).T).tril()
    case("linear", x, {"out": similarity @ x["v"] / similarity.sum(1, keepdim=True)})


def delta():
    """S_t = (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, out_t = S_t^T q_t"""
    x = {"q": rounded(11, 4), "k": rounded(11, 4, scale=0.5), "v": rounded(11, 3), "S0": rounded(4, 3)}
    x["beta"] = torch.rand(11).float().double().requires_grad_()
    S, out = x["S0"], []
    for q, k, v, beta in zip(x["q"], x["k"], x["v"], x["beta"]):
        S = (torch.eye(4) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)
        out.append(S.T @ q)
    case("delta", x, {"out": torch.stack(out), "S": S})


# ======================================================================================================================
# memory.h: x (steps,sequences,in); v_a is large, so that weights differ


def lstmn():
    steps, sequences, inputs, n, units = 4, 2, 3, 5, 2
    p = {"x": rounded(steps * sequences, inputs), "W": rounded(inputs, 4 * n), "U": rounded(n, 4 * n),
         "b": rounded(1, 4 * n), "W_h": rounded(n, units), "W_x": rounded(inputs, units),
         "W_s": rounded(n, units), "v_a": rounded(1, units, scale=2)}
    s = m = torch.zeros(sequences, n)
    hs, cs = [], []
    for t, x in enumerate(p["x"].reshape(steps, sequences, inputs)):
        if t > 0:
            H, C = torch.stack(hs, 1), torch.stack(cs, 1)  # (sequences,t,n)
            query = x @ p["W_x"] + s @ p["W_s"]
            w = torch.softmax(torch.tanh(H @ p["W_h"] + query[:, None]) @ p["v_a"][0], 1)[:, None]
            s, m = (w @ H)[:, 0], (w @ C)[:, 0]
        i, f, g, o = (x @ p["W"] + s @ p["U"] + p["b"]).chunk(4, 1)
        cs.append(torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(g))
        hs.append(torch.sigmoid(o) * torch.tanh(cs[-1]))
    case("lstmn", p, {"out": torch.cat(hs)})


# ======================================================================================================================
# glimpse.h


def glimpses():
    x = {"weights": rounded(3, 5), "values": rounded(15, 4)}
    case("soft", x, {"out": torch.einsum("bj,bjc->bc", x["weights"], x["values"].reshape(3, 5, 4))})

    place, advantage, entropy = torch.tensor([4, 0, 2]), torch.tensor([0.75, -1.25, 0.0]), 0.25
    s = rounded(3, 5)
    drawn = torch.distributions.Categorical(logits=s)
    case("reinforce", {"scores": s}, {"out": -(advantage * drawn.log_prob(place) + entropy * drawn.entropy()).mean()})

    s, reward = rounded(1, 6), rounded(1, 6)  # the expectation itself, over all places
    write("expectation.reward", reward)
    case("expectation", {"scores": s}, {"out": torch.softmax(s, 1) @ reward[0]})


# ======================================================================================================================
# tape_attention.h, dropout.h


def heads():
    """Causal, with a bias for each head and with rotary positions of base 100: as complex numbers, turned."""
    batch, heads, n, size = 2, 2, 5, 4
    x = {name: rounded(batch * n, heads * size) for name in "qkv"}
    bias = rounded(heads, n, n)
    angles = torch.arange(n)[:, None] * 100.0 ** (-torch.arange(size // 2) / (size // 2))

    def split(x, turned):
        x = x.reshape(batch, n, heads, size).transpose(1, 2)
        if turned:
            x = torch.view_as_complex(x.reshape(batch, heads, n, -1, 2)) * torch.polar(torch.ones_like(angles), angles)
            x = torch.view_as_real(x).flatten(3)
        return x

    q, k, v = split(x["q"], True), split(x["k"], True), split(x["v"], False)
    weights = softmax(q @ k.transpose(2, 3) / size**0.5 + bias, torch.ones(n, n, dtype=torch.bool).tril())
    write("heads.bias", bias)
    case("heads", x, {"out": (weights @ v).transpose(1, 2).reshape(batch * n, heads * size)})


def uniform(state):
    """tape.h's random numbers: SplitMix64, of which the upper bits are taken."""
    state[0] = (state[0] + 0x9E3779B97F4A7C15) % 2**64
    x = state[0]
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 41) / 2**23 + 2**-24


def dropout():
    """What the C code draws with seed 11 is drawn here, too."""
    batch, m, n, size, size_v, p = 3, 4, 7, 5, 2, 0.375
    x = {"q": rounded(batch * m, size), "k": rounded(batch * n, size), "v": rounded(batch * n, size_v)}
    q, k, v = (x[name].reshape(batch, -1, x[name].shape[1]) for name in "qkv")
    weights = torch.softmax(q @ k.transpose(1, 2) / size**0.5, 2)
    state = [11]
    kept = torch.tensor([uniform(state) >= p for _ in range(batch * m * n)]).reshape(batch, m, n)
    case("dropout", x, {"out": (weights * kept / (1 - p) @ v).reshape(batch * m, size_v)})


flex()
local_m()
linear()
delta()
lstmn()
glimpses()
heads()
dropout()
fixture.save()
