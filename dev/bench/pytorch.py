#!/usr/bin/env python3
"""One training step in PyTorch and in train_gpt, in turn on the same machine: the same GPT-2, batch and threads.

    make build/bench
    /usr/bin/python3 dev/bench/pytorch.py --preset small          or gpt2, nanogpt; --layers N and so on change it
    some/venv/bin/python dev/bench/pytorch.py --preset small      the same with that environment's PyTorch

Both sides do all of it in float32: forward, backward, clipping, AdamW (decay on matrices and embeddings only), on
random tokens. PyTorch is run as it comes (eager), with its linear layers given to oneDNN, and with torch.compile, each
where that works; with its own attention kernel and its fused AdamW where the version has them. A round times train_gpt (build/bench), then each of these; the
ratio is the median of the rounds' ratios, since what disturbs a round disturbs all of it.

--bf16: both multiply in bfloat16 and keep everything else in float32, PyTorch by autocast, train_gpt with --precision
bf16. PyTorch's autocast also rounds activations and gradients between layers, and its attention.

On a GPU, against train_gpt.cu:

    make train_gpt_cu && python3 dev/bench/pytorch.py --device cuda --preset gpt2 --batch 16 --context 1024

Both keep weights in float32 and multiply in bfloat16. PyTorch is run as nanoGPT runs it: autocast, flash attention,
fused AdamW, TF32 where it multiplies float32, the vocabulary padded to a multiple of 128; eager, and with
torch.compile. --llmc DIR adds llm.c's train_gpt2cu, which its own Makefile has built there, on random tokens.

PyTorch on a CPU is as quick as its BLAS library: the first lines printed name it, and how fast one large matrix
multiply is. Debian's python3-torch calls the reference BLAS unless another is installed: libopenblas0-openmp.
"""

import argparse
import array
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

try:
    from nanogpt import causal_attention, matmul_gflops  # also rids the environment of what would slow PyTorch
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError as error:
    sys.exit(f"pytorch.py: {error}; apt-get install python3-torch libopenblas0-openmp, or pip install torch")

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BENCH = os.path.join(ROOT, "build", "bench")
SIZES = ("layers", "heads", "channels", "vocab", "context", "batch")
PRESETS = {"gpt2": (12, 12, 768, 50257, 64, 4), "small": (3, 4, 192, 1024, 64, 8), "nanogpt": (4, 4, 128, 65, 64, 12),
           "tiny": (2, 2, 32, 80, 32, 2)}
GPU_PRESETS = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
               "gpt2-xl": (48, 25, 1600)}


class OneDNNLinear(torch.autograd.Function):
    """F.linear through oneDNN, which PyTorch 2 holds besides MKL, but asks for float32 only in inference.

    MKL does not use AVX-512 on AMD's processors; oneDNN does, and multiplies twice as fast there.
    """

    @staticmethod
    def multiply(x, w, b=None):  # x (M,K) times w (N,K) transposed
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        ctx.bias = b is not None
        return OneDNNLinear.multiply(x, w, b)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dw = OneDNNLinear.multiply(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return OneDNNLinear.multiply(dy, w.t()), dw, rows.sum(0) if ctx.bias else None


def onednn_linear(x, w, b=None):
    return OneDNNLinear.apply(x, w, b)


def check_onednn():
    """Raises an error where oneDNN is not to be had, or is wrong."""
    results = []
    for linear in (F.linear, onednn_linear):
        torch.manual_seed(1)
        tensors = [torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 64), (96, 64), (96,))]
        y = linear(*tensors)
        results.append([y, *torch.autograd.grad((y * torch.randn(96)).sum(), tensors)])
    if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results)):
        raise RuntimeError("oneDNN's results differ")


