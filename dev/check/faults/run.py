#!/usr/bin/env python3
"""Let every call that can fail, fail in turn, and look at what is left; see README.md. Started by make faults.

    python3 dev/check/faults/run.py [PROGRAM [KIND ...]]
"""
import collections
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[3]
SHIM = ROOT / "build" / "shim.so"
PROGRAM = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "train_gpt").resolve()
# As shim.c names them.
CALLS = ["memory", "mmap", "open", "read", "write", "flush", "sync", "close", "rename", "link", "mkdir"]
KINDS = sys.argv[2:] or [*CALLS, "stdout", "limit"]

SMALL = ["--layers", "1", "--heads", "1", "--channels", "8", "--context", "8", "--batch", "2", "--val-batches", "1"]
# Each runs in a copy of a folder that holds a checkpoint of three steps, the log of these, and an exported model.
COMMANDS = {
    "train": [*SMALL, "--seed", "2", "--steps", "3", "--save-every", "1", "--log", "log.csv"],
    "resume": ["--resume", "--steps", "4", "--log", "log.csv"],
    "generate": ["--generate", "if (", "--tokens", "20"],
    "tokenize": ["--tokenize", "text"],
    "export": ["--export", "old", "--checkpoint", "two_heads.safetensors"],
    "export anew": ["--export", "new"],
}
# Bytes that a file may have; checkpoints here have about 40,000.
LIMITS = [0, 1, 40, 100, 1000, 4095, 4096, 4097, 12288, 20000, 36864]

Result = collections.namedtuple("Result", "status out err files calls")


