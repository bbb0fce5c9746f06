#!/usr/bin/env python3
"""train_gpt against PyTorch, in turn on the same machine.

    python3 dev/bench/race.py --text FILE [--rounds N]

1. One training step of the same model and batch, nanoGPT's CPU recipe: 4 layers, 4 heads, 128 channels, context 64,
   batch 12. Medians of interleaved rounds.
2. The time to the loss with which that recipe ends after 2,000 steps, 1.886 nats a character (2.721 bits a byte):
   for PyTorch 2,000 steps, for train_gpt the run below, whose loss is printed. A validation is not part of the time.

Needs ./train_gpt and PyTorch; see nanogpt.py for the BLAS library that makes PyTorch quick.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
SAME = "--layers 4 --heads 4 --channels 128 --context 64 --batch 12 --steps 60"
QUICK = "--layers 2 --heads 4 --channels 128 --context 64 --batch 8 --lr 4e-3 --steps 600 --val-batches 1000"
QUIET = "--val-every 0 --sample-every 0 --save-every 0 --tokens 0"


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def prepare(text, folder, *options):
    run(sys.executable, os.path.join(ROOT, "prepare_data.py"), text, "--out", folder, *options)
    return folder


def train(data, options):
    """Trains; returns the steps' milliseconds and the last validation in bits a byte."""
    log, checkpoint = os.path.join(data, "log.csv"), os.path.join(data, "gpt.safetensors")
    out = run(os.path.join(ROOT, "train_gpt"), "--data", data, "--log", log, "--checkpoint", checkpoint,
              *options.split(), *QUIET.split())
    with open(log) as file:
        times = [float(row["ms"]) for row in csv.DictReader(file)]
    return times, float(re.search(r"([\d.]+) bits per byte", out).group(1))


def main():
    arguments = argparse.ArgumentParser(description="train_gpt against PyTorch, in turn on the same machine.")
    arguments.add_argument("--text", required=True, metavar="FILE", help="tiny Shakespeare")
    arguments.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(chosen.text, os.path.join(folder, "bytes"), "--tokenizer", "bytes")
        words = prepare(chosen.text, os.path.join(folder, "words"))
        ours, theirs, quick = [], [], []
        for _ in range(chosen.rounds):
            out = run(sys.executable, os.path.join(HERE, "nanogpt.py"), "--text", chosen.text, "--time-steps", "40")
            theirs.append(float(re.search(r"([\d.]+) ms", out).group(1)))
            ours.append(statistics.median(train(data, SAME)[0][5:]))
            times, bits = train(words, QUICK)
            quick.append(sum(times) / 1000)
            print(f"a step: PyTorch {theirs[-1]:.1f} ms, train_gpt {ours[-1]:.1f} ms; "
                  f"to {bits:.3f} bits a byte: {quick[-1]:.2f} s", flush=True)
    a, b, c = (statistics.median(x) for x in (theirs, ours, quick))
    print(f"the same step: PyTorch {a:.1f} ms, train_gpt {b:.1f} ms, {a / b:.2f} times as fast")
    print(f"nanoGPT's loss: PyTorch {2 * a:.1f} s (2,000 steps), train_gpt {c:.2f} s ({bits:.3f} bits a byte, "
          f"aim 2.721), {2 * a / c:.1f} times as fast")


if __name__ == "__main__":
    main()
