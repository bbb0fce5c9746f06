#!/usr/bin/env python3
"""The picture of a run, or of several: one page without scripts, for any browser, from what --log wrote.

    ./train_gpt --log run.csv
    python3 dev/bench/report.py run.csv [other.csv ...] --out report.html
                    [--samples TEXT ...] [--bench bench.json]

Loss, validation loss, learning rate, norm of the gradient and tokens a second over the steps; runs are told apart by
colour and by dashes. --samples: files whose text is shown below. --bench: where a step's time goes, from
`make bench BENCH="--json bench.json"`. Needs nothing but Python.
"""

import argparse
import base64
import csv
import hashlib
import html
import json
import math
import pathlib
import re
import sys

# Okabe and Ito's colours, which colour-blind readers can tell apart; the first is the text's own. And dashes, for print.
COLOURS = ["currentColor", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "1 2", "5 2 1 2"]
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 560, 240, 56, 20, 28, 8
MOST = 280  # points of a line: each the mean of its share of the steps
MARK = '<meta name="generator" content="train_gpt report">'

STYLE = """
:root { color-scheme: light dark; --back: #fdfdfb; --text: #1b1b1b; --faint: #6a6a6a; --line: #d8d8d2; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --text: #e9e9e6; --faint: #a0a3a8; --line: #3a3e44; } }
body { margin: 0 auto; max-width: 1200px; padding: 12px; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; } h2 { font-size: 16px; margin: 8px 0 2px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
section svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--faint); } .grid { stroke: var(--line); }
.run { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .range { stroke: none; opacity: 0.15; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: right; padding: 2px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; border: 1px solid var(--line); padding: 8px; max-height: 24em; overflow: auto; unicode-bidi: isolate; }
rect.bar { fill: #0072b2; }
"""


def read(path):
    """{column: [(step, value), ...]} of a log."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        columns = {
            name: [(int(r["step"]), float(r[name])) for r in rows if r[name]] for name in rows[0] if name != "step"
        }
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        sys.exit(f"report.py: {path} is not a log of train_gpt's: {error!r}")
    return columns


def thinned(points):
    """At most MOST of [(step, mean, least, most)]; what is not finite is left out."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    share = max(1, math.ceil(len(points) / MOST))
    for i in range(0, len(points), share):
        xs, ys = zip(*points[i : i + share])
        yield sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)


