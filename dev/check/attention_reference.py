#!/usr/bin/env python3
"""The mechanisms of dev/learn/attention/attention.h in plain PyTorch: what the C code is tested against.

    python3 dev/check/attention_reference.py                        write dev/check/fixtures/attention/ anew
    python3 dev/check/attention_reference.py --seed 7 --out DIR     fixtures from other random numbers

To be read beside attention.h: the same rooms in the same order. Gradients come from autograd, so no derivative is
written here; where PyTorch has the mechanism itself, what is written here is compared with that first. The truth is
float64. A fixture is a text file of tensors:

    CASE.NAME error sizes    general.dq 1.3e-07 5 4
    numbers                  0.123456789 ...

with inputs (q, k, v, the score's parameters, mask, dout), the results (out, weights, ...), and for each input d + its
name, the gradient of sum(out * dout). All numbers are float64 results rounded to float32. The error says what float32
can be asked for: the largest |float32 - float64| / |float64| (Euclidean norms) of PyTorch's own float32 in eight runs,
each from inputs that are changed by up to one unit in the last place.

Needs torch (1.13 or later) and numpy.
"""

import argparse
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent

# ======================================================================================================================
# Scores


def score(kind, q, k, p):
    """q (m,dq), k (n,dk), parameters p -> scores (m,n)"""
    if kind == "dot":
        s = q @ k.T
    elif kind == "scaled_dot":
        s = q @ k.T / math.sqrt(k.shape[1])
    elif kind == "general":
        s = q @ p["W"] @ k.T
    elif kind == "additive":
        s = torch.tanh((q @ p["W_q"])[:, None, :] + (k @ p["W_k"])[None, :, :]) @ p["v_a"]
    elif kind == "concat":  # as it is written in the paper: of the two vectors joined
        m, n = q.shape[0], k.shape[0]
        pairs = torch.cat([q[:, None, :].expand(m, n, -1), k[None, :, :].expand(m, n, -1)], dim=2)
        s = torch.tanh(pairs @ p["W"]) @ p["v_a"]
    elif kind == "cosine":
        s = p["beta"] * F.cosine_similarity(q[:, None, :], k[None, :, :], dim=2, eps=1e-30)
    elif kind == "location":
        s = (q @ p["W"])[:, : k.shape[0]]
    return s + p["bias"] if "bias" in p else s


def parameter_shapes(kind, m, n, dq, dk, h):
    return {
        "dot": {},
        "scaled_dot": {},
        "general": {"W": (dq, dk)},
        "additive": {"W_q": (dq, h), "W_k": (dk, h), "v_a": (h,)},
        "concat": {"W": (dq + dk, h), "v_a": (h,)},
        "cosine": {"beta": (1,)},
        "location": {"W": (dq, h)},
    }[kind]


# ======================================================================================================================
# Masks and softmax


def softmax(scores, mask):
    """Rows that see nothing get weights 0, where torch.softmax gives NaN."""
    empty = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~mask & ~empty, -math.inf), dim=-1)
    return weights.masked_fill(empty, 0)


def all_seen(m, n):
    return torch.ones(m, n, dtype=torch.bool)


def causal(m, n):
    return all_seen(m, n).tril()


def random_mask(m, n, rng):
    """About half is seen; of the second row nothing, of the third everything."""
    mask = torch.tensor(rng.random((m, n)) < 0.5)
    mask[1 % m], mask[2 % m] = False, True
    return mask


# ======================================================================================================================
# The mechanisms


def attention(kind, q, k, v, p, mask):
    weights = softmax(score(kind, q, k, p), mask)
    return weights @ v, weights


def multi_head(q, k, v, p, mask):
    """W_q (heads,dq,D), W_k (heads,dk,D), W_v (heads,dv,D), W_o (heads,D,dout) -> out (m,dout), weights (heads,m,n)"""
    found, weights = [], []
    for h in range(len(p["W_q"])):
        bias = {"bias": p["bias"][h]} if "bias" in p else {}
        o, w = attention("scaled_dot", q @ p["W_q"][h], k @ p["W_k"][h], v @ p["W_v"][h], bias, mask)
        found.append(o)
        weights.append(w)
    return torch.cat(found, dim=1) @ p["W_o"].flatten(0, 1), torch.stack(weights)


def local(kind, q, k, v, p, D):
    """Luong's local-p: W_p (dq,h_p), v_p (h_p) -> out, weights, aligned (m,n), centers (m)"""
    n = k.shape[0]
    centers = (n - 1) * torch.sigmoid(torch.tanh(q @ p["W_p"]) @ p["v_p"])
    distance = torch.arange(n)[None, :] - centers[:, None]
    aligned = softmax(score(kind, q, k, p), distance.abs() <= D)
    weights = aligned * torch.exp(-(distance**2) / (2 * (D / 2) ** 2))
    return weights @ v, weights, aligned, centers