class Block(nn.Module):
    def __init__(self, C, H, linear):
        super().__init__()
        self.H, self.linear = H, linear
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.att = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.mlp = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):  # x (B,T,C)
        B, T, C = x.shape
        qkv = self.linear(self.ln1(x), self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.view(B, T, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)  # each (B,H,T,D)
        y = causal_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + self.linear(y, self.att.weight, self.att.bias)
        y = F.gelu(self.linear(self.ln2(x), self.fc.weight, self.fc.bias), approximate="tanh")
        return x + self.linear(y, self.mlp.weight, self.mlp.bias)


class GPT(nn.Module):
    def __init__(self, a, linear):
        super().__init__()
        self.linear = linear
        self.wte, self.wpe = nn.Embedding(a.vocab + a.padding, a.channels), nn.Embedding(a.context, a.channels)
        self.blocks = nn.ModuleList(Block(a.channels, a.heads, linear) for _ in range(a.layers))
        self.lnf = nn.LayerNorm(a.channels)
        for w in self.parameters():
            if w.dim() == 2:
                nn.init.normal_(w, std=0.02)

    def forward(self, tokens, targets):  # both (B,T)
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(params):
    groups = [{"params": [w for w in params if w.dim() == 2], "weight_decay": 0.1},
              {"params": [w for w in params if w.dim() < 2], "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.99), fused=True)
    except (TypeError, RuntimeError):  # fused on CPUs came with PyTorch 2.4
        return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.99))


def make_step(a, linear=F.linear, compiled=False):
    """A function that makes one training step and returns its seconds."""
    model = GPT(a, linear).to(a.device)
    params = list(model.parameters())
    optimizer = make_optimizer(params)
    forward = torch.compile(model) if compiled else model
    wait = torch.cuda.synchronize if a.device == "cuda" else lambda: None

    def step():
        tokens = torch.randint(a.vocab, (2, a.batch, a.context), device=a.device)
        wait()
        start = time.perf_counter()
        with torch.autocast(a.device, torch.bfloat16, enabled=a.bfloat16):
            loss = forward(tokens[0], tokens[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        wait()
        seconds = time.perf_counter() - start
        if not math.isfinite(loss.item()):
            sys.exit("pytorch.py: the loss is not a number")
        return seconds

    step.parameters = sum(w.numel() for w in params) - a.padding * a.channels
    for _ in range(3):  # these also pay for memory, threads and compilation
        step()
    return step


def their_steps(a):
    def compiled():
        if not hasattr(torch, "compile"):
            raise RuntimeError(f"PyTorch {torch.__version__} does not have it")
        return make_step(a, compiled=True)

    def onednn():
        check_onednn()
        return make_step(a, onednn_linear)

    steps = {"eager": make_step(a)}
    for name, make in (("oneDNN", onednn), ("compiled", compiled)):
        if name == "compiled" and a.no_compile or name == "oneDNN" and a.bfloat16:
            continue
        try:
            steps[name] = make()
        except Exception as error:  # compiling needs a C++ compiler and Python's headers, and may fail in many ways
            print(f"skipped: {name}, {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    return steps


def median_ms(step, seconds):
    times, end = [], time.perf_counter() + seconds
    step()  # back into the caches
    while len(times) < 3 or time.perf_counter() < end:
        times.append(step())
    return 1000 * statistics.median(times)


def twins(a):
    """The same of train_gpt.cu, whose --compare ends with a table's row."""
    command = [os.path.abspath(a.twin), "--compare", "--device", "cuda", "--preset", a.preset]
    for name in ("layers", "heads", "channels", "context", "batch"):
        command += ["--" + name, str(getattr(a, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        sys.exit(f"pytorch.py: cannot run {a.twin}; `make train_gpt_cu` builds it")
    if done.returncode:
        sys.exit(f"pytorch.py: {' '.join(command)}: {done.stderr.strip()}")
    row = [cell.strip() for cell in done.stdout.strip().splitlines()[-1].strip("|").split("|")]
    return {"ms": float(row[3]), "machine": row[0], "share": row[6],
            "parameters": int(re.search(r"(\d+) parameters", done.stdout).group(1))}


def llmc(a):
    """Milliseconds of a step in llm.c's CUDA program, the median of those it prints but for the first two."""
    steps, rows = 12, a.batch * a.context
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.bin")
        count = (steps + 2) * rows + 1
        with open(path, "wb") as file:  # a shard, as described in this project's README
            array.array("i", [20240520, 1, count] + 253 * [0]).tofile(file)
            array.array("H", torch.randint(a.vocab, (count,)).tolist()).tofile(file)
        command = [os.path.join(os.path.abspath(a.llmc), "train_gpt2cu"), "-e", f"d{a.layers}", "-i", path, "-j", path,
                   "-b", str(a.batch), "-t", str(a.context), "-d", str(rows), "-x", str(steps), "-v", "0", "-s", "0",
                   "-h", "0"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=a.llmc)
    times = [float(t) for t in re.findall(r"^step.*?([\d.]+) ms", done.stdout, re.M)][2:]
    if not times:
        raise RuntimeError(f"{' '.join(command)} prints no times: {(done.stderr or done.stdout).strip()[-200:]}")
    return statistics.median(times)


def cuda_matmul_tflops():
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        x @ y
        end.record()
        end.synchronize()
        best = max(best, 2 * 8192**3 / begin.elapsed_time(end) / 1e9)
    return best


def step_operations(a):  # as train_gpt.c counts them
    weights = 12 * a.channels**2 * a.layers + a.vocab * a.channels
    return 6 * (weights + a.channels * a.layers * a.context) * a.batch * a.context


def ours(a):
    """build/bench's figures for the step of the same model, timed for about as long."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench.json")
        command = [BENCH, "--json", path, "--seconds", str(a.seconds), *(["--precision", "bf16"] if a.bfloat16 else [])]
        for name in SIZES:
            command += ["--" + name, str(getattr(a, name))]
        try:
            done = subprocess.run(command, capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": str(a.threads)})
        except OSError:
            sys.exit(f"pytorch.py: cannot run {BENCH}; `make build/bench` builds it")
        if done.returncode:
            sys.exit(f"pytorch.py: {' '.join(command)}: {done.stderr.strip()}")
        with open(path) as file:
            return json.load(file)["step"]


def blas():
    """The multiply's library among those loaded. PyPI's PyTorch has MKL built in."""
    if torch.backends.mkl.is_available():
        return "MKL"
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if re.search(r"/lib(openblas|blas|blis|mkl)[^/]*$", line)}
    return ", ".join(sorted({os.path.basename(os.path.realpath(path)) for path in paths})) or "unknown"


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=sorted({*PRESETS, *GPU_PRESETS}), default="gpt2", help="default: gpt2")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--twin", default=os.path.join(ROOT, "train_gpt_cu"), metavar="FILE", help="train_gpt.cu's program")
    p.add_argument("--llmc", metavar="DIR", help="with --device cuda: a folder with llm.c's train_gpt2cu")
    for name in SIZES:
        p.add_argument("--" + name, type=int, metavar="N")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    p.add_argument("--seconds", type=float, default=2, metavar="X", help="for each in a round; default: 2")
    p.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all")
    p.add_argument("--bf16", action="store_true", help="on the CPU: multiply in bfloat16")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    a = p.parse_args()
    on_gpu, presets = a.device == "cuda", dict(PRESETS)
    a.bfloat16 = on_gpu or a.bf16
    if on_gpu:
        presets = {name: (*sizes, 50257, 1024, 16) for name, sizes in GPU_PRESETS.items()}
    if a.preset not in presets:
        p.error(f"--preset {a.preset} is not for --device {a.device}")
    if on_gpu and a.vocab:
        p.error("--vocab is GPT-2's on a GPU")
    for name, value in zip(SIZES, presets[a.preset]):
        if getattr(a, name) is None:
            setattr(a, name, value)
        if getattr(a, name) < 1:
            p.error(f"--{name} must be at least 1")
    a.padding = -a.vocab % 128 if on_gpu else 0
    if a.channels % a.heads:
        p.error("--channels must be a multiple of --heads")
    if a.rounds < 1 or a.threads < 1:
        p.error("--rounds and --threads must be at least 1")
    return a


def main():
    a = parse_args()
    torch.set_num_threads(a.threads)
    if a.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("pytorch.py: this PyTorch has no GPU to use")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        peak = cuda_matmul_tflops()
        print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}, matrix multiply {peak:.0f} TFLOP/s")
    else:
        peak = matmul_gflops(torch.bfloat16 if a.bfloat16 else torch.float32) / 1000
        print(f"PyTorch {torch.__version__}, {blas()}, {a.threads} threads, matrix multiply {1000 * peak:.0f} GFLOP/s")
    print(", ".join(f"{name} {getattr(a, name)}" for name in SIZES), flush=True)
    theirs = their_steps(a)
    times = {name: [] for name in ["train_gpt", *theirs, *(["llm.c"] if a.llmc else [])]}
    for _ in range(a.rounds):
        figures = twins(a) if a.device == "cuda" else ours(a)
        if figures["parameters"] != theirs["eager"].parameters:
            sys.exit(f"pytorch.py: different models, {figures['parameters']} parameters and "
                     f"{theirs['eager'].parameters}")
        times["train_gpt"].append(figures["ms"])
        for name, step in theirs.items():
            times[name].append(median_ms(step, a.seconds))
        if a.llmc:
            times["llm.c"].append(llmc(a))
        print("round   " + "   ".join(f"{name} {t[-1]:.2f} ms" for name, t in times.items()), flush=True)
    for name, t in times.items():
        ms = statistics.median(t)
        rate = step_operations(a) / ms / 1e9
        line = f"median  {name} {ms:.2f} ms, {rate:.3g} TFLOP/s, {100 * rate / peak:.0f}% of the multiply's"
        if name != "train_gpt":
            ratio = statistics.median(their / our for their, our in zip(t, times["train_gpt"]))
            line += f": train_gpt is {ratio:.2f} times as fast"
        print(line)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # no memory, as a rule
        sys.exit(f"pytorch.py: {str(error).splitlines()[0]}")
