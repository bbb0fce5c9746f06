#!/usr/bin/env python3
"""What users do by mistake or out of impatience: command lines, signals, closed pipes and terminals, names that coincide.

    make train_gpt
    python3 dev/check/user_slips.py [--program ./train_gpt] [WORD ...]     only those with WORD in their name

Each check runs in a folder of its own that holds a text's tokens in data/. What was there before must be there after
it, byte for byte, under its name or, if another run took that, as NAME.old. Prints `N passed, N failed`.
"""

import argparse
import fcntl
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PREPARE = os.path.join(ROOT, "prepare_data.py")
SMALL = "--layers 1 --channels 32 --heads 2 --context 16 --batch 2 --val-batches 2 --tokens 0".split()
ENDLESS = [*SMALL, "--steps", "1000000", "--val-every", "0", "--sample-every", "0", "--save-every", "0"]
program = os.path.join(ROOT, "train_gpt")
TESTS = []


def slip(function):
    TESTS.append(function)
    return function


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def run(*arguments, **options):
    """train_gpt to its end, in the current folder."""
    options = {"capture_output": True, "timeout": 120, "stdin": subprocess.DEVNULL, **options}
    if "stdout" in options or "stderr" in options:
        del options["capture_output"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([program, *arguments], **options)


def good(done):
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr.decode()}"
    return done


def refused(done, *words, status=1):
    """Ended by one line on stderr that says these words."""
    text = done.stderr.decode(errors="replace")
    assert done.returncode == status, f"status {done.returncode}, not {status}: {text}"
    assert text.startswith("train_gpt: ") and text[:-1].isprintable() and text[-1] == "\n", f"not one line: {text!r}"
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def begin(*arguments, **options):
    return subprocess.Popen([program, *arguments], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                                                      "stdin": subprocess.DEVNULL, **options})


def wait_for(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.01)


def rows(path):
    """Rows of a log, to be waited for."""
    return read(path).count(b"\n") - 1 if os.path.exists(path) else 0


def steps_saved(path="gpt.safetensors"):
    data = read(path)
    return int(re.search(rb'"step":"(\d+)"', data[:100000]).group(1))


def tensors(path):
    """A checkpoint's bytes, and where in them each tensor begins."""
    data = bytearray(read(path))
    begin = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:begin])
    del header["__metadata__"]
    return data, {name: begin + entry["data_offsets"][0] for name, entry in header.items()}


def resumable(path="gpt.safetensors"):
    """That a checkpoint is whole and goes on."""
    steps = steps_saved(path)
    good(run("--resume", "--checkpoint", path, "--steps", str(steps + 1)))
    return steps


# ----------------------------------------------------------------------------------------------------------------
# Nothing is overwritten that is not the program's own

@slip
def log_onto_any_file():
    for name, content in ("notes.md", b"# 1 note\n2 more\n"), ("table.csv", b"step,loss\n1,2\n"):
        write(name, content)
        refused(run(*SMALL, "--steps", "2", "--log", name), name, "no log")
        good(run(*SMALL, "--steps", "2"))
        refused(run("--resume", "--steps", "3", "--log", name), name, "no log")
        assert read(name) == content
        os.remove("gpt.safetensors")
    tokens = read("data/train.bin")
    refused(run(*SMALL, "--steps", "2", "--log", "data/train.bin"), "no log")
    assert read("data/train.bin") == tokens and not os.path.exists("gpt.safetensors")


@slip
def log_is_checkpoint():
    refused(run(*SMALL, "--steps", "2", "--checkpoint", "m", "--log", "./m"), "same file", status=2)
    assert os.listdir() == ["data"]
    good(run(*SMALL, "--steps", "2", "--checkpoint", "m"))
    model = read("m")
    os.link("m", "other")
    for name in "m", "other":
        refused(run("--resume", "--steps", "3", "--checkpoint", "m", "--log", name), "same file", status=2)
    assert read("m") == model


@slip
def log_onto_standard_output():
    with open("out", "w") as out:
        refused(run(*SMALL, "--steps", "2", "--log", "out", stdout=out), "prints to", status=2)
    with open("out", "w") as out:
        refused(run(*SMALL, "--steps", "2", "--log", "/dev/stdout", stdout=out), status=2)
    assert os.path.islink("/dev/stdout") and not os.path.exists("gpt.safetensors")