def linear(q, k, v, mask):
    """As a matrix of weights, which the C code never makes."""
    similarity = ((F.elu(q) + 1) @ (F.elu(k) + 1).T) * mask
    return similarity @ v / similarity.sum(1, keepdim=True)


# ======================================================================================================================
# Cases


class Fixtures:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.text = []

    def normal(self, *shape, std=1.0):
        return torch.tensor(std * self.rng.standard_normal(shape)).float().double().requires_grad_()

    def write(self, case, name, tensor, error=0.0):
        x = tensor.detach().numpy()
        numbers = " ".join(f"{v:.9g}" for v in x.astype(np.float32).ravel())
        self.text.append(f"{case}.{name} {error:.2g} {' '.join(map(str, x.shape))}\n{numbers}\n")

    def write_case(self, case, inputs, run, **others):
        """run(inputs) gives a dictionary of results, the first of them being what dout weighs."""
        dout = self.normal(*next(iter(run(inputs).values())).shape)

        def results_and_gradients(inputs, dout):
            results = run(inputs)
            (next(iter(results.values())) * dout).sum().backward()
            gradients = {"d" + name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
            return {name: x.detach() for name, x in {**results, **gradients}.items()}

        truth = results_and_gradients(inputs, dout)
        error = dict.fromkeys(truth, 0.0)
        for _ in range(8):
            nudged = {name: self.nudged(x).requires_grad_() for name, x in inputs.items()}
            for name, x in results_and_gradients(nudged, dout.detach().float()).items():
                finite = truth[name].isfinite()
                norm = truth[name][finite].norm().item()
                difference = (x.double() - truth[name])[finite].norm().item()
                error[name] = max(error[name], difference / norm if norm > 1e-6 else difference)
        for name, x in {**others, **inputs, "dout": dout}.items():
            self.write(case, name, x)
        for name, x in truth.items():
            self.write(case, name, x, error[name])

    def nudged(self, x):
        return (x.detach() * torch.tensor(1 + 2.0**-23 * self.rng.uniform(-1, 1, x.shape))).float()

    def qkv(self, m, n, dq, dk, dv):
        return {"q": self.normal(m, dq), "k": self.normal(n, dk), "v": self.normal(n, dv)}

    def score_case(self, case, kind, m, n, dq, dk, dv, h, mask, bias=False):
        x = self.qkv(m, n, dq, dk, dv)
        p = {name: self.normal(*shape) for name, shape in parameter_shapes(kind, m, n, dq, dk, h).items()}
        if bias:
            p["bias"] = self.normal(m, n)

        def run(x):
            out, weights = attention(kind, x["q"], x["k"], x["v"], x, mask)
            return {"out": out, "weights": weights}

        self.write_case(case, {**x, **p}, run, mask=mask)

    def scores(self):
        for kind in ("dot", "scaled_dot", "general", "additive", "concat", "cosine", "location"):
            same = kind in ("dot", "scaled_dot", "cosine")  # the query is as long as the key
            self.score_case(kind, kind, 5, 7, 6 if same else 4, 6, 3, 9, random_mask(5, 7, self.rng), bias=same)
            self.score_case(kind + "_all", kind, 4, 3, 5, 5, 2, 3, all_seen(4, 3), bias=not same)
            self.score_case(kind + "_one_query", kind, 1, 6, 3, 3, 4, 6, all_seen(1, 6))
            self.score_case(kind + "_one_key", kind, 3, 1, 2, 2, 5, 1, all_seen(3, 1))
            self.score_case(kind + "_one", kind, 1, 1, 1, 1, 1, 1, all_seen(1, 1))

    def heads(self):
        for case, m, n, dq, dk, dv, heads, D, dout, mask in (
            ("heads", 5, 7, 6, 4, 3, 3, 2, 5, random_mask(5, 7, self.rng)),
            ("heads_self", 6, 6, 8, 8, 8, 2, 4, 8, causal(6, 6)),
            ("heads_one", 1, 1, 1, 1, 1, 1, 1, 1, all_seen(1, 1)),
        ):
            x = self.qkv(m, n, dq, dk, dv)
            p = {"W_q": self.normal(heads, dq, D), "W_k": self.normal(heads, dk, D)}
            p.update(W_v=self.normal(heads, dv, D), W_o=self.normal(heads, D, dout))
            if case == "heads":
                p["bias"] = self.normal(heads, m, n)
            if case == "heads_self":
                self.compare_with_module(x, p, mask, *multi_head(x["q"], x["k"], x["v"], p, mask))

            def run(x, mask=mask):
                out, weights = multi_head(x["q"], x["k"], x["v"], x, mask)
                return {"out": out, "weights": weights}

            self.write_case(case, {**x, **p}, run, mask=mask)

    @staticmethod
    def compare_with_module(x, p, mask, out, weights):
        """nn.MultiheadAttention keeps the transposed projections of all heads one below the other."""
        heads, dq, D = p["W_q"].shape
        module = torch.nn.MultiheadAttention(dq, heads, bias=False).double()
        with torch.no_grad():
            joined = [p[name].transpose(1, 2).reshape(heads * D, dq) for name in ("W_q", "W_k", "W_v")]
            module.in_proj_weight.copy_(torch.cat(joined))
            module.out_proj.weight.copy_(p["W_o"].flatten(0, 1).T)
            args = [x[name][:, None, :] for name in "qkv"]
            o, w = module(*args, attn_mask=~mask, average_attn_weights=False)
        assert torch.allclose(o[:, 0], out) and torch.allclose(w[0], weights), "not what nn.MultiheadAttention computes"

    def locals(self):
        for case, kind, m, n, D in (
            ("local", "general", 6, 9, 2), ("local_dot", "dot", 5, 12, 1), ("local_wide", "general", 3, 4, 5),
            ("local_one_key", "dot", 2, 1, 1),
        ):
            dq = 5 if kind == "dot" else 4
            x = self.qkv(m, n, dq, 5, 3)
            p = {name: self.normal(*shape) for name, shape in parameter_shapes(kind, m, n, dq, 5, 0).items()}
            p.update(W_p=self.normal(dq, 6), v_p=self.normal(6))

            def run(x, kind=kind, D=D):
                out, weights, aligned, centers = local(kind, x["q"], x["k"], x["v"], x, D)
                return {"out": out, "weights": weights, "aligned": aligned, "centers": centers}

            self.write_case(case, {**x, **p}, run, D=torch.tensor([float(D)]))

    def flash(self):
        """Sizes around those of attention.h's tile of 32. PyTorch's own function is asked where rows are not empty."""
        sizes = (("flash", 33, 65, 5, 3), ("flash_causal", 64, 64, 3, 2), ("flash_masked", 31, 40, 4, 3))
        for case, m, n, dk, dv in sizes:
            x = self.qkv(m, n, dk, dk, dv)
            mask = {"flash": all_seen(m, n), "flash_causal": causal(m, n)}.get(case)
            mask = random_mask(m, n, self.rng) if mask is None else mask
            if case == "flash_masked":
                mask[:, :32] &= torch.arange(m)[:, None] % 3 > 0  # of some rows a whole tile is not seen

            def run(x, mask=mask):
                scores = score("scaled_dot", x["q"], x["k"], {})
                lse = torch.logsumexp(scores.masked_fill(~mask, -math.inf), dim=1)
                return {"out": attention("scaled_dot", x["q"], x["k"], x["v"], {}, mask)[0], "lse": lse}

            builtin = getattr(F, "scaled_dot_product_attention", getattr(F, "_scaled_dot_product_attention", None))
            if builtin and mask.any(1).all():
                o = builtin(*(x[name][None, None] for name in "qkv"), attn_mask=mask)
                o = o[0] if isinstance(o, tuple) else o
                assert torch.allclose(o[0, 0], run(x)["out"]), "not what scaled_dot_product_attention computes"
            self.write_case(case, x, run, mask=mask)

    def linears(self):
        sizes = (("linear", 5, 8), ("linear_causal", 9, 9), ("linear_causal_more_keys", 4, 7), ("linear_one", 1, 1))
        for case, m, n in sizes:
            x = self.qkv(m, n, 4, 4, 3)
            mask = causal(m, n) if "causal" in case else all_seen(m, n)
            self.write_case(case, x, lambda x, mask=mask: {"out": linear(x["q"], x["k"], x["v"], mask)})

    def positions(self):
        """Rotary positions as the multiplication of complex numbers."""
        t, pairs = torch.arange(7.0).double(), torch.arange(3).double()
        angles = t[:, None] * 10000 ** (-pairs / 3)
        turns = torch.polar(torch.ones(7, 3).double(), angles + 2 * 10000 ** (-pairs / 3))

        def run(x):
            x = torch.view_as_complex(x["x"].view(7, 3, 2))
            return {"out": torch.view_as_real(x * turns.to(x.dtype)).flatten(1)}

        self.write_case("rotary", {"x": self.normal(7, 6)}, run)
        self.write("positions", "out", torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))


def main():
    parser = argparse.ArgumentParser(description="Writes what test_attention.c compares attention.h with.")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the random numbers, default: 1")
    parser.add_argument("--out", default=HERE / "fixtures" / "attention", type=pathlib.Path, metavar="DIR")
    options = parser.parse_args()

    fixtures = Fixtures(options.seed)
    fixtures.scores()
    fixtures.heads()
    fixtures.locals()
    fixtures.flash()
    fixtures.linears()
    fixtures.positions()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention.txt").write_text("".join(fixtures.text))
    print(f"{options.out / 'attention.txt'}: {len(fixtures.text)} tensors")


if __name__ == "__main__":
    main()
