#!/usr/bin/env python3
"""One training step in llm.c and in train_gpt, in turn on the same machine: the same GPT-2, batch and threads.

    git clone https://github.com/karpathy/llm.c build/llm.c
    make build/bench
    python3 dev/bench/llmc.py --llmc build/llm.c      GPT-2 124M, batch 4 x 64 tokens; --layers N and so on change it

llm.c's train_gpt2.c, its program for CPUs, is built by its own Makefile, once with each compiler that is installed, and
starts from random weights in a file of its own format. Both sides are float32 and do forward, backward and AdamW;
train_gpt also clips the gradients. A round times train_gpt (build/bench), then each build of llm.c; the ratio is the
median of the rounds' ratios, since what disturbs a round disturbs all of it.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BENCH = os.path.join(ROOT, "build", "bench")
GPT2 = {"layers": 12, "heads": 12, "channels": 768, "vocab": 50257, "context": 64, "batch": 4}

# A step for each line of input, always on the same tokens, so that the loss must fall. Answers begin with "driver".
DRIVER = r"""
int main(int argc, char** argv) {  // weights, batch, context
    if (argc != 4) return 2;
    GPT2 model;
    gpt2_build_from_checkpoint(&model, argv[1]);
    const int B = atoi(argv[2]), T = atoi(argv[3]);
    int* tokens = (int*)mallocCheck((B * T + 1) * sizeof(int));
    for (int i = 0; i <= B * T; i++) tokens[i] = rand() % model.config.vocab_size;
    printf("driver %zu\n", model.num_parameters);
    fflush(stdout);
    for (int step = 1; getchar() != EOF; step++) {
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        gpt2_forward(&model, tokens, tokens + 1, B, T);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.0f, step);
        clock_gettime(CLOCK_MONOTONIC, &end);
        double ms = (end.tv_sec - start.tv_sec) * 1e3 + (end.tv_nsec - start.tv_nsec) / 1e6;
        printf("driver %f %f\n", ms, model.mean_loss);
        fflush(stdout);
    }
}
"""


def fail(message):
    sys.exit(f"llmc.py: {message}")


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines() or ["failed"]
        fail(f"{' '.join(command)}: {lines[0]}")
    return done.stdout


def padded(vocab):
    return -(-vocab // 128) * 128  # as in llm.c's own files


def write_weights(path, a):
    """GPT-2's initialisation, the tensors in llm.c's order. The random ones repeat a prime number of values."""
    L, C, V, T = a.layers, a.channels, padded(a.vocab), a.context
    random.seed(1)
    normal, one, zero = array("f", (random.gauss(0, 0.02) for _ in range(99991))), array("f", [1]), array("f", [0])
    N = L * C
    tensors = [(V * C, normal), (T * C, normal), (N, one), (N, zero), (3 * N * C, normal), (3 * N, zero),
               (N * C, normal), (N, zero), (N, one), (N, zero), (4 * N * C, normal), (4 * N, zero),
               (4 * N * C, normal), (N, zero), (C, one), (C, zero)]
    with open(path, "wb") as file:
        array("i", [20240326, 3, T, a.vocab, L, a.heads, C, V] + 248 * [0]).tofile(file)
        for size, values in tensors:
            (values * (size // len(values) + 1))[:size].tofile(file)


def builds_openmp(compiler):
    """clang is often installed without its OpenMP library; the compilers that work do."""
    if not shutil.which(compiler):
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([compiler, "-x", "c", "-fopenmp", "-", "-o", os.path.join(folder, "program")],
                              input="int main(void) { return 0; }", capture_output=True, text=True)
    if done.returncode:
        print(f"{compiler} is left out: it cannot build OpenMP programs here (its library is missing)")
    return done.returncode == 0


def build(compiler, checkout, folder):
    """Runs llm.c's Makefile in a folder whose train_gpt2.c is the driver, which includes the real one. The program, or
    None where that fails: a compiler may build a program of OpenMP and still not this one."""
    os.mkdir(folder)
    with open(os.path.join(folder, "train_gpt2.c"), "w") as file:
        file.write(f'#define TESTING  // leaves its main() out\n#include "{checkout}/train_gpt2.c"\n{DRIVER}')
    # The option has gcc also compile those of llm.c's inline functions that it does not inline here.
    done = subprocess.run(["make", "-f", os.path.join(checkout, "Makefile"), f"CC={compiler}",
                           "INCLUDES=-fgnu89-inline", "train_gpt2"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.splitlines() or ["no message"])[0]
        print(f"{compiler} is left out: llm.c's make fails with it: {why}")
        return None
    print(*(line for line in done.stdout.splitlines() if line.startswith(compiler + " ")))
    return os.path.join(folder, "train_gpt2")


class LLMC:
    """A running build of llm.c. It ends with its standard input, that is, with this script at the latest."""

    def __init__(self, compiler, program, weights, a):
        self.name, self.losses = f"llm.c ({compiler})", []
        self.process = subprocess.Popen([program, weights, str(a.batch), str(a.context)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.parameters = int(self.answer()[0]) - (padded(a.vocab) - a.vocab) * a.channels
        self.step()  # pays for memory and threads
        if not abs(self.losses[0] - math.log(a.vocab)) < 1:  # random weights know nothing
            fail(f"{self.name} begins with a loss of {self.losses[0]}, not of about {math.log(a.vocab):.1f}")

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("driver "):
                return line.split()[1:]
        why = (self.process.stderr.read().splitlines() or ["no message; is there enough memory?"])[0]
        fail(f"{self.name} ended with status {self.process.wait()}: {why}")

    def step(self):
        """Milliseconds."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        ms, loss = map(float, self.answer())
        self.losses.append(loss)
        return ms

    def median_ms(self, seconds):
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            times.append(self.step())
        return statistics.median(times)

    def check(self, parameters):
        if self.parameters != parameters:
            fail(f"different models, train_gpt's of {parameters} parameters, llm.c's of {self.parameters}")
        if not self.losses[-1] < self.losses[0]:
            fail(f"{self.name} does not learn: its loss went from {self.losses[0]} to {self.losses[-1]}")