@slip
def links_stay_links():
    os.mkdir("elsewhere")
    for name in "gpt.safetensors", "log.csv":
        os.symlink("elsewhere/" + name, name)
        refused(run(*SMALL, "--steps", "1", "--log", "log.csv"), "link to nothing")
        write("elsewhere/" + name, b"")
        os.remove(name)
        os.remove("elsewhere/" + name)
    good(run(*SMALL, "--steps", "2", "--log", "log.csv"))
    for name in "gpt.safetensors", "log.csv":
        shutil.move(name, "elsewhere")
        os.symlink("elsewhere/" + name, name)
    model = read("gpt.safetensors")
    good(run("--resume", "--steps", "4", "--log", "log.csv"))
    assert steps_saved("elsewhere/gpt.safetensors") == 4 and rows("elsewhere/log.csv") == 4
    good(run(*SMALL, "--steps", "3", "--log", "log.csv"))
    for name in "gpt.safetensors", "log.csv":
        assert os.path.islink(name) and os.path.exists(f"elsewhere/{name}.old"), name
    assert steps_saved("elsewhere/gpt.safetensors.old") == 4 and model != read("gpt.safetensors")


@slip
def the_same_log_again():
    good(run(*SMALL, "--steps", "3", "--log", "log.csv"))
    log = read("log.csv")
    refused(run(*SMALL, "--steps", "3", "--log", "log.csv", "--batch", "60000", "--channels", "8192", "--context", "99"),
            "memory")
    assert read("log.csv") == log and not os.path.exists("log.csv.old")
    for n in "", "2":
        good(run(*SMALL, "--steps", "2", "--log", "log.csv"))
        assert read("log.csv.old") == log and rows("log.csv") == 2 and os.path.exists("log.csv.old" + n)


@slip
def log_is_a_pipe():
    os.mkfifo("pipe")
    good(run(*SMALL, "--steps", "2"))
    refused(run("--resume", "--steps", "3", "--log", "pipe", timeout=20), "pipe", "not a regular file")
    refused(run(*SMALL, "--log", "pipe", timeout=20), "not a regular file")


@slip
def resume_forgotten():
    good(run(*SMALL, "--steps", "5"))
    model = read("gpt.safetensors")
    for steps in 1, 2, 3:
        good(run(*SMALL, "--steps", str(steps)))
    assert read("gpt.safetensors.old") == model and steps_saved("gpt.safetensors.old3") == 2
    # Stopped before anything was done: the good model stays where it is.
    process = begin(*ENDLESS)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert steps_saved() == 3 or steps_saved("gpt.safetensors.old4") == 3


@slip
def a_folder_named_old():
    good(run(*SMALL, "--steps", "2"))
    os.mkdir("gpt.safetensors.old")
    good(run(*SMALL, "--steps", "1"))
    assert steps_saved("gpt.safetensors.old2") == 2


@slip
def checkpoint_onto_any_file():
    write("notes.md", b"# notes\n" * 9)
    refused(run(*SMALL, "--steps", "1", "--checkpoint", "notes.md"), "notes.md", "another name")
    refused(run(*SMALL, "--steps", "1", "--checkpoint", ""), "--checkpoint", status=2)
    refused(run(*SMALL, "--steps", "1", "--checkpoint", "new/"))
    refused(run(*SMALL, "--steps", "1", "--log", ""), "--log", status=2)
    assert read("notes.md") == b"# notes\n" * 9 and sorted(os.listdir()) == ["data", "notes.md"]


@slip
def a_cut_off_checkpoint():
    good(run(*SMALL, "--steps", "2"))
    cut = read("gpt.safetensors")[:100000]
    write("gpt.safetensors", cut)
    good(run(*SMALL, "--steps", "1"))
    assert read("gpt.safetensors.old") == cut


@slip
def a_file_with_the_temporary_name():
    write("q.tmp", b"mine")
    write("q.old", b"mine, too")
    good(run(*SMALL, "--steps", "2", "--checkpoint", "q"))
    good(run(*SMALL, "--steps", "1", "--checkpoint", "q"))
    assert read("q.tmp") == b"mine" and read("q.old") == b"mine, too" and steps_saved("q.old2") == 2
    assert sorted(os.listdir()) == ["data", "q", "q.old", "q.old2", "q.tmp"]


