#!/usr/bin/env python3
"""Train with several processes, and compare with one.

    make train_gpt train_gpt_mpi
    python3 dev/check/test_mpi.py [--mpirun mpirun] [--program ./train_gpt_mpi]
    python3 dev/check/test_mpi.py --plant [--mpirun mpirun] [--mpicc mpicc]

`make test_mpi` does the first two. The last plants errors into copies of train_gpt.c, one in each, and wants the tests to
see them all; a quarter of an hour. Small models are trained by 1, 2, 3 and 4 processes of one thread each: losses, gradient
norms, weights and moments must be those of train_gpt but for rounding, with one process to the bit; a run must go on
with any other number of processes. Then what can go wrong does: a process is killed, one is told to stop, one has other
data, another command line, another program or too little memory, a node is lost, the disk is full, the mpirun is
another MPI's. All must end within seconds with a line that names the rank, and leave the last checkpoint whole. Prints a line for each failure and
in the end `N passed, N failed`; the exit status is 1 if something failed. The standard library is enough.
"""

import argparse
import array
import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Tensors of several cache lines a process and of less, in layers that are exchanged one after the other.
MODEL = "--layers 3 --heads 2 --channels 40 --context 32 --seed 5".split()
SCHEDULE = "--warmup 3 --val-every 6 --val-batches 3 --sample-every 6 --tokens 8 --lr 3e-3".split()
SECONDS = 20  # in which all processes must have ended
passed = failed = 0
TRIES = 3  # of what mpirun prints


def check(good, what, output=""):
    global passed, failed
    passed += bool(good)
    failed += not good
    if not good:
        print("failed: %s%s" % (what, "".join("\n    " + line for line in output.splitlines()[-12:])), flush=True)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def rows_of(log):
    """The log's columns but the times: step, loss, val_loss, lr, grad_norm."""
    lines = read(log).decode().splitlines()[1:]
    return [[float(x) if x else math.nan for x in line.split(",")[:5]] for line in lines]


def tensors_of(checkpoint):
    data = read(checkpoint)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    tensors = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            first, last = entry["data_offsets"]
            tensors[name] = array.array("f", data[8 + length + first:8 + length + last])
    return header["__metadata__"], tensors


def distance(a, b):
    """The largest difference of two logs' numbers, relative to the second's."""
    if len(a) != len(b):
        return math.inf
    worst = 0.0
    for x, y in zip(sum(a, []), sum(b, [])):
        if math.isnan(x) != math.isnan(y):
            return math.inf
        if not math.isnan(x):
            worst = max(worst, abs(x - y) / max(abs(y), 1e-30))
    return worst


def tensor_distance(a, b):
    """The largest length of a difference of two tensors, relative to the tensor's; and the tensor's name."""
    if a.keys() != b.keys():
        return math.inf, "which there are"
    worst = (0.0, "")
    for name in b:
        if len(a[name]) != len(b[name]):
            return math.inf, name
        length = math.fsum(y * y for y in b[name])
        difference = math.fsum((x - y) * (x - y) for x, y in zip(a[name], b[name]))
        worst = max(worst, (math.sqrt(difference / length) if length else math.inf * (difference > 0) if difference else 0.0, name))
    return worst


def prepare(folder):
    """Makes a folder of data: words drawn at random, always the same for the same name. Where a text repeats a character
    for long, gradients can be so steep that rounding shows."""
    draw = random.Random(os.path.basename(folder))
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 7))) for _ in range(200)]
    with open(folder + ".txt", "w", encoding="ascii") as f:
        f.write("\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(1000)))
    subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), "--tokenizer", "bytes", "--out", folder,
                    folder + ".txt"], check=True, stdout=subprocess.DEVNULL)
    return folder


