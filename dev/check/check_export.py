#!/usr/bin/env python3
"""Does what --export writes open in Hugging Face's libraries, and what they save in --init?

    make train_gpt && build/venv/bin/python dev/check/check_export.py [--megabytes N]

Needs torch, transformers and tokenizers (dev/requirements.txt). For each kind of tokenizer that prepare_data.py makes:

  tokens     transformers' fast tokenizer gives the very tokens of `--tokenize` on N megabytes (1) of this repository's
             files, random characters of all that Unicode has assigned, long runs, and what is in no dictionary; and decodes them again
  text       pipeline("text-generation") continues a prompt greedily with the text of `--generate --temperature 0`
  loss       --eval has the loss and the bits a byte that transformers computes on the same windows, to 1e-4

and for --init: a model in several files, one with an extended vocabulary, pytorch_model.bin converted. GPT-2's own
vocabulary is taken from GPT2_VOCAB if that is set, as in prepare_data.py --vocab. Ends with "N passed, N failed".
"""

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata

import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
END = "<|endoftext|>"
counts = {True: 0, False: 0}
transformers.logging.set_verbosity_error()


def check(good, what):
    counts[bool(good)] += 1
    print(f"{'ok' if good else 'FAILED'}: {what}", flush=True)


def run(*command, status=0):
    done = subprocess.run([str(x) for x in command], cwd=ROOT, capture_output=True)
    if done.returncode != status:
        sys.exit(f"{command}: status {done.returncode}: {done.stderr.decode()}")
    return (done.stdout if status == 0 else done.stderr).decode()