@slip
def two_runs_on_one_checkpoint():
    first = begin(*ENDLESS, "--log", "log.csv")
    wait_for(lambda: rows("log.csv") > 2, "log")
    refused(run(*SMALL, "--steps", "2"), "gpt.safetensors", f"process {first.pid}")
    refused(run(*SMALL, "--steps", "2", "--checkpoint", "./gpt.safetensors"), f"process {first.pid}")
    refused(run(*SMALL, "--steps", "2", "--checkpoint", "b", "--log", "log.csv"), "log.csv", f"process {first.pid}")
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert resumable() > 2 and sorted(os.listdir()) == ["data", "gpt.safetensors", "log.csv"]


@slip
def a_checkpoint_put_there_during_the_run():
    good(run(*SMALL, "--steps", "2", "--checkpoint", "good"))
    process = begin(*ENDLESS, "--save-every", "20", "--log", "log.csv")
    wait_for(lambda: os.path.exists("gpt.safetensors"), "checkpoint")
    os.rename("good", "gpt.safetensors")
    wait_for(lambda: os.path.exists("gpt.safetensors.old"), "old one")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert steps_saved("gpt.safetensors.old") == 2 and resumable() >= 20


@slip
def resume_while_the_run_ends():
    """Refused before the checkpoint is read, which would be an older one by the time that the run has ended."""
    first = begin(*ENDLESS, "--log", "log.csv")
    wait_for(lambda: rows("log.csv") > 2, "log")
    refused(run("--resume"), f"process {first.pid}")    # not: "cannot open"
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert resumable() > 2


@slip
def log_of_another_run():
    good(run(*SMALL, "--steps", "9", "--checkpoint", "a", "--log", "a.csv"))
    good(run(*SMALL, "--steps", "4", "--checkpoint", "b", "--log", "b.csv"))
    log = read("a.csv")
    refused(run("--resume", "--checkpoint", "b", "--steps", "5", "--log", "a.csv"), "a.csv", "another run")
    assert read("a.csv") == log and steps_saved("b") == 4
    good(run("--resume", "--checkpoint", "b", "--steps", "5", "--log", "b.csv"))
    assert rows("b.csv") == 5
    # Too short to tell whose it is: of another run, or of this one, which went on without a log.
    short, log = read("b.csv"), read("a.csv")
    done = good(run("--resume", "--checkpoint", "a", "--steps", "11", "--log", "b.csv"))
    assert b"b.csv has no row of step 9" in done.stderr and b"kept as b.csv.old" in done.stderr, done.stderr
    assert read("b.csv.old") == short and re.findall(rb"\n(\d+),", read("b.csv")) == [b"10", b"11"]
    good(run("--resume", "--checkpoint", "a", "--steps", "12"))
    write("a.csv", log + b"12,2.5")     # a disk was full
    done = good(run("--resume", "--checkpoint", "a", "--steps", "13", "--log", "a.csv"))
    assert b"kept as a.csv.old" in done.stderr and read("a.csv.old") == log + b"12,2.5" and rows("a.csv") == 1


@slip
def page_onto_its_template():
    page = os.path.join(os.path.dirname(program), "dev/view/attention.html")
    if not os.path.exists(page):
        return "skipped: the program stands alone"
    good(run(*SMALL, "--steps", "1"))
    template = read(page)
    refused(run("--attention", "what", "--html", page), "not overwritten")
    assert read(page) == template
    write("mine.html", b"<html>")
    for name, words in ("mine.html", "not overwritten"), ("data", "not a regular file"), ("no/p.html", "No such"):
        done = run("--attention", "what", "--ablate", "--html", name)
        refused(done, words)
        assert not done.stdout, "the work was done before the name was looked at"
    assert read("mine.html") == b"<html>"


@slip
def export_onto_a_text():
    shutil.copytree("data", "other")
    os.remove("other/tokenizer.bin")
    prepare("other", PREPARE, "--vocab-size", "300")
    tokenizer = read("other/tokenizer.bin")
    good(run(*SMALL, "--steps", "1"))
    refused(run("--export", "other"), "other/tokenizer.bin")
    assert read("other/tokenizer.bin") == tokenizer and len(os.listdir("other")) == 3
    for _ in range(2):
        good(run("--export", "data"))   # its own tokenizer is there


# ----------------------------------------------------------------------------------------------------------------
# The run is saved before it ends, whatever ends it