def run(top, arguments, fault="", wrapper=(), stdout=subprocess.PIPE):
    """One run in a copy of top/before. The files that it leaves, and how often the fault's kind of call was made."""
    with tempfile.TemporaryDirectory(dir=top) as temporary:
        folder, counter = pathlib.Path(temporary) / "run", pathlib.Path(temporary) / "count"
        shutil.copytree(top / "before", folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
        if fault:
            environment.update(LD_PRELOAD=str(SHIM), FAULT=fault, FAULT_COUNT=str(counter))
        process = subprocess.run([*wrapper, PROGRAM, "--data", top / "data", *arguments], cwd=folder, env=environment,
                                 stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, timeout=120)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for name in files:
            if name.startswith("log.csv"):
                # Rows without the columns of times. An unfinished last row, which a resumed run drops, is none.
                files[name] = [row.split(b",")[:5] for row in files[name].split(b"\n")[:-1]]
        calls = int(counter.read_text()) if counter.exists() else 0
        return Result(process.returncode, process.stdout, process.stderr.decode(errors="replace"), files, calls)


def succeed(what, result):
    if result.status:
        sys.exit(f"{what}: status {result.status} without any fault: {result.err}")
    return result


def prepare(top):
    """What the commands begin with."""
    (top / "before").mkdir()
    subprocess.run([sys.executable, ROOT / "prepare_data.py", "--tokenizer", "bytes", "--out", top / "data",
                    ROOT / "train_gpt.c"], check=True, stdout=subprocess.DEVNULL)
    (top / "before" / "text").write_bytes((ROOT / "train_gpt.c").read_bytes()[:2000])
    for arguments in ([*SMALL, "--steps", "3", "--log", "log.csv"],
                      [*SMALL, "--steps", "1", "--heads", "2", "--checkpoint", "two_heads.safetensors"],
                      ["--export", "old"]):
        subprocess.run([PROGRAM, "--data", top / "data", *arguments], cwd=top / "before", check=True,
                       stdout=subprocess.DEVNULL)


def leads_to(top, state, good, known={}):
    """Whether a run that is resumed from this checkpoint ends with that one; each is tried once."""
    if state not in known:
        with tempfile.TemporaryDirectory(dir=top) as other:
            other = pathlib.Path(other)
            (other / "data").symlink_to(top / "data")
            shutil.copytree(top / "before", other / "before")
            (other / "before" / "gpt.safetensors").write_bytes(state)
            known[state] = run(other, ["--resume"]).files["gpt.safetensors"]
    return known[state] == good


def complaint(top, command, good, before, result):
    """What is wrong with the outcome of a run with a fault, or None."""
    if result.status == 0:
        if result.files != good.files:
            return "status 0, but these files are not right: " + ", ".join(
                sorted(f for f in {*good.files, *result.files} if good.files.get(f) != result.files.get(f)))
        if command not in ("train", "resume") and result.out != good.out:
            return f"status 0, but the output is {result.out!r:.80}"
        return None
    if result.status != 1:
        return f"status {result.status}: {result.err.strip()}"
    # Of threads that it cannot make room for or start, GCC's OpenMP library itself says so, after an empty line.
    line = result.err.lstrip("\n")
    if line.count("\n") != 1 or not line.startswith(("train_gpt: ", "libgomp: ")):
        return f"stderr is not one line by train_gpt: {result.err!r}"
    for name, data in result.files.items():
        if name.endswith(".tmp"):
            return f"{name} is left; {result.err}"
        if name == "gpt.safetensors":
            whole = data in (before[name], good.files[name]) or leads_to(top, data, good.files[name])
        elif name == "log.csv":
            kept = len(before[name]) if command == "resume" else 1
            whole = data == before[name] or (len(data) >= kept and data == good.files[name][:len(data)])
        else:   # what another run left may have been kept under a further name
            whole = data in (before.get(name), good.files.get(name)) or (".old" in name and data in before.values())
        if not whole:
            return f"{name} is neither as it was nor as it should become; {result.err}"
    kept = list(result.files.values())
    mine = {"gpt.safetensors", "log.csv"} if command == "resume" else {"old/model.safetensors", "old/config.json",
                                                                        "old/tokenizer.bin"}
    lost = [name for name, data in before.items() if name not in result.files or data not in kept and name not in mine]
    return f"{', '.join(lost)} is lost; {result.err}" if lost else None


def main():
    passed = failed = 0
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nothing here needs a disk's slowness
    with tempfile.TemporaryDirectory(dir=place) as top, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        top = pathlib.Path(top)
        prepare(top)
        before = run(top, ["--version"]).files
        for command, arguments in COMMANDS.items():
            good = succeed(command, run(top, arguments))
            cases, counts, bad = {}, {}, 0
            if "stdout" in KINDS:
                cases["stdout is full"] = {"stdout": open("/dev/full", "w")}
                cases["stdout is closed"] = {"wrapper": ["sh", "-c", 'exec "$@" >&-', "sh"]}
            if "limit" in KINDS:
                for limit in LIMITS:
                    cases[f"files of at most {limit} bytes"] = {"wrapper": ["prlimit", f"--fsize={limit}"]}
            for kind in CALLS:
                if kind not in KINDS:
                    continue
                counts[kind] = run(top, arguments, kind + ":0").calls
                for n in range(1, counts[kind] + 1):
                    cases[f"{kind} {n}"] = {"fault": f"{kind}:{n}"}
            # A power cut cannot be tried here; but for each file that is replaced, it and its folder must be flushed.
            if {"sync", "rename"} <= counts.keys() and counts["sync"] < 2 * counts["rename"]:
                sys.exit(f"{command}: {counts['rename']} files are replaced, with {counts['sync']} calls of fsync")
            for case, result in zip(cases, pool.map(lambda how: run(top, arguments, **how), cases.values())):
                wrong = complaint(top, command, good, before, result)
                if wrong:
                    print(f"{command}, {case}: {wrong.strip()}", flush=True)
                    bad += 1
            calls = ", ".join(f"{n} {kind}" for kind, n in counts.items())
            print(f"{command}: {len(cases) - bad} of {len(cases)} right ({calls})", flush=True)
            passed += len(cases) - bad
            failed += bad
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
