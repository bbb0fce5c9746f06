#!/usr/bin/env python3
"""Do several GPUs train the model that one would? With kernels on the CPU, and NCCL's calls over MPI (cuda_on_cpu.h).

    make test_nccl

Programs: one in float32 and one in bfloat16, whose processes mpirun starts. It ends with "N passed, N failed".
"""

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time

from test_mpi import ANYWHERE, AS_ROOT, is_open_mpi, prepare

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MPIRUN = os.environ.get("MPIRUN", "mpirun")
# Tensors that three processes cannot share out equally, and some that they can: both ways of NCCL.
SMALL = ["--layers", "2", "--heads", "2", "--channels", "48", "--context", "16", "--batch", "6", "--val-every", "0",
         "--val-batches", "1", "--sample-every", "0"]
SECONDS = 120

passed = failed = 0


def expect(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print(f"FAILED: {what}")


def start(program, processes, *options, **environment):
    command = [MPIRUN, *(ANYWHERE if is_open_mpi(MPIRUN) else []), "-n", str(processes)]
    given = dict(os.environ, **AS_ROOT, OMP_NUM_THREADS="1", CUDA_ON_CPU_DEVICES="3", **environment)
    return subprocess.run([*command, program, *options], env=given, capture_output=True, text=True, timeout=SECONDS)


class Run:
    """What a run has left: of every step loss and norm, and its checkpoint's tensors."""

    def __init__(self, folder, program, processes, *options, of=SMALL, steps=4, resumed=None, **environment):
        Run.count = getattr(Run, "count", 0) + 1
        self.file = os.path.join(folder, f"{Run.count}.safetensors")
        log = os.path.join(folder, f"{Run.count}.csv")
        if resumed:
            shutil.copy(resumed, self.file)
        options = [*options, "--steps", str(steps), "--log", log, "--checkpoint", self.file]
        done = start(program, processes, *(["--resume"] if resumed else of), *options, **environment)
        self.good, self.steps, self.tensors, self.bytes = done.returncode == 0, [], {}, b""
        expect(self.good, f"{processes} processes, {' '.join(options)}: status {done.returncode}, {done.stderr[-500:]}")
        if not self.good:
            return
        with open(log, newline="", encoding="utf-8") as file:
            self.steps = [(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)]
        with open(self.file, "rb") as file:
            self.bytes = file.read()
        size = struct.unpack("<Q", self.bytes[:8])[0]
        for name, what in json.loads(self.bytes[8 : 8 + size]).items():
            if name != "__metadata__" and what["dtype"] == "F32":
                first, end = what["data_offsets"]
                data = self.bytes[8 + size + first : 8 + size + end]
                x = struct.unpack(f"<{len(data) // 4}f", data)
                if name.endswith("c_attn.bias"):  # softmax ignores what is added to all keys: that third's gradient is
                    x = x[: len(x) // 3] + x[2 * len(x) // 3 :]  # nothing but rounding, of which AdamW makes whole steps
                self.tensors[name] = x

    def differs_from(self, other):
        """The largest error of losses and norms, and of a tensor, each relative to its size."""
        if not self.good or not other.good or self.tensors.keys() != other.tensors.keys():
            return float("inf"), float("inf")
        steps = min(len(self.steps), len(other.steps))
        numbers = max(abs(x - y) / abs(y)
                      for a, b in zip(self.steps[-steps:], other.steps[-steps:]) for x, y in zip(a, b))
        worst = 0
        for name, x in self.tensors.items():
            y = other.tensors[name]
            size = sum(b * b for b in y) ** 0.5
            worst = max(worst, sum((a - b) ** 2 for a, b in zip(x, y)) ** 0.5 / size if size else any(x))
        return numbers, worst


SAME = 5e-5  # of tensors after four steps: AdamW divides by gradients' sizes, and makes roundings of small ones larger


def compare(run, with_, numbers, tensors, what):
    got = run.differs_from(with_)
    expect(got[0] <= numbers and got[1] <= tensors, f"{what}: losses and norms differ by {got[0]:.1e}, tensors {got[1]:.1e}")


def main(float32, bfloat16):
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data", prepare(os.path.join(folder, "data"))]

        def train(program, processes, *more, **how):
            return Run(folder, program, processes, *options, *more, **how)

        one = train(float32, 1)
        two, three = train(float32, 2), train(float32, 3)
        compare(two, one, 1e-6, SAME, "two processes against one")
        compare(three, one, 1e-6, SAME, "three processes against one")
        expect(train(float32, 2).bytes[-4096:] == two.bytes[-4096:], "two processes, again: other bits")
        early = train(float32, 3, CUDA_ON_CPU_ORDER="backward")
        expect(early.tensors == three.tensors, "with NCCL as early as may be: other bits")

        # The same six windows a step, but in halves: sent once.
        halves = [*SMALL[:9], "3", *SMALL[10:], "--accumulate", "2"]
        compare(train(float32, 3, of=halves), train(float32, 1, of=halves), 1e-6, SAME, "with --accumulate")
        compare(train(float32, 2, "--recompute"), two, 1e-6, SAME, "with --recompute")
        compare(train(bfloat16, 2), train(bfloat16, 1), 2e-3, 5e-2, "in bfloat16")

        # Learning rates are those of a run of four steps either way.
        half = train(float32, 2, "--warmup", "1", "--min-lr", "1e-3", "--lr", "1e-3", steps=2)
        whole = train(float32, 1, "--warmup", "1", "--min-lr", "1e-3", "--lr", "1e-3")
        for processes in (1, 3):
            resumed = train(float32, processes, resumed=half.file)
            compare(resumed, whole, 1e-6, SAME, f"two processes' checkpoint, resumed by {processes}")

        def expect_end(done, seconds, text, what):
            lines = [line for line in done.stderr.splitlines() if line.startswith(("train_gpt:", "cuda_on_cpu:"))]
            expect(done.returncode != 0 and seconds < 30 and lines and all("rank" in x and text in x for x in lines),
                   f"{what}: status {done.returncode} after {seconds:.0f} s, {lines}")

        def end_of(processes, *more, **environment):
            begin = time.monotonic()
            end = os.path.join(folder, "end.safetensors")
            done = start(float32, processes, *SMALL, *options, *more, "--checkpoint", end, **environment)
            return done, time.monotonic() - begin

        expect_end(*end_of(2, "--device", "cuda:2"), "there is no GPU 3, only 0 to 2", "more processes than GPUs")
        expect_end(*end_of(2, "--steps", "4", CUDA_ON_CPU_FAULT="clip_kernel"), "illegal memory access", "a kernel's fault")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    if not shutil.which(MPIRUN):
        print("skipped: several GPUs; mpirun is not installed\n0 passed, 0 failed, 1 skipped")
        sys.exit(0)
    os.chdir(ROOT)
    sys.exit(main(*map(os.path.abspath, sys.argv[1:3])))
