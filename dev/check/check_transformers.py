#!/usr/bin/env python3
"""Are the logits of train_gpt, and its attention, those of Hugging Face's GPT-2, for the same files?

    python3 dev/check/check_transformers.py

Needs torch and transformers (dev/requirements.txt), and gcc. Two ways are compared, each for all positions:

  in   a random GPT-2 saved by transformers, as F32, F16 and BF16, is read by the C code;
  out  a model trained a little by ./train_gpt and written with --export is opened by transformers.

In float32 the two must agree within 1e-4. Weights saved in 16 bits are computed with in float32 on both sides, so the
same holds for them.

And attention's weights, of every head of a random GPT-2: the page of --attention has what it takes to compute those of
the chosen head anew, and they must be transformers' output_attentions within 1e-5.
"""

import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BUILD = os.path.join(ROOT, "build")
LIMIT = 1e-4
FLAGS = "-std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp".split()


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def build(program, source, *flags):
    os.makedirs(BUILD, exist_ok=True)
    path = os.path.join(BUILD, program)
    run("gcc", *FLAGS, *flags, source, "-o", path, "-lm")
    return path


def c_logits(logits, model, tokens):
    text = run(logits, model, input=" ".join(map(str, tokens)))
    return torch.tensor([[float(x) for x in line.split()] for line in text.splitlines()])


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0]


def compare(what, ours, theirs):
    difference = float((ours - theirs).abs().max())
    size = float(theirs.abs().max())
    print(f"{what:12} largest difference {difference:.1e} (largest logit {size:.1f})")
    # NaN fails too.
    return ours.shape == theirs.shape and difference < LIMIT


def random_model(seed, V, T, C, H, L):
    """Unlike a fresh GPT-2, one in which every parameter counts."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_head=H, n_layer=L, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias"):
                x.normal_(0, 0.2)
            elif "ln_" in name:
                x.normal_(1, 0.2)
            else:
                x.normal_(0, 0.1 if "wte" in name or "wpe" in name else C**-0.5)
    return model


def attention(train_gpt, work):
    """Whether the weights of all heads agree. Of a token a byte, in a text where some come again."""
    T, C, H, L = 40, 48, 4, 3
    text = "the cat and the dog, the dog and the cat"
    model = random_model(9, 256, T, C, H, L)
    folder, data, page = (os.path.join(work, name) for name in ("attention", "bytes", "attention.html"))
    model.save_pretrained(folder, safe_serialization=True)
    file = os.path.join(work, "bytes.txt")
    with open(file, "w") as f:
        f.write(text * 100)
    run(sys.executable, os.path.join(ROOT, "prepare_data.py"), "--tokenizer", "bytes", "--out", data, file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        theirs = theirs.eval()(torch.tensor([list(text.encode())]), output_attentions=True).attentions
    worst, n = 0.0, len(text)
    for l in range(L):
        for h in range(H):
            look = ("--layer", str(l), "--head", str(h), "--html", page)
            run(train_gpt, "--data", data, "--init", folder, "--attention", text, *look, cwd=ROOT)
            with open(page, encoding="utf-8") as f:
                chosen = json.loads(re.search(r'id="data">(.*?)</script>', f.read(), re.S).group(1))["chosen"]
            numbers = lambda name: torch.tensor(numpy.frombuffer(base64.b64decode(chosen[name]), "<f4").copy())
            scores, lse = numbers("scores").reshape(n, n), numbers("lse").reshape(n, 1)
            ours = torch.exp(scores / (C / H) ** 0.5 - lse).tril()
            worst = max(worst, float((ours - theirs[l][0, h]).abs().max()))
    print(f"attention's weights: largest difference {worst:.1e}, in {L * H} heads")
    return worst <= 1e-5


def in_half(folder, half, dtype):
    """A copy of a saved model with its weights in 16 bits."""
    os.makedirs(half)
    shutil.copy(os.path.join(folder, "config.json"), half)
    weights = load_file(os.path.join(folder, "model.safetensors"))
    weights = {name: x.to(dtype) for name, x in weights.items()}
    save_file(weights, os.path.join(half, "model.safetensors"), metadata={"format": "pt"})


def trained(work, train_gpt):
    """A checkpoint as train_gpt leaves it, the optimiser's state beside the weights."""
    text, data, checkpoint = (os.path.join(work, name) for name in ("text", "data", "trained.safetensors"))
    with open(text, "w") as f:
        f.write("The quick brown fox jumps over the lazy dog. " * 500)
    run(sys.executable, os.path.join(ROOT, "prepare_data.py"), "--tokenizer", "bytes", "--out", data, text)
    sizes = "--layers 3 --heads 3 --channels 96 --context 48 --steps 60 --batch 4".split()
    run(train_gpt, "--data", data, "--checkpoint", checkpoint, *sizes)
    return checkpoint


def main():
    good = True
    train_gpt = build("train_gpt", os.path.join(ROOT, "train_gpt.c"))
    logits = build("logits", os.path.join(HERE, "logits.c"))
    sizes = [(17, 7, 12, 3, 2), (101, 128, 64, 4, 3), (1000, 200, 128, 2, 2)]
    with tempfile.TemporaryDirectory() as work:
        for i, (V, T, C, H, L) in enumerate(sizes):
            print(f"vocabulary {V}, context {T}, channels {C}, heads {H}, layers {L}")
            model = random_model(i, V, T, C, H, L)
            random.seed(i)
            tokens = [random.randrange(V) for _ in range(T)]
            folder = os.path.join(work, f"model{i}")
            model.save_pretrained(folder, safe_serialization=True)
            good &= compare("  in, F32", c_logits(logits, folder, tokens), their_logits(model, tokens))
            for name, dtype in ("F16", torch.float16), ("BF16", torch.bfloat16):
                half = os.path.join(work, f"model{i}.{name}")
                in_half(folder, half, dtype)
                theirs = transformers.AutoModelForCausalLM.from_pretrained(half).float()
                good &= compare(f"  in, {name}", c_logits(logits, half, tokens), their_logits(theirs, tokens))
            exported = os.path.join(work, f"exported{i}")
            run(train_gpt, "--init", folder, "--export", exported)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
            good &= compare("  in and out", their_logits(theirs, tokens), their_logits(model, tokens))
        print("trained by train_gpt")
        checkpoint, exported = trained(work, train_gpt), os.path.join(work, "exported")
        run(train_gpt, "--checkpoint", checkpoint, "--export", exported)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
        tokens = list(b"The lazy fox jumps over the quick brown dog.")
        good &= compare("  out", c_logits(logits, checkpoint, tokens), their_logits(theirs, tokens))
        same_attention = attention(train_gpt, work)
    if not good:
        sys.exit(f"check_transformers.py: the logits differ by more than {LIMIT}, or are not comparable")
    if not same_attention:
        sys.exit("check_transformers.py: attention's weights differ by more than 1e-5")


if __name__ == "__main__":
    main()
