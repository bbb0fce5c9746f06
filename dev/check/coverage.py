#!/usr/bin/env python3
"""Which lines of train_gpt.c do the tests not run? Started by make coverage; needs gcc with gcov.

Runs test_gpt and those parts of faults/ that take seconds, both built with --coverage, and lists the lines that neither
has come to. A line counts as run even if the die() at its end was not.
"""
import collections
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "coverage"
# Counts are written by exit() but not by _exit(), with which the tests' processes end.
COMPILE = ["gcc", "-std=c11", "-O1", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
           "-fopenmp", "--coverage", "-D_exit=exit"]
FAULTS = ["mmap", "open", "read", "sync", "close", "rename", "mkdir", "stdout"]


def main():
    BUILD.mkdir(parents=True, exist_ok=True)
    for old in BUILD.glob("*.gc*"):
        old.unlink()
    for name in ("test_gpt", "train_gpt"):
        subprocess.run([*COMPILE, f"{name}.c", "-o", BUILD / name, "-lm"], cwd=ROOT, check=True)
    # Where a test limits the size of files, it hits the file of the counts too; what gcc's library says to that must
    # not come between the program's own lines.
    environment = {**os.environ, "GCOV_ERROR_FILE": os.devnull}
    status = subprocess.run([BUILD / "test_gpt"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode
    status |= subprocess.run([sys.executable, "dev/check/faults/run.py", BUILD / "train_gpt", *FAULTS], cwd=ROOT,
                             env=environment, stdout=subprocess.DEVNULL).returncode
    report = subprocess.run(["gcov", "-t", "-o", BUILD, *BUILD.glob("*.gcda")], cwd=ROOT, check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    counts, text, source = collections.defaultdict(int), {}, None
    for row in report.splitlines():
        count, number, line = (row.split(":", 2) + ["", ""])[:3]
        if number.strip() == "0" and line.startswith("Source:"):
            source = line[len("Source:"):]
        elif number.strip().isdigit() and source == "train_gpt.c" and count.strip() != "-":
            counts[int(number)] += "#" not in count
            text[int(number)] = line
    missed = [number for number in sorted(counts) if not counts[number]]
    for number in missed:
        print(f"train_gpt.c:{number}:{text[number]}")
    print(f"{len(counts) - len(missed)} of {len(counts)} lines of train_gpt.c run, "
          f"{100 - 100 * len(missed) / len(counts):.1f} %" + (", but some tests failed" if status else ""))
    return status


if __name__ == "__main__":
    sys.exit(main())
