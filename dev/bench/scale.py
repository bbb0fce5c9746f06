#!/usr/bin/env python3
"""How far does it pay to train on more machines? The model of a step that dev/bench/scale.md explains.

    python3 dev/bench/scale.py                        the page's tables
    python3 dev/bench/scale.py --gbps 25 --tflops 60 --batch 8 --model gpt2-large    for nodes and a network of yours
    python3 dev/bench/scale.py --measure DATA         a round of measurements into scale.json; three minutes each
    python3 dev/bench/scale.py --write                tables and drawing anew into scale.md and scale.svg
    python3 dev/bench/scale.py --check                do the page and the drawing say what the model says?

--measure wants the machine for itself, `make train_gpt_mpi`, MPI's mpicc and mpirun, and a folder of GPT-2 tokens:
prepare_data.py --tokenizer gpt2. Everything else needs nothing but Python.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE, DRAWING, MEASURED = HERE / "scale.md", HERE / "scale.svg", HERE / "scale.json"

V, T = 50257, 1024
MODELS = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}  # L, C
NODES = [8, 16, 32, 64, 128, 256, 512, 1024]
TOTAL = 512  # sequences of a step in all, where the total is what is fixed
LATENCY = {10: 20e-6, 100: 3e-6, 400: 3e-6}  # of a message, by Gbit/s: TCP on Ethernet, else RDMA; assumed
CPU_NODES = 32  # a server does what so many of the machine in scale.json do: 64 of its cores


# ======================================================================================================================
# The model


def parameters(L, C, context=T):
    return V * C + context * C + L * (12 * C * C + 13 * C) + 2 * C


def operations(L, C, sequences, context=T):
    """Of a step, as train_gpt.c's step_operations counts them."""
    return 6 * (12 * C * C * L + V * C + C * L * context) * sequences * context


def buckets(L, C, context=T):
    """(share of the backward pass after which it is complete, floats, tensors), in that order.

    The logits come first and have no bucket: their weights are wte, whose gradient gets its last part from the
    embedding, at the very end.
    """
    head = V * C / (12 * C * C * L + V * C + C * L * context)
    layer = 12 * C * C + 13 * C
    return [(head + (1 - head) * (i + 1) / L, layer, 12) for i in range(L)] + [(1, (V + context + 2) * C, 4)]


class Node:
    """rate: operations a second. memory: bytes a second. add: seconds to add one byte to another. has_nccl: moves a
    layer's tensors at once, others one by one."""

    def __init__(self, rate, memory, add=0.0, has_nccl=False):
        self.rate, self.memory, self.add, self.has_nccl = rate, memory, add, has_nccl


class Network:
    """alpha: seconds a message. beta: seconds a byte."""

    def __init__(self, alpha, beta):
        self.alpha, self.beta = alpha, beta


def exchange(N, floats, tensors, network):
    """Everybody sends a part of each tensor to everybody else: a reduce-scatter but for adding up, or an all-gather."""
    return tensors * (N - 1) * network.alpha + (N - 1) / N * 4 * floats * network.beta


def reduce_scatter(N, floats, tensors, network, node):
    return exchange(N, floats, tensors, network) + (N - 1) / N * 4 * floats * node.add


def step(L, C, N, sequences, node, network):
    """Seconds of a step on N nodes, each with so many sequences: in all, and of it what the network adds."""
    P = parameters(L, C)
    compute = operations(L, C, sequences) / node.rate
    backward = 2 / 3 * compute
    update = 36 * P / N / node.memory
    if N == 1:
        return compute + update, 0
    done = 0  # with the bucket before
    for share, floats, tensors in buckets(L, C):
        done = max(done, share * backward) + reduce_scatter(N, floats, 1 if node.has_nccl else tensors, network, node)
    exposed = done - backward + exchange(N, P, 1 if node.has_nccl else 12 * L + 4, network)
    return compute + update + exposed, exposed