@slip
def output_is_closed():
    for command in '"$0" "$@" | head -7', '"$0" "$@" >/dev/full':
        done = subprocess.run(["bash", "-c", "set -o pipefail; " + command, program, *ENDLESS, "--val-every", "5"],
                              capture_output=True, timeout=60)
        assert done.returncode == 1 and b"cannot write to standard output" in done.stderr, done
        if "head" in command:
            assert resumable() > 0
        else:
            assert not os.path.exists("gpt.safetensors") or resumable() > 0
        for name in os.listdir():
            if name.startswith("gpt"):
                os.remove(name)


@slip
def output_does_not_wait():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    process = begin(*SMALL, "--steps", "400", "--val-every", "1", "--val-batches", "1", stdout=writer)
    os.close(writer)
    time.sleep(2)
    out = b""
    while chunk := os.read(reader, 1 << 16):
        out += chunk
    assert process.wait(60) == 0 and len(re.findall(rb"\nstep +\d+/400", out)) == 400, process.stderr.read()


@slip
def interrupted_with_tee():
    process = subprocess.Popen(["bash", "-c", '"$0" "$@" | tee t.log', program, *ENDLESS, "--log", "log.csv"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: rows("log.csv") > 5, "log")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    wait_for(lambda: os.path.exists("gpt.safetensors"), "checkpoint")
    assert resumable() >= 5


@slip
def signals():
    for number in signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU:
        process = begin(*ENDLESS, "--log", "log.csv")
        wait_for(lambda: rows("log.csv") > 3, "log")
        process.send_signal(number)
        if number == signal.SIGHUP:     # a terminal that closes sends two
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and b"finishing the step" in err, (process.returncode, err)
        assert resumable() > 3
        os.remove("gpt.safetensors")
        os.remove("log.csv")
    process = begin(*ENDLESS, "--log", "log.csv", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: rows("log.csv") > 3, "log")
    process.send_signal(signal.SIGHUP)
    before = rows("log.csv")
    wait_for(lambda: rows("log.csv") > before + 20, "step after a hang-up that nohup keeps away")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def interrupted(process):
    """Interrupts it once. It must say so within 100 ms."""
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert select.select([process.stderr], [], [], 5)[0]
    waited = time.monotonic() - start
    assert b"again: leave without saving" in os.read(process.stderr.fileno(), 1000)
    assert waited < 0.1, f"answered after {waited:.3f} s"


@slip
def answer_at_once():
    """Within 100 ms, in steps of a second; the second time it leaves."""
    process = begin(*SMALL, "--layers", "6", "--channels", "256", "--context", "256", "--accumulate", "64", "--steps",
                    "100000", "--val-every", "0", "--val-batches", "1", "--log", "log.csv")
    wait_for(lambda: rows("log.csv") >= 0 and os.path.exists("log.csv"), "log")
    time.sleep(0.5)
    interrupted(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT and sorted(os.listdir()) == ["data", "log.csv"]


@slip
def validation_and_sampling_stop_at_once():
    """They would take many seconds. A validation that did not come to its end is not reported."""
    large = [*SMALL, "--layers", "12", "--channels", "256", "--val", "data/train.bin", "--val-batches", "100000",
             "--log", "log.csv"]
    for steps in "9", "1":
        process = begin(*large, "--steps", steps, "--val-every", "1")
        wait_for(lambda: os.path.exists("log.csv"), "log")
        time.sleep(0.5)
        interrupted(process)
        out, err = process.communicate(timeout=60)
        assert process.returncode == (130 if steps == "9" else 0) and steps_saved() == 1, (process.returncode, err)
        assert rows("log.csv") == 1 and b",," in read("log.csv") and b" val " not in out and b"Validation" not in out
        os.remove("log.csv")
    process = begin(*large, "--steps", "1", "--val", "data/val.bin", "--val-batches", "1", "--tokens", "1000000")
    out = b""
    while b"---" not in out:
        out += os.read(process.stdout.fileno(), 1000)
    interrupted(process)
    process.communicate(timeout=60)
    assert process.returncode == 0 and steps_saved() == 1


@slip
def log_disk_is_full():
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600000, 600000))
    # The limit leaves room for the checkpoint, of 250,000 bytes, not for the log of so many steps.
    done = run(*ENDLESS, "--val-every", "0", "--log", "log.csv", preexec_fn=limit)
    refused(done, "log.csv", "saved after step")
    log = read("log.csv")
    steps = steps_saved()
    done = good(run("--resume", "--steps", str(steps + 1), "--log", "log.csv"))
    assert steps > 100 and b"kept as log.csv.old" in done.stderr and read("log.csv.old") == log and rows("log.csv") == 1


