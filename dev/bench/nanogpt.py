"""The PyTorch peer: nanoGPT's published CPU recipe for character-level text, to compare times and losses with.

    python3 nanogpt.py --text FILE                     train 2,000 steps, report speed and loss
    python3 nanogpt.py --text FILE --target 2.0        also report when validation first reaches 2.0
    python3 nanogpt.py --text FILE --time-steps 50     only time 50 steps, train no further

The defaults are the recipe: 4 layers, 4 heads, 128 channels, context 64, batch 12, no dropout, no biases,
AdamW (0.9, 0.99) with decay 0.1, clipping at 1, learning rate 1e-3 falling along a cosine to 1e-4 after
100 steps of warm-up. The first 90 % of the text is trained on. Validation is the mean loss over all of the
last 10 %, cut into windows of the context's length; it is not part of any time reported.

PyTorch on a CPU is as quick as the BLAS library it calls, so the first line printed says how fast one large
matrix multiply is. Debian's python3-torch calls the unoptimised reference BLAS unless another is installed:
apt-get install libopenblas0-openmp.
"""

import argparse
import ctypes
import math
import os
import statistics
import time
import timeit

# OpenBLAS is told by these, which some machines set for every program, to take other kernels than the processor's best
# ones: without AVX-512, half as fast.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)
# A thread that waits for others spins, and may hold the core that they need. train_gpt limits that for itself; without
# a limit PyTorch too is many times slower on a machine that does anything else besides.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# glibc gives large blocks back to the system when they are freed, and a step that allocates them anew pays for every
# page again, up to a third of its time. M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = -1 let it keep them.
libc = ctypes.CDLL(None)
if hasattr(libc, "mallopt"):
    libc.mallopt(-4, 0)
    libc.mallopt(-1, -1)

import torch  # reads the environment, so it comes after
import torch.nn as nn
import torch.nn.functional as F


def layernorm(C):
    norm = nn.LayerNorm(C)
    norm.bias = None  # PyTorch 1 has no option that leaves it out
    return norm


def causal_attention(q, k, v):
    """softmax(q kT / sqrt(D)) v, each position seeing itself and those before it; q, k, v are (B,H,T,D)."""
    if hasattr(F, "scaled_dot_product_attention"):  # PyTorch 2
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T, D = q.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.H = H
        self.norm1, self.norm2 = layernorm(C), layernorm(C)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.attention_out = nn.Linear(C, C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)

    def forward(self, x):  # x (B,T,C)
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.H, C // self.H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B,H,T,D)
        y = causal_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + self.attention_out(y)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, V, T, L, H, C):
        super().__init__()
        self.token = nn.Embedding(V, C)
        self.position = nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(L))
        self.norm = layernorm(C)
        for name, w in self.named_parameters():
            if w.dim() == 2:
                # Each block adds to the stream twice: scaling keeps its variance independent of depth.
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(w, std=0.02 / math.sqrt(2 * L) if residual else 0.02)

    def forward(self, tokens, targets, reduction="mean"):  # both (B,T)
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)  # the output head is the token embedding
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def read_text(path):
    """Token tensors of the training and validation parts, vocabulary size, UTF-8 bytes scored in validation."""
    with open(path, encoding="utf-8", newline="") as f:  # newline="" keeps every byte as it is
        text = f.read()
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([index[c] for c in text])
    cut = len(text) * 9 // 10
    # The first character of the validation part is only context, never predicted.
    return tokens[:cut], tokens[cut:], len(index), len(text[cut + 1:].encode())


@torch.no_grad()
def validate(model, data, T):
    """Mean loss over all of data, each token but the first predicted exactly once."""
    total, n = 0.0, len(data) - 1
    whole = n // T * T
    inputs, targets = data[:whole].view(-1, T), data[1:whole + 1].view(-1, T)
    for x, y in zip(inputs.split(64), targets.split(64)):
        total += model(x, y, "sum").item()
    if whole < n:  # the last window is shorter
        total += model(data[None, whole:-1], data[None, whole + 1:], "sum").item()
    return total / n


def learning_rate(step, a):
    if step < a.warmup:
        return a.lr * (step + 1) / (a.warmup + 1)
    done = (step - a.warmup) / max(1, a.steps - a.warmup)
    return a.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (a.lr - a.min_lr)


def matmul_gflops(dtype=torch.float32, n=1024):
    x = torch.rand(n, n).to(dtype)
    best = min(timeit.repeat(lambda: x @ x, number=1, repeat=4))
    return 2 * n**3 / best / 1e9


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", required=True, metavar="FILE")
    for name, default in [("steps", 2000), ("layers", 4), ("heads", 4), ("channels", 128), ("context", 64),
                          ("batch", 12), ("lr", 1e-3), ("min-lr", 1e-4), ("warmup", 100), ("seed", 1337),
                          ("threads", os.cpu_count())]:
        p.add_argument("--" + name, type=type(default), default=default, metavar="N", help=f"default {default}")
    p.add_argument("--val-every", type=int, default=250, metavar="N", help="steps, default 250; 0: only at the end")
    p.add_argument("--target", type=float, metavar="LOSS", help="report when validation first reaches it")
    p.add_argument("--time-steps", type=int, metavar="N", help="time N steps after 5 untimed ones, and stop")
    a = p.parse_args()
    if a.channels % a.heads:
        p.error("--channels must be a multiple of --heads")
    if a.steps < 1:
        p.error("--steps must be at least 1")
    return a


def main():
    a = parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    train, val, V, val_bytes = read_text(a.text)
    model = GPT(V, a.context, a.layers, a.heads, a.channels)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([
        {"params": [w for w in params if w.dim() == 2], "weight_decay": 0.1},  # matrices and embeddings
        {"params": [w for w in params if w.dim() < 2], "weight_decay": 0.0},
    ], betas=(0.9, 0.99))
    window = torch.arange(a.context + 1)
    print(f"torch {torch.__version__}, {a.threads} threads, matrix multiply {matmul_gflops():.0f} GFLOP/s")
    print(f"{sum(w.numel() for w in params):,} parameters, vocabulary {V}")

    def train_step(step):
        """One step of training; returns the seconds it took."""
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, a)
        first = torch.randint(len(train) - a.context, (a.batch, 1))
        tokens = train[first + window]  # (B,T+1)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return time.perf_counter() - start

    if a.time_steps:
        seconds = [train_step(step) for step in range(5 + a.time_steps)]
        # The first steps also pay for memory and threads.
        print(f"{1000 * statistics.median(seconds[5:]):.3f} ms per step (median of {a.time_steps})")
        return

    seconds, reached = [], None
    for step in range(1, a.steps + 1):
        seconds.append(train_step(step - 1))
        if step == a.steps or (a.val_every and step % a.val_every == 0):
            loss, elapsed = validate(model, val, a.context), sum(seconds)
            print(f"step {step:5d}  {elapsed:7.1f} s  validation {loss:.4f}", flush=True)
            if a.target is not None and reached is None and loss <= a.target:
                reached = f"{elapsed:.1f} s, step {step}"
    bits = loss * (len(val) - 1) / val_bytes / math.log(2)
    print(f"{1000 * statistics.median(seconds):.3f} ms per step (median), {elapsed:.1f} s of training")
    print(f"final validation {loss:.4f} nats per character, {bits:.4f} bits per byte")
    if a.target is not None:
        print(f"validation {a.target}: {reached or 'not reached'}")


if __name__ == "__main__":
    main()