def ours(a, folder):
    """build/bench's figures for the step of the same model, timed for about as long."""
    path = os.path.join(folder, "bench.json")
    sizes = [word for name in GPT2 for word in ("--" + name, str(getattr(a, name)))]
    run([BENCH, "--json", path, "--seconds", str(a.seconds), *sizes])
    with open(path) as file:
        return json.load(file)["step"]


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llmc", required=True, metavar="PATH", help="a checkout of llm.c")
    p.add_argument("--cc", nargs="+", default=["gcc", "clang"], metavar="CC", help="default: gcc clang")
    for name, default in GPT2.items():
        p.add_argument("--" + name, type=int, default=default, metavar="N", help=f"default: {default}")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    p.add_argument("--seconds", type=float, default=2, metavar="X", help="for each in a round; default: 2")
    p.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all")
    a = p.parse_args()
    if min(a.rounds, a.threads, *(getattr(a, name) for name in GPT2)) < 1 or a.channels % a.heads:
        p.error("sizes, rounds and threads must be at least 1, and --channels a multiple of --heads")
    a.llmc = os.path.abspath(a.llmc)
    if not all(os.path.isfile(os.path.join(a.llmc, name)) for name in ("train_gpt2.c", "Makefile")):
        fail(f"{a.llmc}: no train_gpt2.c and Makefile there; git clone https://github.com/karpathy/llm.c")
    a.cc = [compiler for compiler in a.cc if builds_openmp(compiler)]
    if not a.cc or not shutil.which("make"):
        fail("make and a C compiler (gcc or clang) with its OpenMP library are needed, and not all are installed")
    if not os.path.isfile(BENCH):
        fail(f"no {BENCH}; `make build/bench` builds it")
    return a


def compare(a, folder):
    print(", ".join(f"{name} {getattr(a, name)}" for name in (*GPT2, "threads")))
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    programs = {compiler: build(compiler, a.llmc, os.path.join(folder, compiler)) for compiler in a.cc}
    if not any(programs.values()):
        fail("llm.c's make fails with every compiler")
    weights = os.path.join(folder, "weights.bin")
    write_weights(weights, a)
    theirs = [LLMC(compiler, program, weights, a) for compiler, program in programs.items() if program]
    times = {name: [] for name in ["train_gpt", *(peer.name for peer in theirs)]}
    for _ in range(a.rounds):
        figures = ours(a, folder)
        times["train_gpt"].append(figures["ms"])
        for peer in theirs:
            times[peer.name].append(peer.median_ms(a.seconds))
            peer.check(figures["parameters"])
        print("round   " + "   ".join(f"{name} {t[-1]:.1f} ms" for name, t in times.items()), flush=True)
    for name, t in times.items():
        ratio = statistics.median(their / our for their, our in zip(t, times["train_gpt"]))
        print(f"median  {name} {statistics.median(t):.1f} ms, {1000 * a.batch * a.context / statistics.median(t):.1f} "
              "tokens/s" + (f": train_gpt is {ratio:.2f} times as fast" if name != "train_gpt" else ""))


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as scratch:
            compare(parse_args(), scratch)
    except (OSError, MemoryError) as error:  # a full disk, as a rule
        fail(str(error) or "not enough memory")