@slip
def checkpoint_disk_is_full():
    size = 200000
    refused(run(*SMALL, "--steps", "2", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))),
            "cannot write gpt.safetensors")
    assert os.listdir() == ["data"]


@slip
def a_save_that_fails_is_retried():
    """Someone takes the folder's permission away and gives it back."""
    if os.geteuid() == 0:
        return "skipped: root may write anywhere"
    os.mkdir("models")
    process = begin(*ENDLESS, "--save-every", "5", "--checkpoint", "models/m", "--log", "log.csv")
    wait_for(lambda: os.path.exists("models/m"), "checkpoint")
    os.chmod("models", 0o500)
    held = steps_saved("models/m")
    before = rows("log.csv")
    wait_for(lambda: rows("log.csv") > before + 50, "step without a checkpoint")
    assert steps_saved("models/m") <= held + 5
    os.chmod("models", 0o700)
    wait_for(lambda: steps_saved("models/m") > held + 20, "checkpoint afterwards")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert b"training goes on" in out and process.returncode == 143


@slip
def a_folder_that_goes_away():
    os.mkdir("models")
    process = begin(*ENDLESS, "--save-every", "5", "--checkpoint", "models/m", "--log", "log.csv")
    wait_for(lambda: os.path.exists("models/m"), "checkpoint")
    os.rename("models", "moved")
    held, before = steps_saved("moved/m"), rows("log.csv")
    wait_for(lambda: rows("log.csv") > before + 50, "step without a checkpoint")
    os.rename("moved", "models")
    wait_for(lambda: steps_saved("models/m") > held + 20, "checkpoint afterwards")
    os.rename("models", "moved")
    before = rows("log.csv")
    wait_for(lambda: rows("log.csv") > before + 9, "further steps")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert b"training goes on" in out and process.returncode == 143 and b"is lost" in err, (process.returncode, err)


@slip
def a_text_that_is_cut_off():
    shutil.copytree("data", "mine")
    process = begin(*ENDLESS, "--data", "mine", "--log", "log.csv")
    wait_for(lambda: rows("log.csv") > 5, "log")
    os.truncate("mine/train.bin", 1024)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and b"mine/train.bin" in err and b"saved after step" in err, (process.returncode, err)
    assert resumable() > 4


@slip
def a_tokenizer_that_changes():
    """The checkpoint holds the one that the run began with, whatever becomes of the file."""
    prepare("other", PREPARE, "--vocab-size", "300")
    for change in (lambda: os.truncate("data/tokenizer.bin", 0), lambda: os.truncate("data/tokenizer.bin", 100),
                   lambda: write("data/tokenizer.bin", read("other/tokenizer.bin"))):
        tokenizer = read("data/tokenizer.bin")
        process = begin(*ENDLESS, "--log", "log.csv")
        wait_for(lambda: rows("log.csv") > 5, "log")
        change()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, (process.returncode, err)
        assert tokenizer in read("gpt.safetensors")
        good(run("--generate", "what", "--tokens", "5"))
        assert resumable() > 5
        write("data/tokenizer.bin", tokenizer)
        os.remove("gpt.safetensors")
        os.remove("log.csv")


@slip
def no_numbers():
    blow_up = ["--lr", "1e3", "--min-lr", "1e3", "--warmup", "0", "--weight-decay", "1e3", "--clip", "0"]
    refused(run(*SMALL, "--steps", "3", *blow_up), "validation loss is")
    assert os.listdir() == ["data"]
    refused(run(*SMALL, "--steps", "3", *blow_up, "--save-every", "1"), "validation loss is")
    assert steps_saved() == 2
    good(run("--generate", "x", "--tokens", "3"))


