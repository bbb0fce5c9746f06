#!/usr/bin/env python3
"""What changed since GPT-2: each *.diff beside this file is applied to a copy of the program, tested and trained.

    python3 dev/learn/variants/run.py                        all of them; `make variants` is the same
    python3 dev/learn/variants/run.py window rmsnorm         these
    python3 dev/learn/variants/run.py --check                only the tests
    python3 dev/learn/variants/run.py --only-apply window    makes build/variants/window, to look at and to work in
    python3 dev/learn/variants/run.py --refresh              writes the diffs anew, after the lines around them changed
    python3 dev/learn/variants/run.py --write window         the same from what is in build/variants/window now

A diff is in the form that `patch -p1` takes, behind a text that says what it is. It adds to test_gpt.c the options that
choose the variant, and those are what is trained here. Printed for each:

    places, +, -   hunks of the diff, lines it adds and lines it takes away, of train_gpt.c
    parameters     of the model, of three layers and else the program's default sizes
    ms             of a step, the lower quartile
    steps, loss    so many steps fit into --seconds; after as many, over which the learning rate falls as always, this is
                   the validation loss

Only the standard library is used. The exit status is 1 if a diff no longer applies or a test fails.
"""

import argparse
import glob
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
BUILD = os.path.join(ROOT, "build", "variants")
FILES = ["train_gpt.c", "test_gpt.c"]
NEIGHBOURS = 1  # lines of context, few so that a diff outlives small changes around it
ROUNDS = 4  # of timing
NEAR = 150  # lines that a change may have moved more than the one before it


class Failed(Exception):
    pass


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


class Diff:
    """The text before the first ---, and each file's hunks: (line, lines with their ' ', '-' or '+')."""

    def __init__(self, path):
        self.name = os.path.basename(path)
        text = read(path)
        self.about = text[: text.index("--- a/")]
        self.hunks = {}
        for line in text[len(self.about) :].splitlines():
            if line.startswith("+++ b/"):
                hunks = self.hunks.setdefault(line[6:], [])
            elif line.startswith("@@"):
                hunks.append((int(re.match(r"@@ -(\d+)", line).group(1)), []))
            elif not line.startswith("--- "):
                hunks[-1][1].append(line or " ")

    def count(self, sign):
        return sum(line[0] == sign for _, hunk in self.hunks["train_gpt.c"] for line in hunk)

    def options(self):
        """What the diff adds to the variants in test_gpt.c."""
        added = [line[1:].strip() for _, hunk in self.hunks["test_gpt.c"] for line in hunk if line[0] == "+"]
        return re.findall(r'{"([^"]+)", \d+},', "\n".join(added))

    def apply(self, name, text):
        """The file `name` changed. Each change goes where its lines are found nearest to where they were. If they are
        nowhere, a line beside them may have changed: without it they must be found just once near there."""
        lines = text.splitlines()
        words = [line.split() for line in lines]  # tables are aligned anew now and then
        moved = 0
        for at, change in self.changes(name):
            first, last = change[0][0] == " ", change[-1][0] == " "
            for head, tail in [(0, 0), (0, last), (first, 0), (first, last)]:
                part = change[head : len(change) - tail]
                old = [line[1:].split() for line in part if line[0] != "+"]
                expected = at - 1 + head + moved
                where = [i for i in range(len(lines)) if any(old) and words[i : i + len(old)] == old]
                if head or tail:
                    where = [i for i in where if abs(i - expected) < NEAR]
                if len(where) == 1 or (where and not (head or tail)):
                    break
            else:
                raise Failed(f"{self.name} no longer applies to {name}: near its line {at + moved} there should be\n"
                             + "\n".join("    " + line[1:] for line in change if line[0] != "+"))
            i = at_line = min(where, key=lambda i: abs(i - expected))
            for line in part:
                if line[0] == "+":
                    lines.insert(at_line, line[1:])
                    words.insert(at_line, line[1:].split())
                if line[0] == "-":
                    del lines[at_line], words[at_line]
                at_line += line[0] != "-"
            moved += i - expected + sum({"+": 1, "-": -1, " ": 0}[line[0]] for line in part)
        return "\n".join(lines) + "\n"

    def changes(self, name):
        """The hunks cut into runs of changed lines, each with a line before it and one after: (line, lines)."""
        for at, hunk in self.hunks.get(name, []):
            start = 0
            while any(line[0] != " " for line in hunk[start:]):
                first = next(i for i in range(start, len(hunk)) if hunk[i][0] != " ")
                end = next((i for i in range(first, len(hunk)) if hunk[i][0] == " "), len(hunk))
                begin = max(start, first - 1)
                skipped = sum(line[0] != "+" for line in hunk[:begin])
                yield at + skipped, hunk[begin : end + 1]
                start = end