def efficiency(L, C, N, node, network, batch=None):
    """What N nodes do in a second, by what one does, by N; the batch a node fixed or, if None, the total batch."""
    alone, _ = step(L, C, 1, batch or TOTAL, node, network)
    time, _ = step(L, C, N, batch or TOTAL / N, node, network)
    return alone / time if batch else alone / time / N


# ======================================================================================================================
# This machine: predicted and measured


def predicted(m, N):
    """Milliseconds of a step of N processes with a thread each, from what one such process takes alone for one window
    and for two, and from what messages cost. Where there are fewer cores, processes take turns on them."""
    P, tensors, alone = m["parameters"], 12 * 12 + 4, m["alone_ms"]
    window, update = alone["2"] - alone["1"], 2 * alone["1"] - alone["2"]
    network = Network(m["alpha_us"] * 1e-6, 1e-9 / m["beta_GBps"])
    adding = Node(1, 1, 1e-9 / m["gamma_GBps"])
    moving = 1e3 * (reduce_scatter(N, P, tensors, network, adding) + exchange(N, P, tensors, network))
    return max(1, N / m["cores"]) * (m["batch"] / N * window + update / N + moving)


def run(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"scale.py: {' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def measure(data):
    """Another round for scale.json: what MPI's messages cost; what one process with one thread takes for one window,
    and for two; and steps of 1, 2 and 4 processes."""
    cores, batch, context, steps = os.cpu_count(), 4, 256, 5
    L, C = MODELS["gpt2"]
    P = parameters(L, C, context)
    mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none"] + ["--allow-run-as-root"] * (os.getuid() == 0)
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        name = re.search(r"model name\s*: (.*)", file.read())
    figures = dict(machine=f"{name[1] if name else 'CPU'}, {cores} cores", cores=cores, parameters=P, batch=batch,
                   context=context, operations=operations(L, C, batch, context), rounds=[])
    if MEASURED.exists():
        figures["rounds"] = json.loads(MEASURED.read_text(encoding="utf-8"))["rounds"]
    with tempfile.TemporaryDirectory() as folder:
        scale, log, checkpoint = (os.path.join(folder, name) for name in ("scale", "log.csv", "c.safetensors"))

        def train(processes, threads, windows):
            run([*mpirun, "-n", str(processes), ROOT / "train_gpt_mpi", "--preset", "gpt2", "--data", data, "--batch",
                 str(windows), "--context", str(context), "--steps", str(steps), "--val-every", "0", "--val-batches",
                 "1", "--sample-every", "0", "--save-every", "0", "--log", log, "--checkpoint", checkpoint],
                env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
            with open(log, newline="", encoding="utf-8") as file:
                ms = [float(row["ms"]) for row in csv.DictReader(file)]
            os.remove(log), os.remove(checkpoint)
            return round(statistics.median(ms[2:]))

        run(["mpicc", "-std=c11", "-O2", HERE / "scale.c", "-o", scale])
        costs = json.loads(run([*mpirun, "-n", "2", scale, str(P), str(2**20)]))
        figures["rounds"].append({
            "costs": {k: v for k, v in costs.items() if k.endswith(("us", "ps", "ms"))},
            "alone_ms": {str(n): train(1, 1, n) for n in (1, 2)},
            "steps_ms": {str(n): train(n, max(1, cores // n), batch) for n in (1, 2, 4)}})
    MEASURED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measured():
    """scale.json with the rounds' medians."""
    m = json.loads(MEASURED.read_text(encoding="utf-8"))

    def medians(name):
        return {k: statistics.median(r[name][k] for r in m["rounds"]) for k in m["rounds"][0][name]}

    return dict(m, **medians("costs"), alone_ms=medians("alone_ms"), steps_ms=medians("steps_ms"))


# ======================================================================================================================
# Tables and drawing


def kinds(m):
    """{title: (node, sequences a node, what is said of it)}"""
    rate = CPU_NODES * m["operations"] / (m["steps_ms"]["1"] * 1e-3)
    server, gpu = Node(rate, 200e9, 1 / 50e9), Node(400e12, 3e12, has_nccl=True)
    return {"server": (server, 4, f"a 64-core server, {rate / 1e12:.1f} TFLOP/s, 4 × 1,024 tokens"),
            "GPU": (gpu, 16, "a GPU, 400 TFLOP/s, 16 × 1,024 tokens")}


def networks():
    return {gbps: Network(alpha, 8 / (gbps * 1e9)) for gbps, alpha in LATENCY.items()}


def measured_table(m):
    yield "| processes | threads each | predicted | measured | error |"
    yield "|--:|--:|--:|--:|--:|"
    for N, ms in m["steps_ms"].items():
        threads, guess = max(1, m["cores"] // int(N)), predicted(m, int(N))
        guessed, error = (f"{guess:,.0f} ms", f"{100 * (guess / ms - 1):+.0f} %") if threads == 1 else ("", "")
        yield f"| {N} | {threads} | {guessed} | {ms:,.0f} ms | {error} |"


def costs_line(m):
    alone = m["alone_ms"]
    return (f"{m['machine']}: α = {m['alpha_us']:.2g} µs, 1/β = {m['beta_GBps']:.2g} GB/s, "
            f"1/γ = {m['gamma_GBps']:.2g} GB/s; one process with a thread takes {alone['1']:,.0f} ms for one window, "
            f"{alone['2']:,.0f} ms for two.")


def most_nodes(L, C, node, network, batch):
    """The most of NODES of which at least half do work that one alone would have to do; 0 if not even the fewest."""
    return max([N for N in NODES if efficiency(L, C, N, node, network, batch) >= 0.5], default=0)


def nodes_text(N):
    return f"< {NODES[0]}" if not N else f"≥ {N:,}" if N == NODES[-1] else f"{N:,}"


def paying_table(m):
    yield "| node | model | floats | " + " | ".join(f"{g} Gbit/s" for g in LATENCY) + " |"
    yield "|:--|:--|--:|" + "--:|" * len(LATENCY)
    for kind, (node, batch, _) in kinds(m).items():
        for name, (L, C) in MODELS.items():
            cells = []
            for network in networks().values():
                fixed = 100 * efficiency(L, C, NODES[-1], node, network, batch)
                most = most_nodes(L, C, node, network, None)
                cells.append(f"{fixed:.0f} % · {nodes_text(most)}")
            yield f"| {kind} | {name} | {parameters(L, C) / 1e6:,.0f}M | " + " | ".join(cells) + " |"


COLOURS = {10: "#d55e00", 100: "#0072b2", 400: "#009e73"}
PANEL, HIGH, LEFT, TOP, GAP = 190, 150, 50, 76, 58


def drawing(m):
    width, height = LEFT + 4 * PANEL + 3 * 22 + 14, TOP + 2 * HIGH + GAP + 24
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           'font-size="11" fill="#333">', f'<rect width="{width}" height="{height}" fill="#fff"/>']

    def text(x, y, words, more=""):
        out.append(f'<text x="{x:.1f}" y="{y:.1f}"{more}>{words}</text>')

    text(LEFT, 16, "Efficiency of N nodes: what each does, by what one alone does", ' font-size="13"')
    x = LEFT
    for gbps, colour in COLOURS.items():
        out.append(f'<path d="M{x} 32h22" stroke="{colour}" stroke-width="2"/>')
        text(x + 27, 36, f"{gbps} Gbit/s")
        x += 105
    for dashes, words in (("", "batch a node fixed"), ("4 3", f"{TOTAL} × 1,024 tokens in all")):
        out.append(f'<path d="M{x} 32h26" stroke="#333" stroke-width="1.5" stroke-dasharray="{dashes}"/>')
        text(x + 31, 36, words)
        x += 150
    for row, (node, batch, words) in enumerate(kinds(m).values()):
        y = TOP + row * (HIGH + GAP)
        text(LEFT, y - 20, words[0].upper() + words[1:], ' font-weight="bold"')
        for column, (name, (L, C)) in enumerate(MODELS.items()):
            x = LEFT + column * (PANEL + 22)
            for percent in (0, 25, 50, 75, 100):
                at = y + HIGH * (1 - percent / 100)
                out.append(f'<path d="M{x} {at:.1f}h{PANEL}" stroke="#ddd"/>')
                if column == 0:
                    text(x - 6, at + 4, f"{percent} %", ' text-anchor="end"')
            for i, N in enumerate(NODES):
                if i % 2 or i == 0:
                    text(x + PANEL * i / (len(NODES) - 1), y + HIGH + 14, f"{N:,}", ' text-anchor="middle"')
            text(x, y - 5, name)
            for gbps, network in networks().items():
                for size, dashes in ((batch, ""), (None, "4 3")):
                    at = [(x + PANEL * i / (len(NODES) - 1),
                           y + HIGH * (1 - efficiency(L, C, N, node, network, size)))
                          for i, N in enumerate(NODES) if size or N <= TOTAL]
                    line = "L".join(f"{px:.1f} {py:.1f}" for px, py in at)
                    out.append(f'<path d="M{line}" fill="none" stroke="{COLOURS[gbps]}" stroke-width="1.8" '
                               f'stroke-dasharray="{dashes}"/>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def filled(page, m):
    """The page with its tables and figures as they must be, between marks that name them."""
    parts = {"costs": costs_line(m), "measured": "\n".join(measured_table(m)), "paying": "\n".join(paying_table(m))}
    for name, text in parts.items():
        page, found = re.subn(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda at: at[1] + text + at[2], page,
                              flags=re.DOTALL)
        if found != 1:
            sys.exit(f"scale.py: {PAGE.name} must have one place '<!-- {name} -->' ... '<!-- end -->'")
    return page


def print_own(name, gbps, tflops, batch, alpha, has_nccl):
    (L, C), network = MODELS[name], Network(alpha * 1e-6, 8 / (gbps * 1e9))
    node = Node(tflops * 1e12, tflops * 1e12 / 100, has_nccl=has_nccl)  # 100 operations a byte, roughly as all have it
    print(f"{name}, {tflops:g} TFLOP/s, {gbps:g} Gbit/s, {batch} × {T} tokens a node; beside: {TOTAL} × {T} in all")
    print(f"{'nodes':>6} {'step':>10} {'network':>10} {'efficiency':>11} {'beside':>9}")
    for N in [1, 2, 4] + NODES:
        seconds, added = step(L, C, N, batch, node, network)
        beside = f"{100 * efficiency(L, C, N, node, network):8.0f}%" if N <= TOTAL else ""
        print(f"{N:6} {1e3 * seconds:7.1f} ms {1e3 * added:7.1f} ms "
              f"{100 * efficiency(L, C, N, node, network, batch):10.0f}% {beside:>9}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="DATA", help="a folder of GPT-2 tokens")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--gbps", type=float, help="of the network, Gbit/s")
    parser.add_argument("--tflops", type=float, default=100, help="that a node attains in training (100)")
    parser.add_argument("--batch", type=int, default=16, help="sequences a node (16)")
    parser.add_argument("--nccl", action="store_true", help="a layer's tensors are moved at once")
    parser.add_argument("--alpha", type=float, default=5, help="a message's latency, microseconds (5)")
    arguments = parser.parse_args()
    if arguments.gbps:
        return print_own(arguments.model, arguments.gbps, arguments.tflops, arguments.batch, arguments.alpha,
                         arguments.nccl)
    if arguments.measure:
        measure(arguments.measure)
    m = measured()
    page, svg = filled(PAGE.read_text(encoding="utf-8"), m), drawing(m)
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")
        DRAWING.write_text(svg, encoding="utf-8")
    elif arguments.check:
        for path, wanted in ((PAGE, page), (DRAWING, svg)):
            if path.read_text(encoding="utf-8") != wanted:
                sys.exit(f"scale.py: {path.name} does not say what the model says: python3 dev/bench/scale.py --write")
        print("scale.md and scale.svg say what the model says")
    else:
        print(costs_line(m), *measured_table(m), "", *paying_table(m), sep="\n")


if __name__ == "__main__":
    main()
