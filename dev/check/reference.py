#!/usr/bin/env python3
"""The model of train_gpt.c in plain PyTorch: what the C code is tested against.

    python3 dev/check/reference.py                        write dev/check/fixtures/ anew
    python3 dev/check/reference.py --seed 7 --out DIR     fixtures from other random numbers
    python3 dev/check/reference.py --check                compare this model with Hugging Face's GPT-2

It is meant to be read beside train_gpt.c: the same parts in the same order, tensors under the same names, nothing
fused. Gradients come from autograd, so no derivative is written here. The C code is float32; the truth here is
float64. How far PyTorch's own float32 is from that truth is recorded too: it says what float32 can be asked for.

Needs torch (1.13 or later) and numpy; --check needs transformers.

A fixture is a safetensors file of F32 tensors, read by the C code's own reader:

    wte.weight, h.0.ln_1.weight, ...      parameters, under Hugging Face's names, matrices stored [in,out]
    tokens, targets                       (B,T)
    embedded, h.0.ln1, ..., losses        activations, under the names of the table in train_gpt.c
    h.0.scores, h.0.weights               attention's q.k/sqrt(D), before the mask, and its softmax (B,H,T,T)
    d.NAME                                gradient of the mean loss by a parameter or an activation
    run.tokens, run.targets               (steps,accumulate,B,T): batches of an AdamW run from the parameters above
    run.rates, run.losses, run.norms      (steps): learning rate, mean loss, norm of the gradient before clipping
    run.NAME                              parameters at the end of that run
    NAME.error                            relative error |float32 - float64| / |float64| of PyTorch (Euclidean norms)

Values are float64 results rounded to float32. That rounding is a relative error of 2^-25 in the mean, 3e-8, well
under what is tolerated of float32 arithmetic anywhere.
"""

import argparse
import json
import math
import os
import struct
import sys

import numpy as np
import torch

# ======================================================================================================================
# Layers


def embedding(tokens, wte, wpe):
    return wte[tokens] + wpe[: tokens.shape[1]]


def layernorm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    rstd = 1 / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)
    return (x - mean) * rstd * w + b, mean, rstd


def linear(x, w, b):
    return x @ w + b