def prepare(diff):
    """A folder with the program as the diff makes it, or as it is."""
    folder = os.path.join(BUILD, diff.name[:-5] if diff else "gpt2")
    os.makedirs(folder, exist_ok=True)
    for name in FILES:
        text = read(os.path.join(ROOT, name))
        text = diff.apply(name, text) if diff else text
        if not os.path.exists(os.path.join(folder, name)) or read(os.path.join(folder, name)) != text:
            write(os.path.join(folder, name), text)
    shutil.copy2(os.path.join(ROOT, "Makefile"), folder)
    data = os.path.join(folder, "data")
    if not os.path.islink(data):
        os.symlink(os.path.join(ROOT, "data"), data)
    return folder


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise Failed(f"{' '.join(command)} in {folder}: status {done.returncode}\n{said}")
    return done.stdout


class Variant:
    """One row of the table."""

    def __init__(self, diff, options):
        several = diff and len(diff.options()) > 1
        self.diff, self.options, self.folder = diff, options, prepare(diff)
        self.name = options.replace("--", "") if several else diff.name[:-5] if diff else "GPT-2"
        self.ms = []

    def train(self, steps):
        run(self.folder, "./train_gpt", "--layers", "3", *self.options.split(), "--steps", str(steps), "--val-every", "0",
            "--sample-every", "0", "--save-every", "0", "--tokens", "0", "--log", "log.csv",
            "--checkpoint", "gpt.safetensors")
        rows = [line.split(",") for line in read(os.path.join(self.folder, "log.csv")).splitlines()[1:]]
        self.ms += [float(row[5]) for row in rows]
        return float(rows[-1][2])

    def parameters(self):
        """Counted in the checkpoint: the shapes of the tensors that are not moments."""
        with open(os.path.join(self.folder, "gpt.safetensors"), "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items()
                   if not name.startswith(("adam.", "__metadata__")))

    def row(self, ms, steps, loss):
        size = [""] * 3
        if self.diff:
            size = [len(self.diff.hunks["train_gpt.c"]), self.diff.count("+"), self.diff.count("-")]
        show(self.name, *size, self.parameters(), ms, steps, loss)


def show(*cells):
    print("{:14}{:>7}{:>5}{:>5}{:>12}{:>9}{:>7}{:>9}".format(*cells), flush=True)


def compare(variants, seconds):
    """Times a few steps of each in turn, so that whatever else the machine does meets all alike, and takes the lower
    quartile; then trains each for as many steps as fit into the seconds."""
    for _ in range(ROUNDS):
        for variant in variants:
            variant.train(20)
    show("", "places", "+", "-", "parameters", "ms", "steps", "loss")
    for variant in variants:
        ms = statistics.quantiles(variant.ms)[0]
        steps = round(1000 * seconds / ms)
        variant.row(f"{ms:.1f}", steps, f"{variant.train(steps):.4f}")


def write_diff(name, about, changed):
    """changed: the text of each of FILES."""
    text = about
    for file, new in zip(FILES, changed):
        text += subprocess.run(["diff", f"-U{NEIGHBOURS}", "--label", "a/" + file, "--label", "b/" + file,
                                os.path.join(ROOT, file), "-"], input=new, capture_output=True, text=True).stdout
    write(os.path.join(HERE, name), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each [60]")
    for flag in ["--check", "--only-apply", "--refresh", "--write"]:
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    names = arguments.names or sorted(os.path.basename(p)[:-5] for p in glob.glob(os.path.join(HERE, "*.diff")))
    diffs = [Diff(os.path.join(HERE, name + ".diff")) for name in names]
    testing = not (arguments.only_apply or arguments.refresh or arguments.write)
    if testing:
        run(ROOT, "make", "-s", "data")
    variants, failed = [], 0
    for diff in ([None] if testing else []) + diffs:
        try:
            if arguments.refresh:
                write_diff(diff.name, diff.about, [diff.apply(f, read(os.path.join(ROOT, f))) for f in FILES])
            elif arguments.write:
                folder = os.path.join(BUILD, diff.name[:-5])
                write_diff(diff.name, diff.about, [read(os.path.join(folder, f)) for f in FILES])
            elif arguments.only_apply:
                print(prepare(diff))
            else:
                folder = prepare(diff)
                run(folder, "make", "-s", "build/test_gpt", "train_gpt")
                run(folder, "build/test_gpt", "variants")
                print("tests pass:", diff.name if diff else "GPT-2", flush=True)
                variants += [Variant(diff, options) for options in (diff.options() if diff else [""])]
        except Failed as error:
            failed += 1
            print(error, flush=True)
    if testing and not arguments.check:
        compare(variants, arguments.seconds)
    if testing:
        print(f"{len(diffs) + 1 - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