@slip
def a_step_of_no_numbers():
    """A text's one token whose embedding is too large to compute with: the steps before it are saved as they were."""
    rare, tokens = 1, bytearray(read("data/train.bin"))
    assert struct.pack("<H", rare) not in (tokens[i:i + 2] for i in range(1024, len(tokens), 2))
    struct.pack_into("<H", tokens, 1024 + len(tokens) // 4 * 2, rare)
    write("data/train.bin", tokens)
    good(run(*SMALL, "--steps", "1", "--checkpoint", "m"))
    model, info = tensors("m")
    struct.pack_into("<32f", model, info["wte.weight"] + rare * 128, *[3e38] * 32)
    struct.pack_into("<32f", model, info["ln_f.bias"], *[-8] * 32)  # nothing takes it for the next one
    write("m", model)
    start = [*ENDLESS[ENDLESS.index("--batch"):], "--init", "m"]
    done = run(*start, "--log", "log.csv")
    refused(done, "the loss is", "saved after step")
    steps = steps_saved()
    assert steps == rows("log.csv") > 10 and b"at step %d " % (steps + 1) in done.stderr, done.stderr
    good(run("--generate", "x", "--tokens", "3"))
    refused(run("--resume"), f"at step {steps + 1} the loss is", "nothing is changed")
    for every in steps, steps - 3:
        done = run(*start, "--checkpoint", "b", "--save-every", str(every))
        refused(done, f"saved after step {steps} in b", "the one before in b.old" if every < steps else "")
        a, b = (data[min(at.values()):] for data, at in map(tensors, ("gpt.safetensors", "b")))
        assert steps_saved("b") == steps and a == b, every
    assert steps_saved("b.old2") == steps - 3 and steps_saved("b.old") == steps
    good(run("--resume", "--seed", "2", "--steps", str(steps + 9), "--log", "log.csv"))


@slip
def nobody_reads_what_is_generated():
    good(run(*SMALL, "--steps", "2"))
    start = time.monotonic()
    subprocess.run(["bash", "-c", '"$0" --generate x --tokens 100000000 | head -c 20', program], timeout=20,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    assert time.monotonic() - start < 5


# ----------------------------------------------------------------------------------------------------------------
# Model, tokenizer and text belong together

def prepare(folder, *arguments):
    subprocess.run([sys.executable, PREPARE, "--out", folder, *arguments], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


@slip
def data_prepared_anew():
    text = read(PREPARE)
    write("a.txt", text[:20000])
    write("b.txt", text[20000:])
    for folder, name in ("a", "a.txt"), ("b", "b.txt"):
        prepare(folder, name, "--vocab-size", "400")
    good(run(*SMALL, "--data", "a", "--steps", "2"))
    before = good(run("--data", "a", "--generate", "def", "--tokens", "9")).stdout
    assert good(run("--generate", "def", "--tokens", "9")).stdout == before
    for other in (("--resume", "--steps", "3"), ("--batch", "2", "--init", "gpt.safetensors", "--checkpoint", "c"),
                  ("--generate", "def"), ("--tokenize", "a.txt", "--checkpoint", "gpt.safetensors")):
        refused(run("--data", "b", *other), "another tokenizer than b/tokenizer.bin", "leave out --data")
    refused(run(*SMALL, "--data", "a", "--train", "b/train.bin", "--steps", "1"), "not made with the tokenizer")
    shutil.copy("b/train.bin", "a/train.bin")   # as if killed between two renames
    refused(run(*SMALL, "--data", "a", "--steps", "1"), "not made with the tokenizer")


@slip
def another_text_of_equal_length():
    good(run(*SMALL, "--steps", "2"))
    text = bytearray(read("data/train.bin"))
    text[1024 + 5000] ^= 1
    write("other.bin", text)
    refused(run("--resume", "--steps", "3", "--train", "other.bin"), "trained on another text")
    text = bytearray(read("data/val.bin"))
    text[1024 + 2000] ^= 1
    write("data/val.bin", text)
    refused(run("--resume", "--steps", "3"), "validated on another text than data/val.bin")
    old = read("gpt.safetensors")
    write("gpt.safetensors", re.sub(rb'"val_text":"\w+"', lambda m: b'"-"' + b" " * (len(m[0]) - 6) + b':""', old, 1))
    good(run("--resume", "--steps", "3"))   # written by an earlier version


@slip
def prepare_over_other_files():
    os.mkdir("mine")
    for name in "train.bin", "val.bin", "tokenizer.bin":
        write("mine/" + name, b"something else")
        done = subprocess.run([sys.executable, PREPARE, "--out", "mine", PREPARE], capture_output=True)
        assert done.returncode == 1 and name.encode() in done.stderr and read("mine/" + name) == b"something else"
        os.remove("mine/" + name)


@slip
def prepare_through_links():
    os.mkdir("disk")
    for name in "train.bin", "val.bin":
        shutil.move("data/" + name, "disk")
        os.symlink("../disk/" + name, "data/" + name)
    before = read("disk/train.bin")
    prepare("data", PREPARE, "--vocab-size", "300")
    assert os.path.islink("data/train.bin") and os.path.islink("data/val.bin") and read("disk/train.bin") != before


@slip
def export_onto_itself():
    os.mkdir("run1")
    good(run(*SMALL, "--steps", "2", "--checkpoint", "run1/model.safetensors"))
    refused(run("--checkpoint", "run1/model.safetensors", "--export", "run1"), "run1/model.safetensors")
    write("run1/config.json", b"{}")
    os.rename("run1/model.safetensors", "m")
    refused(run("--checkpoint", "m", "--export", "run1"), "run1/config.json")
    assert os.listdir("run1") == ["config.json"]


@slip
def what_a_model_does_not_say():
    """It is guessed, and that is said."""
    good(run(*SMALL, "--channels", "64", "--heads", "4", "--steps", "1"))
    good(run("--export", "e"))
    assert not good(run("--init", "e", "--generate", "x", "--tokens", "3")).stderr
    os.remove("e/config.json")
    model = read("e/model.safetensors")
    for key, words in ((b"--heads", "does not say how many heads it has, nor does a config.json: 1 are taken, as in GPT-2"),
                       (b"tokenizer", "does not say which tokenizer it was trained with: e/tokenizer.bin is taken")):
        assert model.count(b'"%s":"' % key) == 1
        write("e/model.safetensors", model.replace(b'"%s":"' % key, b'"%s":"' % key.upper().replace(b"-", b"_")))
        done = good(run("--init", "e", "--generate", "x", "--tokens", "3"))
        assert done.stderr.decode() == f"train_gpt: e/model.safetensors {words}\n", done.stderr


# ----------------------------------------------------------------------------------------------------------------
# The command line

@slip
def options_that_swallow_options():
    good(run(*SMALL, "--steps", "2"))
    refused(run("--log", "--resume"), "--resume is an option", status=2)
    refused(run("--resume", "--preset", "gpt2"), "leave out --preset", status=2)
    refused(run("--resume", "--steps", "1"), "has done 2 steps")
    for idle in ("--layers", "3"), ("--log", "x"), ("--steps", "3"), ("--recompute",):
        refused(run("--memory", *idle), "no effect with --memory", status=2)
    refused(run("--tokenize", "data/train.bin", "--layers", "1"), "no effect with --tokenize", status=2)
    refused(run("--generate", "x", "--top-k", "3", "--temperature", "0"), "no effect with --temperature 0", status=2)
    refused(run("--generate", "x", "--seed", "3", "--temperature", "0"), "no effect with --temperature 0", status=2)
    refused(run("--temperature", "0", "--top-p", "0.5"), "no effect with --temperature 0", status=2)
    for way in ("--generate", "x"), ("--attention", "x y"), ("--eval", "data/train.bin"), ("--export", "folder"):
        refused(run(*way, "--init", "gpt.safetensors", "--checkpoint", "other"),
                "--checkpoint has no effect with --init", status=2)
    assert sorted(os.listdir()) == ["data", "gpt.safetensors"]


@slip
def advice_that_fits():
    refused(run("--train", "t1.bin", "t2.bin"), "in quotes", status=2)
    done = run("--train", "typo.bin")
    refused(done, "typo.bin")
    assert b"prepare_data.py" not in done.stderr
    refused(run("--data", "nosuch"), "prepare_data.py --out nosuch")
    write("pytorch_model.bin", b"PK\3\4" + bytes(100))
    refused(run("--init", "pytorch_model.bin"), "to_safetensors.py")
    refused(run("--checkpoint", "a\nb"), "control characters", status=2)
    refused(run("--data", "\x1b[31mred"), "control characters", status=2)
    refused(run("--st\x1beps", "3"), "unknown option", status=2)


@slip
def stacks_and_threads():
    for shell in "ulimit -s 140", "ulimit -S -s 100", "export OMP_STACKSIZE=16k", "export OMP_NUM_THREADS=100000":
        done = subprocess.run(["bash", "-c", shell + '; exec "$0" "$@"', program, *SMALL, "--steps", "2"],
                              capture_output=True, timeout=120)
        assert done.returncode == 0, (shell, done.returncode, done.stderr)


@slip
def built_again_with_other_flags():
    """What make would build is noted down by a compiler that does nothing else."""
    shutil.copy(os.path.join(ROOT, "Makefile"), ".")
    write("train_gpt.c", b"")
    write("cc", b"""#!/bin/sh
echo "$@" >>calls
while [ $# -gt 1 ]; do [ "$1" = -o ] && [ "$2" != /dev/null ] && touch "$2"; shift; done
""")
    os.chmod("cc", 0o755)
    built = 0
    for flags, again in ((), 1), ((), 0), (["DEBUG=1"], 1), (["DEBUG=1"], 0), (["CFLAGS=-O2"], 1), (["CFLAGS=-O2"], 0), ((), 1):
        subprocess.run(["make", "CC=./cc", *flags, "train_gpt"], check=True, stdout=subprocess.DEVNULL)
        before, built = built, read("calls").count(b"-o train_gpt ")
        assert built - before == again, (flags, read("calls"))


@slip
def called_through_the_loader():
    loader = re.search(rb"/lib[^\0]*/ld-[^\0]+", read(program))
    if not loader:
        return "skipped: the program has no loader"
    done = subprocess.run([loader.group(), program, "--version"], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(b"train_gpt ") and not done.stderr, done


# ----------------------------------------------------------------------------------------------------------------
# The terminal

def terminal(columns, arguments, until, then=lambda process, master: None):
    """What a run writes to a terminal of so many columns, until it has written `until` times a progress line."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([program, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    out, done = b"", False
    while select.select([master], [], [], 60)[0]:
        try:
            chunk = os.read(master, 1 << 16)
        except OSError:     # closed at the other end
            break
        out += chunk
        if out.count(b"\rstep") + out.count(b"Kstep") > until and not done:
            then(process, master)
            done = True
    os.close(master)
    return process.wait(60), out.decode()


def progress_lines(out):
    return [line for line in re.split(r"[\r\n]+(?:\x1b\[K)?", out) if re.match(r"step \d+/", line)]


@slip
def lines_fit_the_terminal():
    for columns, words in (40, "left"), (80, "["), (200, "of peak"):
        status, out = terminal(columns, [*SMALL, "--steps", "300", "--val-every", "100"], 5)
        lines = progress_lines(out)
        assert status == 0 and len(lines) > 250, (status, len(lines), out[-500:])
        assert max(map(len, lines)) < columns, max(lines, key=len)
        assert any(words in line for line in lines), (columns, lines[10])
        assert sum("val " in line for line in lines) == 3
        wiped = out.count("\x1b[K")
        assert wiped >= len(lines) - 4, (wiped, len(lines))


@slip
def the_terminal_changes():
    def narrow(process, master):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))

    status, out = terminal(200, [*SMALL, "--steps", "2000", "--val-every", "0"], 5, narrow)
    lines = progress_lines(out)
    assert status == 0 and len(lines[0]) > 80 and max(map(len, lines[-100:])) < 40


@slip
def the_terminal_is_closed():
    master, slave = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen([program, *ENDLESS, "--log", "log.csv"], stdin=slave, stdout=slave, stderr=slave,
                               preexec_fn=own_terminal)
    os.close(slave)
    while rows("log.csv") < 20:
        if select.select([master], [], [], 0.01)[0]:
            os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(60) == 129
    assert resumable() >= 20


def main():
    # What starts this in the background may ignore these, and so would all programs that are started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    global program
    parser = argparse.ArgumentParser(description="What users do by mistake or out of impatience.")
    parser.add_argument("--program", default=program)
    parser.add_argument("-v", "--verbose", action="store_true", help="name each as it runs")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    program = os.path.abspath(options.program)
    if not os.access(program, os.X_OK):
        sys.exit("user_slips.py: %s is not built; `make train_gpt` builds it" % program)
    os.environ.update(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory() as top:
        data = os.path.join(top, "data")
        subprocess.run([sys.executable, PREPARE, "--tokenizer", "bytes", "--out", data, PREPARE], check=True,
                       stdout=subprocess.DEVNULL)
        for test in TESTS:
            if options.words and not any(word in test.__name__ for word in options.words):
                continue
            with tempfile.TemporaryDirectory(dir=top) as folder:
                shutil.copytree(data, os.path.join(folder, "data"))
                os.chdir(folder)
                start = time.monotonic()
                try:
                    why = test()
                    skipped += why is not None
                    passed += why is None
                    if why:
                        print(f"{test.__name__}: {why}", flush=True)
                except (AssertionError, OSError, subprocess.SubprocessError) as error:
                    failed += 1
                    print(f"{test.__name__}: {type(error).__name__}: {error}", flush=True)
                os.chdir(top)
                if options.verbose:
                    print(f"{test.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