def attention(qkv, H):
    """qkv (B,T,3C) -> out (B,T,C), lse (B,T,H), scores and weights (B,H,T,T)."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (x.reshape(B, T, H, C // H).transpose(1, 2) for x in qkv.split(C, dim=2))  # each (B,H,T,D)
    scores = q @ k.transpose(2, 3) / math.sqrt(C // H)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    masked = scores.masked_fill(future, -math.inf)
    weights = torch.softmax(masked, dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(B, T, C)
    lse = torch.logsumexp(masked, dim=-1).transpose(1, 2)
    return out, lse, scores, weights


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def cross_entropy(logits, targets):
    lse = torch.logsumexp(logits, dim=-1)
    return lse - logits.gather(2, targets[:, :, None])[:, :, 0], lse


# ======================================================================================================================
# Model


class Config:
    def __init__(self, V, T, C, H, L, B):
        self.V, self.T, self.C, self.H, self.L, self.B = V, T, C, H, L, B


def parameter_shapes(c):
    """{name: shape}, in the order of the table in train_gpt.c."""
    shapes = {"wte.weight": (c.V, c.C), "wpe.weight": (c.T, c.C)}
    block = {
        "ln_1.weight": (c.C,),
        "ln_1.bias": (c.C,),
        "attn.c_attn.weight": (c.C, 3 * c.C),
        "attn.c_attn.bias": (3 * c.C,),
        "attn.c_proj.weight": (c.C, c.C),
        "attn.c_proj.bias": (c.C,),
        "ln_2.weight": (c.C,),
        "ln_2.bias": (c.C,),
        "mlp.c_fc.weight": (c.C, 4 * c.C),
        "mlp.c_fc.bias": (4 * c.C,),
        "mlp.c_proj.weight": (4 * c.C, c.C),
        "mlp.c_proj.bias": (c.C,),
    }
    for name, shape in block.items():
        shapes.update({f"h.{l}.{name}": shape for l in range(c.L)})
    return {**shapes, "ln_f.weight": (c.C,), "ln_f.bias": (c.C,)}


def random_parameters(c, rng):
    """Not as training starts, but as a test needs them: no zeros and ones, and attention far from uniform."""
    parameters = {}
    for name, shape in parameter_shapes(c).items():
        if name.endswith("bias"):
            mean, std = 0, 0.2
        elif len(shape) == 1:  # of a layernorm
            mean, std = 1, 0.2
        else:
            mean, std = 0, 0.5 if name.startswith("w") else 1.2 / math.sqrt(shape[0])
        parameters[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    return parameters


def leaves(parameters, dtype):
    return {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in parameters.items()}


def forward(w, c, tokens, targets, keep=lambda name, x: x):
    """The mean loss. keep(name, x) is shown every activation."""
    x = keep("embedded", embedding(tokens, w["wte.weight"], w["wpe.weight"]))
    for l in range(c.L):

        def of(name):
            return w[f"h.{l}.{name}.weight"], w[f"h.{l}.{name}.bias"]

        def note(name, value):
            return keep(f"h.{l}.{name}", value)

        ln1, mean, rstd = layernorm(x, *of("ln_1"))
        note("ln1", ln1), note("ln1_mean", mean), note("ln1_rstd", rstd)
        qkv = note("qkv", linear(ln1, *of("attn.c_attn")))
        att, lse, scores, weights = attention(qkv, c.H)
        note("att", att), note("lse", lse), note("scores", scores), note("weights", weights)
        mid = note("mid", x + linear(att, *of("attn.c_proj")))
        ln2, mean, rstd = layernorm(mid, *of("ln_2"))
        note("ln2", ln2), note("ln2_mean", mean), note("ln2_rstd", rstd)
        fc = note("fc", linear(ln2, *of("mlp.c_fc")))
        gelu_ = note("gelu", gelu(fc))
        x = note("out", mid + linear(gelu_, *of("mlp.c_proj")))
    lnf, mean, rstd = layernorm(x, w["ln_f.weight"], w["ln_f.bias"])
    keep("lnf", lnf), keep("lnf_mean", mean), keep("lnf_rstd", rstd)
    logits = keep("logits", lnf @ w["wte.weight"].T)
    losses, lse = cross_entropy(logits, targets)
    keep("logits_lse", lse), keep("losses", losses)
    return losses.mean()


def is_statistic(name):
    """These are parts of a layer, not steps between layers: nobody asks for their gradients."""
    return name.endswith(("_mean", "_rstd", "lse", "losses"))


def one_pass(parameters, c, tokens, targets, dtype):
    """Activations, and gradients d.NAME, as {name: array}."""
    w, kept = leaves(parameters, dtype), {}

    def keep(name, x):
        if not is_statistic(name):
            x.retain_grad()
        kept[name] = x
        return x

    forward(w, c, tokens, targets, keep).backward()
    gradients = {f"d.{name}": x.grad for name, x in {**w, **kept}.items() if not is_statistic(name)}
    return {name: x.detach().numpy() for name, x in {**kept, **gradients}.items()}


# ======================================================================================================================
# Training

# Under the names of train_gpt's options. The clip lies amid the norms that occur, so that some steps are clipped.
OPTIONS = {
    "--steps": 20,
    "--accumulate": 2,
    "--lr": 1e-2,
    "--min-lr": 1e-3,
    "--warmup": 5,
    "--weight-decay": 0.1,
    "--beta1": 0.9,
    "--beta2": 0.95,
    "--clip": 1.5,
}


def learning_rate(step):  # counted from 1
    o = OPTIONS
    if step <= o["--warmup"]:
        return o["--lr"] * step / o["--warmup"]
    progress = min(1, (step - o["--warmup"]) / (o["--steps"] - o["--warmup"]))
    return o["--min-lr"] + 0.5 * (o["--lr"] - o["--min-lr"]) * (1 + math.cos(math.pi * progress))


def train(parameters, c, tokens, targets, dtype):
    """A run on tokens (steps,accumulate,B,T). What it leaves, as {run.NAME: array}."""
    o, w = OPTIONS, leaves(parameters, dtype)
    groups = [
        {"params": [x for x in w.values() if x.dim() == 2], "weight_decay": o["--weight-decay"]},
        {"params": [x for x in w.values() if x.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o["--beta1"], o["--beta2"]), eps=1e-8)
    rates, losses, norms = [], [], []
    for step in range(o["--steps"]):
        rates.append(learning_rate(step + 1))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.zero_grad()
        mean = 0.0
        for i in range(o["--accumulate"]):
            loss = forward(w, c, tokens[step, i], targets[step, i]) / o["--accumulate"]
            loss.backward()
            mean += loss.item()
        losses.append(mean)
        norms.append(torch.nn.utils.clip_grad_norm_(w.values(), o["--clip"]).item())
        optimizer.step()
    run = {"run.rates": np.array(rates), "run.losses": np.array(losses), "run.norms": np.array(norms)}
    for name, x in w.items():
        x = x.detach().numpy()
        # A bias of all keys shifts a query's scores alike and changes nothing: its gradient is zero but for rounding,
        # which Adam divides by itself. Where these numbers go is chance, so they are left out.
        run[f"run.{name}"] = np.concatenate([x[: c.C], x[2 * c.C :]]) if name.endswith("c_attn.bias") else x
    return run


# ======================================================================================================================
# Fixtures

# name: sizes, which tensors beyond parameters, inputs, their gradients and the run's curves
FIXTURES = {
    "odd": (Config(V=17, T=7, C=12, H=3, L=2, B=2), {"activations", "scores", "run"}),  # no size is round
    "one": (Config(V=5, T=1, C=8, H=2, L=1, B=1), {"activations", "scores"}),  # a single token
    "tile63": (Config(V=11, T=63, C=8, H=2, L=1, B=1), {"activations"}),  # around attention's tile of 64
    "tile64": (Config(V=11, T=64, C=8, H=2, L=1, B=1), {"activations"}),
    "tile65": (Config(V=11, T=65, C=8, H=2, L=1, B=1), {"activations", "scores"}),
    "tile130": (Config(V=11, T=130, C=8, H=2, L=1, B=1), {"activations"}),  # three tiles
    "wide": (Config(V=101, T=128, C=64, H=4, L=3, B=1), {"run"}),  # more of everything
}


def wanted(name, parts):
    base = name[2:] if name.startswith("d.") else name
    if name.startswith("run."):
        return "run" in parts and ("activations" in parts or name in ("run.rates", "run.losses", "run.norms"))
    if base.endswith((".scores", ".weights")):
        return "scores" in parts
    return "activations" in parts or base.endswith((".weight", ".bias", "logits", "losses", "embedded"))


def compute(c, parts, seed, dtypes):
    """Inputs, and for each dtype the results, as {name: array}."""
    rng = np.random.default_rng(seed)
    parameters = random_parameters(c, rng)
    steps, accumulate = OPTIONS["--steps"], OPTIONS["--accumulate"]
    # Each target is the token after: in a row of T + 1.
    text = rng.integers(0, c.V, (c.B, c.T + 1))
    run_text = rng.integers(0, c.V, (steps, accumulate, c.B, c.T + 1))
    inputs = {"tokens": text[:, :-1], "targets": text[:, 1:]}
    if "run" in parts:
        inputs.update({"run.tokens": run_text[..., :-1], "run.targets": run_text[..., 1:]})
    results = []
    for dtype in dtypes:
        t = {name: torch.tensor(x) for name, x in inputs.items()}
        result = one_pass(parameters, c, t["tokens"], t["targets"], dtype)
        if "run" in parts:
            result.update(train(parameters, c, t["run.tokens"], t["run.targets"], dtype))
        results.append({name: x for name, x in result.items() if wanted(name, parts)})
    return {**parameters, **inputs}, results


def relative_error(x, truth):
    norm = np.linalg.norm(truth)
    return np.linalg.norm(x.astype(np.float64) - truth) / norm if norm > 0 else 0.0


def write_safetensors(path, tensors, metadata):
    header, at = {"__metadata__": metadata}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + 4 * x.size]}
        at += 4 * x.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            f.write(np.ascontiguousarray(x, dtype="<f4").tobytes())


def write_fixture(path, c, parts, seed):
    errors = {}
    # One float32 run may be right by luck, most of all in a tensor of few numbers. The largest error of eight is not.
    for other in range(seed, seed + 8):
        _, (single, double) = compute(c, parts, other, [torch.float32, torch.float64])
        for name in double:
            errors[name] = max(errors.get(name, 0), relative_error(single[name], double[name]))
    inputs, (truth,) = compute(c, parts, seed, [torch.float64])
    tensors = {**inputs, **truth}
    tensors.update({f"{name}.error": np.array([error]) for name, error in errors.items()})
    metadata = {"--heads": str(c.H), "seed": str(seed)}
    metadata.update({name: repr(value) for name, value in OPTIONS.items()})
    write_safetensors(path, tensors, metadata)
    worst = max(errors, key=errors.get)
    print(f"{path}: {len(truth)} results, largest error of float32 {errors[worst]:.1e} in {worst}")


# ======================================================================================================================
# Against Hugging Face's GPT-2


def check(seed):
    import transformers

    worst = 0
    for name, (c, _) in FIXTURES.items():
        rng = np.random.default_rng(seed)
        w = leaves(random_parameters(c, rng), torch.float64)
        text = torch.tensor(rng.integers(0, c.V, (c.B, c.T + 1)))
        tokens, targets = text[:, :-1], text[:, 1:]
        config = transformers.GPT2Config(
            vocab_size=c.V, n_positions=c.T, n_embd=c.C, n_layer=c.L, n_head=c.H, bos_token_id=0, eos_token_id=0
        )
        theirs = transformers.GPT2LMHeadModel(config).double()
        theirs.eval()  # no dropout
        theirs.transformer.load_state_dict({n: x.detach() for n, x in w.items()}, strict=False)
        kept = {}
        loss = forward(w, c, tokens, targets, lambda n, x: kept.setdefault(n, x))
        loss.backward()
        logits = theirs(tokens).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, c.V), targets.reshape(-1)).backward()
        pairs = [("logits", kept["logits"], logits)]
        pairs += [(f"d.{n}", w[n].grad, x.grad) for n, x in theirs.transformer.named_parameters()]
        difference = max(float((a - b).detach().abs().max()) for _, a, b in pairs)
        print(f"{name:8} logits and {len(pairs) - 1} gradients: largest difference {difference:.1e}")
        worst = max(worst, difference)
    if not worst < 1e-10:
        sys.exit("reference.py: this model and Hugging Face's GPT-2 differ")


def main():
    parser = argparse.ArgumentParser(description="Writes what the C code is tested against.")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--out", default=os.path.join(here, "fixtures"), help="folder for the fixtures")
    parser.add_argument("--seed", type=int, default=1, help="of parameters and tokens")
    parser.add_argument("--check", action="store_true", help="compare with Hugging Face's GPT-2 instead")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the sizes are small, and sums keep their order
    if args.check:
        return check(args.seed)
    os.makedirs(args.out, exist_ok=True)
    for name, (c, parts) in FIXTURES.items():
        write_fixture(os.path.join(args.out, f"{name}.safetensors"), c, parts, args.seed)


if __name__ == "__main__":
    main()