def mixed_text(size, seed):
    """Text of many kinds, each a fifth of the characters or less."""
    rng = random.Random(seed)
    files = sorted(
        x for x in ROOT.glob("**/*") if x.suffix in (".c", ".py", ".md", ".html", ".cu") and "build" not in x.parts
    )
    everyday = "".join(x.read_text(encoding="utf-8") for x in files).replace(END, "")[: size // 3]
    scripts = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x370, 0x530),
        (0x590, 0x600),
        (0x600, 0x700),
        (0x900, 0x980),
        (0x2000, 0x2070),
        (0x3040, 0x3100),
        (0x4E00, 0x9FA0),
        (0xAC00, 0xD7A0),
        (0x1F300, 0x1F650),
    ]
    words = []
    for _ in range(size // 15):
        low, high = rng.choice(scripts)
        words.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))))
    # Characters that this Python's Unicode does not know have no class in tokenizer.bin, but may have in a newer one.
    known = [chr(x) for x in range(0x110000) if unicodedata.category(chr(x)) not in ("Cn", "Cs")]
    anything = "".join(rng.choices(known, k=size // 10))
    runs = "".join(rng.choice("a ee\n'.-0\u00e9\u4e2dI") * rng.randrange(1, 400) for _ in range(size // 4000))
    close = "".join(
        rng.choices(
            ["'s", "'re", "'ll", " ", "  ", "\n", "\t", "\r\n", "1", "a", "\u0301", "<|", "|>", "_", "\u3000", "\0"],
            k=size // 10,
        )
    )
    return everyday + " ".join(words) + anything + runs + close


def tokenizer_kinds(work):
    """(name, data folder), each made anew."""
    vocabulary = os.environ.get("GPT2_VOCAB")
    for name, options in ("bytes", []), ("bpe", ["--vocab-size", "2000"]), ("gpt2", ["--vocab", vocabulary]):
        if name == "gpt2" and not vocabulary:
            print("skipped: gpt2; GPT2_VOCAB is not set")
            continue
        data = work / name
        run(sys.executable, "prepare_data.py", "--tokenizer", name, *options, "--out", data, "README.md", "train_gpt.c")
        yield name, data


def our_tokens(data, text, work):
    (work / "text").write_bytes(text.encode())
    return [int(x) for x in run("./train_gpt", "--data", data, "--tokenize", work / "text").split()]


def tokens(name, data, folder, text, work):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, wrong = our_tokens(data, text, work), 0
    ids = theirs.encode(text)
    if ids != ours:
        wrong = next((i for i, (a, b) in enumerate(zip(ids, ours)) if a != b), min(len(ids), len(ours)))
        print(
            f"  token {wrong}: {theirs.decode(ids[wrong - 5 : wrong + 5])!r}, not {theirs.decode(ours[wrong - 5 : wrong + 5])!r}"
        )
    check(ids == ours, f"{name}: {len(ours)} tokens of {len(text.encode()) / 1e6:.1f} MB")
    check(theirs.decode(ids) == text, f"{name}: decoding gives the text again")
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    check(
        end == theirs.eos_token_id
        and end == json.loads((folder / "generation_config.json").read_text())["eos_token_id"],
        f"{name}: the end of text is {end} everywhere",
    )
    if end is not None:
        check(
            theirs.encode(f"a{END}b") == [*our_tokens(data, "a", work), end, *our_tokens(data, "b", work)],
            f"{name}: {END} is a token",
        )
    check(
        len(theirs) == json.loads((folder / "config.json").read_text())["vocab_size"],
        f"{name}: {len(theirs)} tokens in all",
    )
    slow = transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    part = text[:20000]
    check(slow.encode(part) == our_tokens(data, part, work), f"{name}: vocab.json and merges.txt say the same")


def continuation(name, data, checkpoint, folder):
    prompt, n = "The file says", 40
    ours = run(
        "./train_gpt",
        "--data",
        data,
        "--checkpoint",
        checkpoint,
        "--generate",
        prompt,
        "--temperature",
        0,
        "--tokens",
        n,
    )
    write = transformers.pipeline("text-generation", str(folder))
    theirs = write(prompt, do_sample=False, max_new_tokens=n)[0]["generated_text"]
    check(
        len(theirs) > len(prompt) and ours in (theirs, theirs + "\n"), f"{name}: pipeline continues {theirs[:60]!r}..."
    )
    model, tokenizer = (
        x.from_pretrained(folder) for x in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=n)[0]
    check(tokenizer.decode(ids) == theirs, f"{name}: and so does generate() of what the tokenizer returns")


def perplexity(name, data, checkpoint, folder, text, work):
    """With a sliding window, as transformers' documentation computes it."""
    (work / "text").write_bytes(text.encode())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids, T = torch.tensor([our_tokens(data, text, work)]), model.config.n_positions
    n = ids.shape[1]
    for stride in 20, T - 1:
        total, reached = 0.0, 1
        for begin in range(0, n, stride):
            end = min(begin + T, n)
            targets = ids[:, begin:end].clone()
            targets[:, : reached - begin] = -100
            with torch.no_grad():
                mean = model(ids[:, begin:end], labels=targets).loss
            total += float(mean) * (end - reached)
            reached = end
            if end == n:
                break
        ask = (
            "./train_gpt",
            "--data",
            data,
            "--checkpoint",
            checkpoint,
            "--eval",
            work / "text",
            "--json",
            "--stride",
            stride,
        )
        ours = json.loads(run(*ask, "--batch", 7))
        theirs = total / (n - 1)
        scored = len(text.encode()) - len(
            transformers.AutoTokenizer.from_pretrained(folder).decode(ids[0, :1]).encode()
        )
        good = abs(ours["loss"] - theirs) < 1e-4 * theirs and ours["tokens"] == n - 1 and ours["bytes"] == scored
        good &= abs(ours["bits_per_byte"] - total / math.log(2) / scored) < 1e-4 * ours["bits_per_byte"]
        check(good, f"{name}, stride {stride}: --eval says {ours}, transformers {theirs:.6f}")


def same_weights(a, b):
    load = lambda x: transformers.AutoModelForCausalLM.from_pretrained(x).state_dict()
    x, y = load(a), load(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def imports(data, folder, work):
    """folder: an export of the byte tokenizer's model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    shards, again = work / "shards", work / "again"
    model.save_pretrained(shards, max_shard_size="100KB")
    parts = len(list(shards.glob("model-*.safetensors")))
    run("./train_gpt", "--data", data, "--init", shards, "--export", again)
    check(parts > 2 and same_weights(folder, again), f"--init reads a model in {parts} files")
    lost = sorted(shards.glob("model-*.safetensors"))[0]
    lost.rename(work / "lost")
    check(lost.name in run("./train_gpt", "--init", shards, "--export", again, status=1), "a missing one is named")
    # A few rows more: the same text as before.
    wider = work / "wider"
    model.resize_token_embeddings(260)
    model.save_pretrained(wider)
    ask = ("--data", data, "--generate", "The ", "--temperature", 0, "--tokens", 30)
    command = [str(x) for x in ("./train_gpt", *ask, "--init", wider)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    same = done.stdout == run("./train_gpt", *ask, "--init", folder)
    check("260" in done.stderr and same, f"an extended vocabulary: {done.stderr.strip()}")
    model.resize_token_embeddings(512)
    model.save_pretrained(wider)
    check(
        "has a vocabulary of 512" in run("./train_gpt", *ask, "--init", wider, status=1),
        "another vocabulary is refused",
    )
    # Python's own format.
    old = work / "old"
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(old, safe_serialization=False)
    advice = run("./train_gpt", "--init", old, "--export", again, status=1)
    check("to_safetensors.py" in advice, f"pytorch_model.bin: {advice.strip()}")
    run(sys.executable, "dev/check/to_safetensors.py", old)
    shutil.rmtree(again)
    run("./train_gpt", "--init", old, "--export", again)
    check(same_weights(folder, again), "and converted it is read")
    # The same in parts.
    parts = work / "parts"
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        parts, safe_serialization=False, max_shard_size="100KB"
    )
    advice = run("./train_gpt", "--init", parts, "--export", again, status=1)
    check("to_safetensors.py" in advice, f"pytorch_model.bin.index.json: {advice.strip()}")
    run(sys.executable, "dev/check/to_safetensors.py", advice.split()[-1])
    shutil.rmtree(again)
    run("./train_gpt", "--init", parts, "--export", again)
    check(same_weights(folder, again), "and converted it is read")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--megabytes", type=float, default=1)
    size = int(arguments.parse_args().megabytes * 1e6)
    text = mixed_text(size, 1)
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name, data in tokenizer_kinds(work):
            checkpoint, folder = work / f"{name}.safetensors", work / f"{name}.exported"
            shape = "--layers 2 --heads 2 --channels 48 --context 64 --batch 4 --sample-every 0 --val-every 0 --val-batches 1".split()
            run(
                "./train_gpt",
                "--data",
                data,
                "--checkpoint",
                checkpoint,
                *shape,
                "--lr",
                "5e-3",
                "--steps",
                100 if name == "gpt2" else 400,
            )
            run("./train_gpt", "--data", data, "--checkpoint", checkpoint, "--export", folder)
            tokens(name, data, folder, text, work)
            continuation(name, data, checkpoint, folder)
            perplexity(name, data, checkpoint, folder, (ROOT / "README.md").read_text()[:5000], work)
            if name == "bytes":
                imports(data, folder, work)
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(counts[False] > 0)


if __name__ == "__main__":
    main()
