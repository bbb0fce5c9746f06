#!/usr/bin/env python3
"""Kill training at random instants, and check that nothing is lost.

    make train_gpt
    python3 dev/check/kill_test.py [--kills N] [--seed N] [--program ./train_gpt]

A small run that saves every 2 steps is killed with SIGKILL after a random time and resumed, again and again, until it
is done; then the next run begins. After every kill the checkpoint must open, and every finished run must have
the checkpoint and the log of one that was never interrupted, to the last bit (the log but for its times). The text is
train_gpt.c itself, prepared in a temporary folder. Prints a line for each failure and in the end
`N passed, N failed`; the exit status is 1 if something failed.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RUN = ("--layers 2 --heads 2 --channels 64 --context 32 --batch 4 --steps 60 --warmup 5 --val-every 10 --val-batches 2 "
       "--sample-every 0 --save-every 2").split()


def read(path):
    with open(path, "rb") as f:
        return f.read()


def steps_of(log):
    """The log's rows without the two columns of times."""
    return [line.split(",")[:5] for line in read(log).decode().splitlines()]


def main():
    arguments = argparse.ArgumentParser(description="Kill training at random instants, and check that nothing is lost.")
    arguments.add_argument("--kills", type=int, default=50, metavar="N", help="default: 50")
    arguments.add_argument("--seed", type=int, default=1, metavar="N", help="of the random instants, default: 1")
    arguments.add_argument("--program", default=os.path.join(ROOT, "train_gpt"), help="default: ./train_gpt")
    options = arguments.parse_args()
    program = os.path.abspath(options.program)
    if not os.access(program, os.X_OK):
        sys.exit("kill_test.py: %s is not built; `make train_gpt` builds it" % program)
    random.seed(options.seed)
    passed = failed = 0

    def check(good, what):
        nonlocal passed, failed
        passed += bool(good)
        failed += not good
        if not good:
            print("failed:", what, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data")
        subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), "--tokenizer", "bytes", "--out", data,
                        os.path.join(ROOT, "train_gpt.c")], check=True, stdout=subprocess.DEVNULL)

        def command(name, resume):
            files = ["--data", data, "--checkpoint", os.path.join(folder, name), "--log", os.path.join(folder, name + ".csv")]
            return [program] + files + (["--resume"] if resume else RUN)

        def run(arguments):
            return subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

        start = time.monotonic()
        result = run(command("whole", False))
        duration = time.monotonic() - start
        if result.returncode:
            sys.exit("kill_test.py: the uninterrupted run failed: " + result.stderr)

        checkpoint = os.path.join(folder, "killed")
        kills = finished = 0
        while kills < options.kills:
            process = subprocess.Popen(command("killed", os.path.exists(checkpoint)), stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, text=True)
            try:
                errors = process.communicate(timeout=random.uniform(0, duration))[1]
            except subprocess.TimeoutExpired:
                process.kill()
                errors = process.communicate()[1]
                kills += 1
                if os.path.exists(checkpoint):
                    result = run([program, "--data", data, "--checkpoint", checkpoint, "--generate", "x", "--tokens", "0"])
                    check(result.returncode == 0, "kill %d: the checkpoint does not open: %s" % (kills, result.stderr))
                if kills < options.kills:
                    continue
                result = run(command("killed", os.path.exists(checkpoint)))  # the last run may come to its end
                process.returncode, errors = result.returncode, result.stderr
            # A kill between the last save and the end of the program leaves nothing to resume.
            check(process.returncode == 0 or "has done all of its" in errors,
                  "a run ended with %d: %s" % (process.returncode, errors))
            finished += 1
            check(os.path.exists(checkpoint) and read(checkpoint) == read(os.path.join(folder, "whole")),
                  "run %d: its checkpoint is not that of the uninterrupted run" % finished)
            check(steps_of(checkpoint + ".csv") == steps_of(os.path.join(folder, "whole.csv")),
                  "run %d: its log is not that of the uninterrupted run" % finished)
            for name in ("killed", "killed.csv"):
                if os.path.exists(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
        print("%d kills in %d runs" % (kills, finished))
    print("%d passed, %d failed" % (passed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
