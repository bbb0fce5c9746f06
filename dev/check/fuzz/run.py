#!/usr/bin/env python3
"""Build the fuzz targets and run each for a while; see README.md.

    python3 dev/check/fuzz/run.py [SECONDS [TARGET ...]]       60 seconds each; make fuzz does the same
"""
import concurrent.futures
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "fuzz"
PROGRAM = BUILD / "fuzz"
# The longest input of each target: a little more than its longest seed.
TARGETS = {"shards": 2048, "tokenizer": 6000, "checkpoint": 8192, "config": 1024, "encoder": 2048, "utf8": 256,
           "options": 1024}
COMPILE = ["clang", "-std=c11", "-g", "-O1", "-fopenmp", "-fsanitize=fuzzer,address,undefined",
           "-fno-sanitize-recover=undefined"]


def shard(count):
    tokens = (7 * i % 300 for i in range(count))
    return struct.pack("<256i", 20240520, 1, count, *[0] * 253) + struct.pack(f"<{count}H", *tokens)


def tokenizer(end_of_text):
    strings = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"\n\n", b"12", "é".encode(), b"'s"]
    if end_of_text:
        strings.append(b"<|endoftext|>")
    ranges = [(9, 13, 3), (32, 32, 3), (48, 57, 2), (65, 90, 1), (97, 122, 1), (0xC0, 0x24F, 1), (0x2000, 0x200A, 3)]
    text = b"".join(strings)
    starts = [0]
    for string in strings:
        starts.append(starts[-1] + len(string))
    header = [20261121, 1, 1, len(strings), len(text), len(ranges), len(strings) - 1 if end_of_text else -1]
    return (struct.pack("<256i", *header, *[0] * 249) + b"".join(struct.pack("<3I", *r) for r in ranges) +
            struct.pack(f"<{len(starts)}I", *starts) + text)


def checkpoint(dtype="F32", prefix="", sets=("",), extra=(), metadata=(("--heads", "1"),), right_length=True):
    """A model of 3 tokens, context 4, 2 channels and one layer."""
    shapes = {"wte.weight": [3, 2], "wpe.weight": [4, 2], "ln_f.weight": [2], "ln_f.bias": [2]}
    for name, shape in {"ln_1.weight": [2], "ln_1.bias": [2], "attn.c_attn.weight": [2, 6], "attn.c_attn.bias": [6],
                        "attn.c_proj.weight": [2, 2], "attn.c_proj.bias": [2], "ln_2.weight": [2], "ln_2.bias": [2],
                        "mlp.c_fc.weight": [2, 8], "mlp.c_fc.bias": [8], "mlp.c_proj.weight": [8, 2],
                        "mlp.c_proj.bias": [2]}.items():
        shapes["h.0." + name] = shape
    tensors = [(prefix + s + name, shape) for s in sets for name, shape in shapes.items()] + list(extra)
    header, at = {"__metadata__": dict(metadata)}, 0
    for name, shape in tensors:
        size = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    length = len(text) if right_length else 1 << 60  # see fuzz_checkpoint
    return struct.pack("<Q", length) + text + bytes(at)


def seeds():
    source = (ROOT / "train_gpt.c").read_bytes()
    options = {"--layers": "1", "--heads": "1", "--channels": "2", "--context": "4", "--steps": "10", "--batch": "1",
               "--accumulate": "1", "--lr": "4e-3", "--min-lr": "1e-4", "--warmup": "5", "--weight-decay": "0.1",
               "--beta1": "0.9", "--beta2": "0.99", "--clip": "1", "--seed": "1337", "--val-every": "0",
               "--val-batches": "1", "--sample-every": "0", "--save-every": "0"}
    run = {"step": "3", "windows": "3", "tokens": "100", "tokenizer": "0", **options}
    mask, head = ("h.0.attn.bias", [1, 1, 4, 4]), ("lm_head.weight", [3, 2])
    moments = ("", "adam.m.", "adam.v.")
    text = "Ä 'tis  the  year １２３, \u2003they'll\r\n\r\n\tsee: 😀 \u200b\ufffd\n".encode()
    text += b"\xff\xc3\xed\xa0\x80\xf4\x90 "  # no UTF-8
    return {
        "shards": [shard(n) for n in (0, 5, 6, 40, 200)],
        "tokenizer": [tokenizer(False), tokenizer(True)],
        "checkpoint": [checkpoint(**kind, right_length=right) for right in (True, False) for kind in (
            {}, {"dtype": "F16", "prefix": "transformer.", "extra": [mask]}, {"dtype": "BF16", "extra": [mask, head]},
            {"sets": moments, "metadata": run})] + [struct.pack("<Q", 2) + b"{}"],
        "config": [b'{"n_head": 2, "a": [1, -2.5e3, true, {"b": null}], "c\\"d": "x\\u00e9\\\\", "e": {}, "f": []}\n',
                   b"{}", b""],
        "encoder": [text, source[:3000], source[-3000:]],
        "utf8": [text],
        "options": ["\n".join(f"{k}={v}" for k, v in options.items()).encode(),
                    b"--preset\ngpt2-xl\n--resume\n--top-p\n0.5", b"--init\nx\n--log=y\n--help\n--generate\n"],
    }


def fuzz(target, seconds):
    """Run one target. Return whether it passed, and its report."""
    log = subprocess.run(
        [PROGRAM, f"-max_total_time={seconds}", f"-max_len={TARGETS[target]}", "-timeout=10", "-rss_limit_mb=1024",
         "-detect_leaks=0", "-close_fd_mask=3", "-print_final_stats=1", f"-artifact_prefix={BUILD}/{target}-",
         BUILD / target],
        cwd=ROOT, env={**os.environ, "FUZZ_TARGET": target, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace")
    inputs = [line.split()[-1] for line in log.stdout.splitlines() if line.startswith("stat::number_of_executed_units")]
    coverage = [line.split()[3] for line in log.stdout.splitlines() if " cov: " in line]
    if log.returncode:
        return False, f"{target}: FAILED\n" + "\n".join(log.stdout.splitlines()[-60:])
    return True, f"{target}: {inputs[0]} inputs, {coverage[-1]} branches"


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    targets = sys.argv[2:] or list(TARGETS)
    BUILD.mkdir(parents=True, exist_ok=True)
    probe = "#include <omp.h>\nint LLVMFuzzerTestOneInput(void) { return 0; }"
    if not shutil.which("clang") or subprocess.run([*COMPILE, "-x", "c", "-", "-o", PROGRAM], input=probe, text=True,
                                                   stderr=subprocess.DEVNULL).returncode:
        print("skipped: clang, its fuzzer runtime (Debian: libclang-rt-*-dev) or its OpenMP (libomp-dev) is missing\n"
              f"0 passed, 0 failed, {len(targets)} skipped")
        return 0
    subprocess.run([*COMPILE, ROOT / "dev/check/fuzz/fuzz.c", "-o", PROGRAM, "-lm"], check=True)
    subprocess.run([sys.executable, ROOT / "prepare_data.py", "--vocab-size", "400", "--out", BUILD / "data",
                    ROOT / "train_gpt.c"], check=True, stdout=subprocess.DEVNULL)
    for target, inputs in seeds().items():
        (BUILD / target).mkdir(exist_ok=True)
        for i, data in enumerate(inputs):
            (BUILD / target / f"seed{i}").write_bytes(data)
    passed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for good, report in pool.map(lambda target: fuzz(target, seconds), targets):
            print(report, flush=True)
            passed += good
    print(f"{passed} passed, {len(targets) - passed} failed")
    return passed != len(targets)


if __name__ == "__main__":
    sys.exit(main())