def is_open_mpi(mpirun):
    """Or else MPICH, whose mpirun knows neither of Open MPI's options. Open MPI's calls itself by more than one name."""
    version = subprocess.run([mpirun, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return "HYDRA" not in version.stdout


# As many processes as are asked for, on however many cores, whoever asks.
ANYWHERE = ["--oversubscribe", "--bind-to", "none"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Runs:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.openmpi = is_open_mpi(options.mpirun)
        self.environment = dict(os.environ, **AS_ROOT, OMP_NUM_THREADS="1", OMPI_MCA_mpi_yield_when_idle="1")
        self.data, self.other_data = prepare(self.path("data")), prepare(self.path("other"))

    def path(self, name):
        return os.path.join(self.folder, name)

    def files(self, name):
        return ["--data", self.data, "--checkpoint", self.path(name), "--log", self.path(name + ".csv")]

    def mpirun(self, *blocks):
        """The command that starts each (processes, program and arguments) of blocks in one world."""
        command = [self.options.mpirun] + (ANYWHERE if self.openmpi else [])
        for i, (count, arguments) in enumerate(blocks):
            command += ([":"] if i else []) + ["-n", str(count)] + arguments
        return command

    def start(self, command):
        # A group of its own, so that nothing is left behind whatever happens.
        return subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def end(self, process, seconds=SECONDS):
        """Its status and what it printed; the status is None if it did not end in time."""
        try:
            output = process.communicate(timeout=seconds)[0]
            return process.returncode, output
        except subprocess.TimeoutExpired:
            for pid in self.ranks(process) + [process.pid]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return None, process.communicate()[0]

    def run(self, *blocks, seconds=60):
        return self.end(self.start(self.mpirun(*blocks)), seconds)

    def train(self, name, count, *arguments):
        """Trains with so many processes of train_gpt_mpi, or with 0 by train_gpt."""
        arguments = self.files(name) + list(arguments)
        if count:
            status, output = self.run((count, [self.options.program] + arguments))
        else:
            status, output = self.end(self.start([os.path.join(ROOT, "train_gpt")] + arguments), 60)
        check(status == 0, "%s: status %s" % (name, status), output)
        check(count < 2 or "machine    %d processes" % count in output, "%s: not %d processes" % (name, count), output)
        return output

    def ranks(self, process):
        """The process ids of train_gpt_mpi below mpirun, on one node in the order of ranks."""
        return self.below(process.pid)

    def below(self, ancestor):
        children = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                fields = read("/proc/%s/stat" % pid).decode("ascii", "replace").rsplit(")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(pid))
        found, below = [], [ancestor]
        while below:
            pid = below.pop()
            below += children.get(pid, [])
            with contextlib.suppress(OSError):
                if os.path.basename(os.readlink("/proc/%d/exe" % pid)) == os.path.basename(self.options.program):
                    found.append(pid)
        return sorted(found)


def test_same_training(runs):
    """Losses, norms, weights and moments, with one batch a step and with two, and with clipping that takes hold."""
    for case, arguments in (("plain", ["--batch", "12"]), ("accumulated", ["--batch", "12", "--accumulate", "2"]),
                            ("clipped", ["--batch", "12", "--clip", "0.3", "--weight-decay", "1"])):
        arguments = MODEL + SCHEDULE + ["--steps", "12"] + arguments
        runs.train(case + "0", 0, *arguments)
        log, (metadata, tensors) = rows_of(runs.path(case + "0.csv")), tensors_of(runs.path(case + "0"))
        for count in (1, 2, 3, 4):
            name = "%s%d" % (case, count)
            output = runs.train(name, count, *arguments)
            if not os.path.exists(runs.path(name)):
                continue
            if count == 1:
                check(read(runs.path(name)) == read(runs.path(case + "0")), "%s: one process writes another checkpoint" % name)
            d = distance(rows_of(runs.path(name + ".csv")), log)
            check(d < 3e-6, "%s: the log differs by %g" % (name, d))
            its_metadata, its_tensors = tensors_of(runs.path(name))
            d, which = tensor_distance(its_tensors, tensors)
            check(d < 1e-4, "%s: %s differs by %g" % (name, which, d))
            for key in metadata.keys() | its_metadata.keys():
                check(key == "loss" or metadata.get(key) == its_metadata.get(key),
                      "%s: %s is %s, not %s" % (name, key, its_metadata.get(key), metadata.get(key)))
            # Where there is one process, Open MPI gives it a terminal, on which it writes one line again and again.
            check(count == 1 or output.count("step    12/12") == 1 and output.splitlines().count("---") == 4, "%s: progress or samples not once" % name, output)


def test_memory(runs):
    """Of N processes each needs what one needs for its windows, less all but an N-th of the two moments, and more a
    layer's gradients from each of the others."""
    channels, layers, context, vocabulary = 256, 2, 32, 256
    layer = 12 * channels**2 + 13 * channels
    floats = layers * layer + (vocabulary + context + 2) * channels
    arguments = ["--layers", str(layers), "--channels", str(channels), "--heads", "2", "--context", str(context),
                 "--steps", "1", "--val-batches", "1", "--sample-every", "0", "--tokens", "1", "--save-every", "0"]

    def needed(count, batch):
        output = runs.train("memory%d" % count, count, *arguments, "--batch", str(batch))
        found = re.search(r"memory +([0-9.]+) MB needed", output)
        return float(found[1]) if found else math.nan

    for count in (2, 4):
        others = (count - 1) / count
        expected = needed(0, 4 // count) - 4e-6 * others * (2 * floats - layer)
        its = needed(count, 4)
        check(abs(its - expected) < 0.2, "%d processes: %.1f MB needed, not %.1f" % (count, its, expected))


def test_same_bits(runs):
    """Twice the same, with other numbers of threads and of steps between checkpoints."""
    arguments = MODEL + SCHEDULE + ["--steps", "12", "--batch", "12"]
    if not os.path.exists(runs.path("plain3")):
        runs.train("plain3", 3, *arguments)
    runs.environment["OMP_NUM_THREADS"] = "3"
    runs.train("threads", 3, *arguments, "--save-every", "5")
    runs.environment["OMP_NUM_THREADS"] = "1"
    metadata, tensors = tensors_of(runs.path("threads"))
    check(tensors == tensors_of(runs.path("plain3"))[1], "three threads or more saves change the bits")


def test_resume(runs):
    """Begun by some and ended by others is as good as begun and ended by the same."""
    arguments = MODEL + SCHEDULE + ["--batch", "12"]
    if not os.path.exists(runs.path("plain0")):
        runs.train("plain0", 0, *arguments, "--steps", "12")
    log, (_, tensors) = rows_of(runs.path("plain0.csv")), tensors_of(runs.path("plain0"))
    for first, then in ((2, 3), (3, 0), (0, 4), (4, 1), (2, 2)):
        name = "from%dto%d" % (first, then)
        for path in (name, name + ".csv"):
            if os.path.exists(runs.path(path)):
                os.remove(runs.path(path))
        # The learning rate depends on --steps: the first half ends by being told to, or is saved on the way.
        half = runs.path(name + "_half")
        process = runs.start(runs.mpirun((first, [runs.options.program] + runs.files(name) + arguments +
                                          ["--steps", "12", "--save-every", "5"])) if first else
                             [os.path.join(ROOT, "train_gpt")] + runs.files(name) + arguments +
                             ["--steps", "12", "--save-every", "5"])
        while process.poll() is None and not os.path.exists(half):
            with contextlib.suppress(OSError):
                os.link(runs.path(name), half)  # the checkpoint of step 5: the next one gets another file
            time.sleep(0.0005)
        runs.end(process, 60)
        if not os.path.exists(half):
            check(False, "%s: no checkpoint on the way" % name)
            continue
        step = int(tensors_of(half)[0]["step"])
        check(step in (5, 10), "%s: the checkpoint on the way is of step %d" % (name, step))
        os.replace(half, runs.path(name))
        runs.train(name, then, "--resume", "--save-every", "0")
        d = distance(rows_of(runs.path(name + ".csv")), log)
        check(d < 3e-6, "%s: the log differs by %g" % (name, d))
        d, which = tensor_distance(tensors_of(runs.path(name))[1], tensors)
        check(d < 1e-4, "%s: %s differs by %g" % (name, which, d))
        if first == then and os.path.exists(runs.path("plain2")):
            check(tensors_of(runs.path(name))[1] == tensors_of(runs.path("plain2"))[1], "%s: other bits than uninterrupted" % name)


def begin_long(runs, name, count, *arguments):
    """A run that would take minutes, once it has saved something; its processes."""
    command = [runs.options.program] + runs.files(name) + MODEL + ["--steps", "1000000", "--batch", "12", "--save-every", "20",
                                                                   "--sample-every", "0", "--val-every", "0"] + list(arguments)
    process = runs.start(runs.mpirun((count, command)))
    limit = time.monotonic() + 60
    while process.poll() is None and not os.path.exists(runs.path(name)) and time.monotonic() < limit:
        time.sleep(0.02)
    return process, runs.ranks(process)


def whole(path):
    try:
        metadata, tensors = tensors_of(path)
        return int(metadata["step"]) > 0 and all(map(math.isfinite, tensors["h.1.mlp.c_fc.weight"]))
    except (OSError, ValueError, KeyError, struct.error):
        return False


def test_kill(runs):
    for victim in (0, 2):
        name = "killed%d" % victim
        process, ranks = begin_long(runs, name, 3)
        check(len(ranks) == 3, "%s: %d processes" % (name, len(ranks)))
        if len(ranks) == 3:
            os.kill(ranks[victim], signal.SIGKILL)
        status, output = runs.end(process)
        check(status not in (None, 0), "%s: status %s" % (name, status), output)
        # MPICH's mpirun names the host and a PID, which on a busy machine may be another's that it ended itself.
        wanted = ["process rank %d" % victim if runs.openmpi else "RUNNING AT", os.uname().nodename]
        check(all(w in output for w in wanted), "%s: not said which" % name, output)
        check(gone(ranks), "%s: processes are left" % name)
        check(whole(runs.path(name)), "%s: the checkpoint is damaged" % name)
        status, output = runs.run((2, [runs.options.program] + runs.files(name) +
                                   ["--resume", "--steps", str(int(tensors_of(runs.path(name))[0]["step"]) + 2)]))
        check(status == 0, "%s: cannot be resumed" % name, output)


def alive(pid):
    try:
        return read("/proc/%d/stat" % pid).decode("ascii", "replace").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pids):
    limit = time.monotonic() + SECONDS
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_stop(runs):
    """One process, or mpirun, is told to stop: all save once, after the same step, and end."""
    for number, whom in ((signal.SIGINT, 2), (signal.SIGTERM, 0), (signal.SIGINT, None)):
        name = "stopped%s" % whom
        # Open MPI's mpirun gives its processes one second from a signal to their end, if it is not told otherwise.
        runs.environment["OMPI_MCA_odls_base_sigkill_timeout"] = "3"
        process, ranks = begin_long(runs, name, 3)
        if len(ranks) == 3:
            os.kill(process.pid if whom is None else ranks[whom], number)
        status, output = runs.end(process)
        # MPICH's mpirun may forget its processes' status when it is told to stop itself.
        check(status is not None and (status or whom is None), "%s: status %s" % (name, status), output)
        check(whole(runs.path(name)), "%s: the checkpoint is damaged" % name)
        last = int(rows_of(runs.path(name + ".csv"))[-1][0])
        check(int(tensors_of(runs.path(name))[0]["step"]) == last, "%s: the last step, %d, is not saved" % (name, last), output)
        if whom is not None or not runs.openmpi:  # whose mpirun does not print any more then
            check(output.count("stopped after step %d, saved" % last) == 1, "%s: not said once" % name, output)
        check(gone(ranks), "%s: processes are left" % name)
    del runs.environment["OMPI_MCA_odls_base_sigkill_timeout"]  # it makes the end after a failure slower, too


def test_haste(runs):
    """Where a step takes longer than Open MPI's mpirun would wait for it, that is said, unless it was told to wait."""
    command = [runs.options.program] + runs.files("haste") + MODEL + ["--steps", "1", "--batch", "12", "--accumulate", "400"]
    for told in (False, True):
        if told:
            runs.environment["OMPI_MCA_odls_base_sigkill_timeout"] = "3"
        status, output = runs.run((2, command))
        runs.environment.pop("OMPI_MCA_odls_base_sigkill_timeout", None)
        check(status == 0, "haste: status %s" % status, output)
        check(output.count("sigkill_timeout") == (runs.openmpi and not told), "haste, told %s: said wrongly or not" % told, output)


def expect_line(name, wanted, status, output):
    lines = [line for line in output.splitlines() if line.startswith("train_gpt:")]
    check(status not in (None, 0), "%s: status %s" % (name, status), output)
    check(len(lines) == 1 and all(w in lines[0] for w in wanted), "%s: not one line with %s" % (name, wanted), output)


def expect(runs, name, wanted, *blocks):
    """All end in time, with one line of train_gpt's, in which is what is wanted. On a busy machine mpirun may be slow to
    pass a line on, or to end those who would say the same a second later: then it is tried again."""
    for attempt in range(TRIES):
        start = time.monotonic()
        status, output = runs.run(*blocks, seconds=SECONDS)
        lines = [line for line in output.splitlines() if line.startswith("train_gpt:")]
        if len(lines) == 1:
            break
    expect_line("%s, %.0f s" % (name, time.monotonic() - start), wanted, status, output)


def test_refusals(runs):
    program, host = runs.options.program, os.uname().nodename
    train = [program] + runs.files("refused") + MODEL + ["--steps", "20", "--batch", "12"]

    expect(runs, "a batch that is not divisible", ["rank 0 on " + host, "--batch 12", "5 processes"], (5, train))
    expect(runs, "an unknown option", ["rank 0 on " + host, "--bach"], (2, train + ["--bach", "3"]))
    expect(runs, "no data", ["rank 0 on " + host, "nowhere"], (2, train + ["--data", runs.path("nowhere")]))
    expect(runs, "no data on one", ["rank 1 on " + host, "nowhere"], (1, train), (1, train + ["--data", runs.path("nowhere")]))
    expect(runs, "other data", ["rank 1 on " + host, "text to train on"], (1, train), (2, train + ["--data", runs.other_data]))
    expect(runs, "other validation data", ["rank 2 on " + host, "text to validate on"], (2, train),
           (1, train + ["--val", os.path.join(runs.other_data, "val.bin")]))
    expect(runs, "another precision", ["rank 1 on " + host, "command line"], (1, train), (1, train + ["--precision", "bf16"]))
    expect(runs, "another learning rate", ["rank 1 on " + host, "command line"], (1, train), (1, train + ["--lr", "1e-3"]))
    another = runs.path("another_" + os.path.basename(program))
    shutil.copy(program, another)
    with open(another, "ab") as f:
        f.write(b"other")
    expect(runs, "another thing to do", ["rank 1 on " + host, "command line"], (1, train), (1, [program, "--generate", "a"]))
    expect(runs, "another program", ["rank 1 on " + host, "program"], (1, train), (1, [another] + train[1:]))
    for name, seed in (("begin", "5"), ("begin_other", "6")):
        runs.train(name, 0, *(MODEL + SCHEDULE + ["--steps", "1", "--batch", "12", "--seed", seed]))
    common = [program, "--data", runs.data, "--batch", "12", "--steps", "20"]
    out = ["--checkpoint", runs.path("refused")]
    expect(runs, "other weights", ["rank 1 on " + host, "weights"], (1, common + out + ["--init", runs.path("begin")]),
           (1, common + out + ["--init", runs.path("begin_other")]))
    limited = ["sh", "-c", 'ulimit -v 1000000; exec "$@"', "sh"]
    large = [program, "--data", runs.data, "--layers", "6", "--heads", "8", "--channels", "1024", "--context", "256", "--batch", "12",
             "--steps", "3", "--checkpoint", runs.path("refused")]
    expect(runs, "no memory on one", ["rank 1 on " + host, "memory"], (1, large), (1, limited + large))
    expect(runs, "a folder that is not there", ["rank 0 on " + host, "cannot write"],
           (2, train + ["--checkpoint", runs.path("nowhere/c")]))
    status, output = runs.run((3, [program, "--generate", "a", "--tokens", "5", "--checkpoint", runs.path("begin")]))
    check(status == 0 and len(output.strip()) < 200, "generation with three processes", output)


def test_alone(runs):
    """Started by the other MPI's mpirun, where there is one, or by a srun that brings none, nobody finds the others."""
    train = [runs.options.program] + runs.files("alone") + MODEL + ["--steps", "2", "--batch", "12"]
    wanted = ["these 2 processes do not find each other", "srun --mpi=pmix"]
    other = shutil.which("mpirun.mpich" if runs.openmpi else "mpirun.openmpi")
    if other and is_open_mpi(other) != runs.openmpi:
        process = runs.start([other] + ([] if runs.openmpi else ANYWHERE) + ["-n", "2"] + train)
        expect_line("the other mpirun", wanted, *runs.end(process))
    for size, refused in (("2", True), ("1", False)):
        command = ["env", "SLURM_STEP_NUM_TASKS=" + size, "SLURM_PROCID=0", "SLURM_NTASKS=2"] + train
        status, output = runs.end(runs.start(command))
        if refused:
            expect_line("srun", wanted, status, output)
        else:
            check(status == 0, "a step of one task: status %s" % status, output)


def full_disk(runs):
    """Returns the run's status, what it printed, and the checkpoint from before."""
    before = None
    if os.path.exists(runs.path("full")):
        os.remove(runs.path("full"))
    command = [runs.options.program, "--data", runs.data, "--checkpoint", runs.path("full")] + MODEL + \
        "--steps 1000000 --batch 12 --save-every 20 --sample-every 0 --val-every 0".split()
    process = runs.start(runs.mpirun((3, command)))
    limit = time.monotonic() + 60
    while process.poll() is None and not os.path.exists(runs.path("full")) and time.monotonic() < limit:
        time.sleep(0.02)
    ranks = runs.ranks(process)
    if len(ranks) == 3:
        resource.prlimit(ranks[0], resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        time.sleep(2)
        check(process.poll() is None, "a full disk ends the run")
        before = read(runs.path("full"))
        os.kill(ranks[1], signal.SIGTERM)
    return (*runs.end(process), before)


def test_full_disk(runs):
    """From some time on rank 0 can write no file of that size: training goes on, and the checkpoint before is whole."""
    for attempt in range(TRIES):  # see expect()
        status, output, before = full_disk(runs)
        if sum(line.startswith("train_gpt:") for line in output.splitlines()) == 1 and "training goes on" in output:
            break
    check(status not in (None, 0), "a full disk: status %s" % status, output)
    check("training goes on" in output, "a full disk is not said", output)
    lines = [line for line in output.splitlines() if line.startswith("train_gpt:")]
    check(len(lines) == 1 and "rank 0 on" in lines[0] and "cannot write" in lines[0], "a full disk: not one line", output)
    check(whole(runs.path("full")) and read(runs.path("full")) == before, "a full disk: the checkpoint before is gone")


def agent(runs, name, what):
    """A program that mpirun takes for ssh: its arguments are options, a node's name and a command."""
    path = runs.path(name)
    with open(path, "w", encoding="ascii") as f:
        f.write('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nshift\n%s\n' % what)
    os.chmod(path, 0o755)
    return (["--mca", "plm_rsh_agent", path, "--host", "localhost:1,another:1"] if runs.openmpi else
            ["-launcher", "ssh", "-launcher-exec", path, "-hosts", "localhost,another"])


def test_nodes(runs):
    """A second node that does not answer at the start, and one that is lost while both train. The second node is this
    one: what ssh would start there is started here."""
    command = [runs.options.program] + runs.files("nodes") + MODEL + \
        "--steps 1000000 --batch 12 --save-every 20 --sample-every 0 --val-every 0".split()
    if runs.openmpi:  # MPICH's mpirun waits for such a node without end
        status, output = runs.end(runs.start([runs.options.mpirun] + agent(runs, "deaf", "exit 255") + ["-n", "2"] + command))
        check(status not in (None, 0), "a node that does not answer: status %s" % status, output)
        check(not os.path.exists(runs.path("nodes")), "a node that does not answer: half of them train")
    pid = runs.path("daemon")
    process = runs.start([runs.options.mpirun] + agent(runs, "near", 'echo $$ > %s; eval "exec $*"' % pid) + ["-n", "2"] + command)
    limit = time.monotonic() + 60
    while process.poll() is None and not os.path.exists(runs.path("nodes")) and time.monotonic() < limit:
        time.sleep(0.02)
    ranks = runs.ranks(process)
    check(len(ranks) == 2, "two nodes: %d processes" % len(ranks))
    daemon = int(read(pid))
    for victim in [daemon] + runs.below(daemon):
        os.kill(victim, signal.SIGKILL)
    status, output = runs.end(process)
    check(status not in (None, 0), "a node that is lost: status %s" % status, output)
    check(gone(ranks), "a node that is lost: processes are left")
    check(whole(runs.path("nodes")), "a node that is lost: the checkpoint is damaged")


def test_all(options, folder):
    runs = Runs(options, folder)
    for test in (test_same_training, test_memory, test_same_bits, test_resume, test_kill, test_stop, test_haste, test_refusals,
                 test_alone, test_full_disk, test_nodes):
        if not options.tests or test.__name__[5:] in options.tests:
            start = time.monotonic()
            test(runs)
            print("%s: %.1f s" % (test.__name__[5:], time.monotonic() - start), flush=True)


# What is changed in train_gpt.c, and the tests that must fail then.
PLANTED = {
    "new weights stay where they are": ("adamw(model, i, i + 1, o), begin_exchange(model, model->weights, i, NULL);",
                                        "adamw(model, i, i + 1, o);", ["same_training"]),
    "embeddings' gradients are not summed": ("end_exchange(i), add_up(m, &m->tensors[i]);",
                                             "end_exchange(i), layer + 1 < 0 ? (void)0 : add_up(m, &m->tensors[i]);", ["same_training"]),
    "a layer's gradients are not summed": ("end_exchange(i), add_up(m, &m->tensors[i]);",
                                           "end_exchange(i), layer + 1 == 1 ? (void)0 : add_up(m, &m->tensors[i]);", ["same_training"]),
    "one process is left out of sums": ("for (int r = 0; r < world.size; r++) {\n            int k",
                                        "for (int r = 0; r < world.size - 1; r++) {\n            int k", ["same_training"]),
    "the sum is no mean": ("T, share / (float)world.size);", "T, share);", ["same_training"]),
    "what was sent away stays": ("memcpy(d + start, sum,", "if (last > t->own && start < last) memcpy(d + start, sum,", ["same_training"]),
    "the norm is of the own part": ("model->gradient_norm = sqrt(sums[0])", "model->gradient_norm = sqrt(exchange.squares)",
                                    ["same_training"]),
    "all take the same windows": ("run->next + (uint64_t)world.rank * run->B", "run->next", ["same_training"]),
    "the first batch is sent, not the last": ("++exchange.batches == opt.accumulate ?", "++exchange.batches == 1 ?", ["same_training"]),
    "batches are counted on": ("exchange.squares = 0, exchange.batches = 0;", "exchange.squares = 0;", ["same_training"]),
    "a validation of the own windows": ("    sum_over_processes(&loss, 1);", "    //", ["same_training"]),
    "the own moments are saved": ("        begin_exchange(model, model->gradients, i, NULL);\n        end_exchange(i);\n", "",
                                  ["same_training"]),
    "moments are taken for gradients": ("if (training) whole_moments(model, 0);", "", ["same_training", "same_bits"]),
    "moments are resumed from the first part": ("load_tensor(c, e, t->own, t->owned, block", "load_tensor(c, e, 0, t->owned, block",
                                                ["resume"]),
    "one is told to stop, the others go on": ("world.stopping = sums[2] > 0;", "world.stopping = signalled != 0;", ["stop"]),
    "all write the checkpoint": ("if (world.rank) output_failed(", "if (false) output_failed(", ["full_disk", "same_training"]),
    "each keeps all moments": ("model->moment_size = t->moment + cache_lines(t->owned *",
                               "model->moment_size = t->moment + cache_lines(t->size *", ["memory"]),
    "alone unnoticed": ("if (world.size == 1) refuse_to_be_alone();", "", ["alone"]),
    "haste unsaid": ("if (run.step == run.first + 1) warn_of_haste(duration);", "", ["haste"]),
    "nobody compares": ("if (first_says(marks[i]) != marks[i])", "if (first_says(marks[i]) != marks[i] && i > 5)", ["refusals"]),
}


def plant(options, folder):
    """Builds as make does, since one process is to give train_gpt's bits."""
    os.symlink(os.path.join(ROOT, "data"), os.path.join(folder, "data"))
    shutil.copy(os.path.join(ROOT, "Makefile"), folder)
    source = read(os.path.join(ROOT, "train_gpt.c")).decode()
    for name, (old, new, tests) in PLANTED.items():
        check(source.count(old) == 1, "%s: the line is not there" % name)
        with open(os.path.join(folder, "train_gpt.c"), "w", encoding="utf-8") as f:
            f.write(source.replace(old, new))
        subprocess.run(["make", "-s", "-C", folder, "train_gpt_mpi", "MPICC=" + options.mpicc], check=True)
        command = [sys.executable, os.path.abspath(__file__), "--mpirun", options.mpirun, "--program",
                   os.path.join(folder, "train_gpt_mpi")] + tests
        try:
            seen = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300).stdout
            seen = [line for line in seen.splitlines() if line.startswith("failed: ")]
        except subprocess.TimeoutExpired:
            seen = ["failed: to end"]
        check(seen, "%s: not seen" % name)
        print("%s: %s" % (name, (seen or ["not seen"])[0]), flush=True)


def main():
    arguments = argparse.ArgumentParser(description="Train with several processes, and compare with one.")
    arguments.add_argument("--mpirun", default="mpirun", help="default: mpirun")
    arguments.add_argument("--program", default=os.path.join(ROOT, "train_gpt_mpi"), help="default: ./train_gpt_mpi")
    arguments.add_argument("--plant", action="store_true", help="see above")
    arguments.add_argument("--mpicc", default="mpicc", help="default: mpicc")
    arguments.add_argument("tests", nargs="*", help="those of these names, default: all")
    options = arguments.parse_args()
    options.program = os.path.abspath(options.program)
    for program in ([] if options.plant else [options.program]) + [os.path.join(ROOT, "train_gpt")]:
        if not os.access(program, os.X_OK):
            sys.exit("test_mpi.py: %s is not built; `make %s` builds it" % (program, os.path.basename(program)))
    if not shutil.which(options.mpirun):
        sys.exit("test_mpi.py: %s is not installed" % options.mpirun)
    with tempfile.TemporaryDirectory() as folder:
        if options.plant:
            plant(options, folder)
        else:
            test_all(options, folder)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