def ticks(low, high):
    """Round numbers in between, some five."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(x):
    return f"{x:,.0f}" if abs(x) >= 10000 else f"{x:.4g}"


def panel(title, lines):
    """lines: [(run, points, whether points are marked)]. An SVG with axes."""
    thin = [(run, list(thinned(points)), marked) for run, points, marked in lines]
    thin = [line for line in thin if line[1]]
    if not thin:
        return ""
    least_x, most_x = (f(p[0] for _, points, _ in thin for p in points) for f in (min, max))
    low, high = min(p[2] for _, points, _ in thin for p in points), max(p[3] for _, points, _ in thin for p in points)
    if high <= low:
        low, high = low - abs(low) / 10 - 1e-12, high + abs(high) / 10 + 1e-12
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    x_at = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * (x - least_x) / max(most_x - least_x, 1)
    y_at = lambda y: TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)
    out = [f'<section><h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    for y in ticks(low, high):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(least_x, max(most_x, least_x + 1)):
        out.append(f'<text x="{x_at(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:,.0f}</text>')
    for run, points, marked in thin:
        colour, dash = COLOURS[run % len(COLOURS)], DASHES[run % len(DASHES)]
        if any(least < most for _, _, least, most in points):
            edge = [(x, y) for x, _, _, y in points] + [(x, y) for x, _, y, _ in reversed(points)]
            out.append(
                f'<polygon class="range" fill="{colour}" points="{" ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in edge)}"/>'
            )
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _, _ in points)
        out.append(f'<polyline class="run" stroke="{colour}" stroke-dasharray="{dash}" points="{path}"/>')
        for x, y, _, _ in points if marked else ():
            out.append(
                f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3" fill="{colour}"><title>step {x:,.0f}: {y:.4f}</title></circle>'
            )
    return "".join(out) + "</svg></section>"


def table(head, rows):
    cells = lambda kind, row: "<tr>" + "".join(f"<{kind}>{x}</{kind}>" for x in row) + "</tr>"
    return f'<div class="wide"><table>{cells("th", head)}{"".join(cells("td", row) for row in rows)}</table></div>'


def summary(runs):
    rows = []
    for i, (name, log) in enumerate(runs):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        sign = f'<svg viewBox="0 0 40 8" width="40" height="8"><line x2="40" y1="4" y2="4" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"/></svg>'
        losses, validations = log["loss"], log.get("val_loss") or [(0, math.nan)]
        best = min(validations, key=lambda p: p[1])
        speeds = sorted(y for _, y in log["tokens_per_s"])
        minutes = sum(y for _, y in log["ms"]) / 60000
        rows.append(
            (
                sign + " " + html.escape(name),
                f"{losses[-1][0]:,}",
                f"{losses[-1][1]:.4f}",
                f"{validations[-1][1]:.4f}",
                f"{best[1]:.4f} at {best[0]:,}",
                f"{minutes:.1f}",
                f"{speeds[len(speeds) // 2]:,.0f}",
            )
        )
    return table(
        ("run", "steps", "last loss", "last validation", "best validation", "minutes", "tokens/s, median"), rows
    )


def bench(path):
    data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["step"]["rows"]
    rows = []
    for r in data:
        bar = f'<svg viewBox="0 0 160 10" width="160" height="10"><rect class="bar" width="{160 * r["of_step"]:.1f}" height="10"/></svg>'
        rate = f"{r['gflops']:.1f} GFLOP/s" if "gflops" in r else f"{r.get('gb_per_s', 0):.1f} GB/s"
        rows.append(
            (
                html.escape(r["layer"]),
                html.escape(r["pass"]),
                f"{r['ms']:.3f}",
                rate,
                f"{100 * r['of_peak']:.0f} %",
                f"{100 * r['of_step']:.1f} %",
                bar,
            )
        )
    return "<h2>Where a step\u2019s time goes</h2>" + table(
        ("layer", "pass", "ms", "rate", "of peak", "of step", ""), rows
    )


def page(runs, samples=(), bench_file=None):
    panels = [
        panel(
            "Loss: mean, and in between least and most", [(i, log["loss"], False) for i, (_, log) in enumerate(runs)]
        ),
        panel("Validation loss", [(i, log.get("val_loss", []), True) for i, (_, log) in enumerate(runs)]),
        panel("Learning rate", [(i, log.get("lr", []), False) for i, (_, log) in enumerate(runs)]),
        panel("Norm of the gradient", [(i, log.get("grad_norm", []), False) for i, (_, log) in enumerate(runs)]),
        panel("Tokens a second", [(i, log.get("tokens_per_s", []), False) for i, (_, log) in enumerate(runs)]),
    ]
    seal = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    texts = "".join(f"<h2>{html.escape(name)}</h2><pre>{html.escape(text)}</pre>" for name, text in samples)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">{MARK}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{seal}'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(", ".join(name for name, _ in runs))}</title>
<style>{STYLE}</style></head><body>
<h1>{"A run" if len(runs) == 1 else f"{len(runs)} runs"}</h1>
{summary(runs)}
<div class="panels">{"".join(panels)}</div>
{bench(bench_file) if bench_file else ""}{texts}
</body></html>
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+")
    parser.add_argument("--out", default="report.html")
    parser.add_argument("--samples", nargs="*", default=[])
    parser.add_argument("--bench")
    o = parser.parse_args()
    out = pathlib.Path(o.out)
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:1000]:
        sys.exit(f"report.py: {out} is not a report, and is not overwritten: --out with another name")
    samples = [(pathlib.Path(x).name, pathlib.Path(x).read_text(encoding="utf-8", errors="replace")) for x in o.samples]
    text = page([(re.sub(r"\.csv$", "", pathlib.Path(x).name), read(x)) for x in o.logs], samples, o.bench)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
