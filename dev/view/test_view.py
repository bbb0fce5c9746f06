#!/usr/bin/env python3
"""Is what --attention shows right? Trains a small model, has its pages written, and looks at them in headless Chromium.

    make train_gpt && /usr/bin/python3 dev/view/test_view.py [--pictures DIR]

Needs torch, numpy, selenium, chromium and its driver (Debian: python3-torch python3-selenium chromium chromium-driver).
The numbers that the page shows are compared with those of dev/check/reference.py in float64. --pictures keeps what the
page looks like: light, dark, and as wide as a phone. Ends with "N passed, N failed".
"""

import argparse
import fcntl
import json
import os
import pathlib
import pty
import random
import re
import struct
import subprocess
import sys
import tempfile
import termios
import unicodedata

import numpy as np
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "dev" / "check"))
import reference  # noqa: E402

# A script's end, quotes, a mark without a letter, Hebrew, a sign that turns the direction, tab, and control characters.
HOSTILE = (
    "a</script><b>\"q'&\u0301e\u0301 \u05e9\u05dc\u05d5\u05dd\u202eab\u202c\t\n\x01\x1b[31m\x7f <!--"
    + "\U0001f469\u200d\U0001f467"
)
PLAIN = "def first(self):\n    return self.first(self)\ndef first(self):\n    return"
counts = {True: 0, False: 0}


def check(good, what):
    counts[bool(good)] += 1
    if not good:
        print(f"FAILED: {what}")


def near(x, right, limit, what):
    check(abs(x - right) <= limit, f"{what}: {x!r}, not {right!r}, more than {limit:.1e} away")


# ---------------------------------------------------------------------------------------------------------- the program


class Program:
    def __init__(self, work):
        self.model, self.work = str(work / "gpt.safetensors"), work
        self.log, self.other_log = work / "<run>.csv", work / "other.csv"
        few = "--layers 1 --heads 1 --channels 16 --steps 20 --sample-every 0 --val-every 10 --tokens 0".split()
        self.run(*few, "--log", str(self.other_log), "--checkpoint", str(work / "other.safetensors"))
        self.run("--steps", "300", "--sample-every", "0", "--val-every", "100", "--log", str(self.log))

    def run(self, *options):
        command = ["./train_gpt", "--checkpoint", self.model, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
        if done.returncode:
            sys.exit(f"{command}: {done.stderr.decode()}")
        return done.stdout.decode()

    def page(self, name, text, *options):
        self.run("--attention", text, "--html", str(self.work / name), *options)
        return self.work / name

    def tokens(self, text):
        file = self.work / "text"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return [int(x) for x in self.run("--tokenize", str(file)).split()]

    def in_terminal(self, columns, *options):
        """What it prints where lines are so long."""
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        process = subprocess.Popen(["./train_gpt", "--checkpoint", self.model, *options], cwd=ROOT, stdout=follower)
        os.close(follower)
        text = b""
        while True:
            try:
                more = os.read(leader, 65536)
            except OSError:
                break
            if not more:
                break
            text += more
        os.close(leader)
        check(process.wait() == 0, f"--attention in {columns} columns: its status")
        return text.decode()

    def weights(self):
        """The model's parameters, and its sizes."""
        data = open(self.model, "rb").read()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        w = {}
        for name, x in header.items():
            if x.get("dtype") == "F32" and not name.startswith("adam."):  # nor the tokenizer
                start, end = x["data_offsets"]
                w[name] = np.frombuffer(data[8 + length + start : 8 + length + end], "<f4").reshape(x["shape"])
        V, C = w["wte.weight"].shape
        L = sum(name.endswith("ln_1.weight") for name in w)
        H = int(header["__metadata__"]["--heads"])
        return w, reference.Config(V, w["wpe.weight"].shape[0], C, H, L, 1)


def computed(w, c, tokens):
    """Scores and weights of all heads, (L,H,n,n), and the logits, in float64."""
    kept = {}
    t = torch.tensor([tokens])
    leaves = {name: torch.tensor(np.asarray(x, np.float64)) for name, x in w.items()}
    reference.forward(leaves, c, t, t, lambda name, x: kept.setdefault(name, x))
    of = lambda name: np.stack([kept[f"h.{l}.{name}"][0].numpy() for l in range(c.L)])
    return of("scores"), of("weights"), kept["logits"][0].numpy()


def half_precision_limit(w, c, tokens, which):
    """By how much logits may differ if each weight is rounded to half precision.

    A weight x moves by at most e = max(2^-11 |x|, 2^-25), and evenly within that, so its standard deviation is
    e / sqrt(3). To first order a logit moves by the sum of its derivatives times these, independent of each other: with
    a standard deviation of sqrt(sum of (derivative e)^2 / 3). Six of those.
    """
    limits, t = [], torch.tensor([tokens])
    for v in which:
        leaves, kept = reference.leaves(w, torch.float64), {}
        reference.forward(leaves, c, t, t, lambda name, x: kept.setdefault(name, x))
        kept["logits"][0, -1, v].backward()
        e = {name: torch.clamp(x.detach().abs() * 2**-11, min=2**-25) for name, x in leaves.items()}
        limits.append(6 * float(sum(((x.grad * e[name]) ** 2).sum() / 3 for name, x in leaves.items())) ** 0.5)
    return limits


# ---------------------------------------------------------------------------------------------------------- the browser


class Browser:
    def __init__(self):
        options = webdriver.ChromeOptions()
        for argument in "--headless=new --no-sandbox --hide-scrollbars --window-size=1200,900".split():
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
        self.driver.set_script_timeout(120)

    def open(self, page):
        self.driver.get(page.as_uri())
        self.page = page

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, name):
        return self.js("return document.getElementById(arguments[0]).textContent", name)

    def element(self, selector):
        return self.driver.find_element("css selector", selector)

    def move_to(self, i, j, n):
        """The mouse onto a cell of the large map."""
        canvas = self.element("#large")
        self.js("arguments[0].scrollIntoView()", canvas)  # whole: offsets count from the middle of what is in view
        size = canvas.size
        x, y = ((k + 0.5) / n * size[s] - size[s] / 2 for k, s in ((j, "width"), (i, "height")))
        ActionChains(self.driver, duration=0).move_to_element_with_offset(canvas, round(x), round(y)).perform()

    def finish(self, what):
        """No word on the console, and no request but for the page itself."""
        messages = [x["message"] for x in self.driver.get_log("browser")]
        check(not messages, f"{what}: the console says {messages}")
        events = [json.loads(x["message"])["message"] for x in self.driver.get_log("performance")]
        sent = [x["params"]["request"]["url"] for x in events if x["method"] == "Network.requestWillBeSent"]
        sent = [x for x in sent if x != self.page.as_uri() and not x.startswith(("about:", "data:", "chrome:"))]
        check(not sent, f"{what}: requests {sent}")

    def picture(self, path, width, dark):
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        self.driver.refresh()
        wide, high = self.js("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        check(wide <= width, f"{width} pixels wide, the page takes {wide}")
        background = self.js("return getComputedStyle(document.body).backgroundColor")
        check((sum(map(int, re.findall(r"\d+", background))) < 200) == dark, f"dark: {dark}, background {background}")
        if path:
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**view, "height": high})
            self.driver.save_screenshot(str(path))
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def shown_number(text):
    found = re.search(r"([0-9.]+)(?: ± [0-9.]+)?$", text)
    return float(found.group(1)) if found else float("nan")


# ------------------------------------------------------------------------------------------------------------ the tests


def width_of(line):
    """Columns, as a terminal counts."""
    return sum(0 if unicodedata.combining(x) else 2 if unicodedata.east_asian_width(x) in "WF" else 1 for x in line)


def terminal(program):
    table = {}
    for columns in 40, 80, 200:
        text = program.in_terminal(
            columns, "--attention", HOSTILE + PLAIN, "--ablate", "--html", str(program.work / "t.html")
        )
        lines = text.replace("\r\n", "\n").split("\n")
        path = [x for x in lines if x.startswith(str(program.work))]
        widest = max(width_of(x) for x in lines if x not in path)
        check(widest <= columns, f"{columns} columns: {max(lines, key=width_of)!r}")
        check(
            not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e]", "\n".join(lines)),
            "control characters are printed",
        )
        table[columns] = [x for x in lines if re.match(r" +\d+ +\d+ ", x)]
        check(len(table[columns]) == 8, f"{columns} columns: {len(table[columns])} heads")
    check(
        "gate+" in program.in_terminal(80, "--attention", PLAIN, "--ablate", "--html", str(program.work / "t.html")),
        "80 columns do not hold the table",
    )


def page(program, browser, w, c):
    for text, chosen in ((PLAIN, (1, 2)), (HOSTILE, (0, 0))):
        layer, head = chosen
        options = ("--ablate", "--layer", str(layer), "--head", str(head))
        tokens = program.tokens(text)[: c.T]
        n = len(tokens)
        scores, weights, logits = computed(w, c, tokens)
        browser.open(program.page("page.html", text, *options))
        data = browser.js("return data")
        check(data["ids"] == tokens and data["n"] == n, "the page's tokens")
        if text == PLAIN:
            check("".join(data["tokens"]) == text, "the page's text")
        check(browser.js("return document.scripts.length") == 2, "the text has become a script")
        check(browser.js("return document.querySelectorAll('#tokens .token').length") == n, "tokens shown")
        bold = browser.js("return [...document.querySelectorAll('#tokens .token')].map(x => x.textContent).join('')")
        check(not re.search("[\0-\x1f\x7f\u202a-\u202e\u200d]", bold), "what cannot be seen is shown as it is")
        if text == HOSTILE:
            for part in "</script>", "<b>", "\"q'&", "\\x1b", "\\x7f", "\u21e5", "\u21b5":
                check(part in bold, f"{part!r} is not in the page's text")
        for x, right in (
            ("\u0301", "\u25cc\u0301"),
            ("\u202eab", "\\u202eab"),
            (" a b ", "\u00b7a b\u00b7"),
            ("\0", "\\x00"),
        ):
            check(browser.js("return pieces(arguments[0]).map(x => x[0]).join('')", x) == right, f"{x!r} as text")
        # All heads, by the numbers that are stored; the chosen one's exactly.
        every = np.array(
            browser.js(
                "return Array.from({length: data.L}, (_, l) => Array.from({length: data.H}, (_, h) => Array.from({length: view.n},"
                " (_, i) => Array.from({length: view.n}, (_, j) => j <= i ? view.weight(l, h, i, j) : 0))))"
            )
        )
        check(np.abs(every - weights).max() <= 1 / 510 + 1e-5, "weights in 8 bits")
        check(np.abs(every[layer, head] - weights[layer, head]).max() <= 1e-5, "the chosen head's weights")
        check(np.abs(every[layer, head].sum(-1) - 1).max() <= 1e-5, "the chosen head's rows do not sum to 1")
        # The mouse: what is said of a cell is that cell's weight.
        for i in range(0, n, max(1, n // 6)):
            for j in {0, i // 2, i}:
                browser.move_to(i, j, n)
                near(shown_number(browser.text("hover")), weights[layer, head, i, j], 1e-5, f"hover {i},{j}")
        browser.move_to(0, n - 1, n)
        check("may not look ahead" in browser.text("hover"), "a hidden key")
        # Any other head is a click away.
        for l in range(c.L):
            for h in range(c.H):
                browser.element(f'[data-at="{l},{h}"]').click()
                check(browser.text("largeTitle") == f"Layer {l}, head {h}", "the chosen head's title")
                browser.move_to(n // 2, n // 3, n)
                exact = (l, h) == chosen
                near(
                    shown_number(browser.text("hover")),
                    weights[l, h, n // 2, n // 3],
                    1e-5 if exact else 0.0026,
                    f"hover {l}.{h}",
                )
                check(bool(browser.text("pieces")) == exact, "the pieces of a head")
        # The keyboard.
        browser.element('[data-at="0,0"]').send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
        browser.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
        title = browser.text("largeTitle")
        check(
            title == f"Layer {c.L - 1}, head {c.H - 2}" or title == f"Layer {c.L - 1}, head {c.H - 1}",
            f"arrow keys: {title}",
        )
        browser.element(f'[data-at="{layer},{head}"]').click()
        browser.js("document.querySelectorAll('#tokens .token')[2].focus()")
        browser.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        check(browser.js("return query") == 3, "an arrow key among the tokens")
        # How the weights came about, for one query.
        query = n - 2
        browser.js("document.querySelectorAll('#tokens .token')[arguments[0]].click()", query)
        rows = browser.js(
            "return [...document.querySelectorAll('#pieces tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        check(len(rows) == n and rows[-1][4:] == ["masked", "0"], "pieces: rows")
        root = (c.C / c.H) ** 0.5
        for j, row in enumerate(rows):
            right = scores[layer, head, query, j]
            near(float(row[3]), right, 1e-4 + 1e-5 * abs(right), f"scaled {j}")
            near(float(row[2]), right * root, 1e-3 + 1e-5 * abs(right), f"q k {j}")
            near(float(row[5]), weights[layer, head, query, j], 1e-5, f"weight {j}")
        # The next token.
        p = np.exp(logits[query] - logits[query].max())
        p /= p.sum()
        said = browser.text("nextText")
        rank, bits = re.search(r"number (\d+), ([0-9.]+) bits", said).groups()
        check(int(rank) == 1 + int((p > p[tokens[query + 1]]).sum()), f"rank: {said}")
        near(float(bits), -np.log2(p[tokens[query + 1]]), 0.006, "bits")
        first = browser.js("return document.querySelector('#next tr').cells[1].textContent")
        near(float(first.split()[0]), 100 * p.max(), 0.06, "the likeliest")
        # The sum of two heads, and rollout.
        browser.element('[data-at="0,1"]').click()
        ActionChains(browser.driver).key_down(Keys.SHIFT).click(browser.element('[data-at="1,1"]')).key_up(
            Keys.SHIFT
        ).perform()
        check(browser.text("largeTitle").startswith("Mean of 2 heads"), "a sum's title")
        near(
            browser.js("return shownWeight(arguments[0], 1)", n - 1),
            (weights[0, 1, n - 1, 1] + weights[1, 1, n - 1, 1]) / 2,
            0.0021,
            "sum",
        )
        browser.element("#rollout").click()
        check(browser.text("largeTitle") == "Rollout", "rollout's title")
        rolled = np.eye(n)
        for l in range(c.L):
            rolled = (weights[l].mean(0) + np.eye(n)) / 2 @ rolled
        shown = np.array(browser.js("return rolloutRows().map(r => [...r])"))
        check(np.abs(shown - rolled).max() < 0.004 and np.abs(shown.sum(-1) - 1).max() < 0.02, "rollout")
        browser.element("#rollout").click()
        # The table: every column sorts, a row chooses its head.
        for k in range(12):
            for order in -1, 1:
                browser.js("document.querySelectorAll('#heads th button')[arguments[0]].click()", k)
                column = browser.js(
                    "return [...document.querySelectorAll('#heads tbody tr')].map(r => r.cells[arguments[0]].textContent)",
                    k,
                )
                numbers = [float(x.split()[0]) for x in column if re.match(r"-?\d", x)]
                check(numbers == sorted(numbers, reverse=order < 0), f"column {k} does not sort: {column}")
        browser.js("document.querySelectorAll('#heads tbody tr')[3].click()")
        check(browser.js("return document.querySelectorAll('#heads tr.chosen').length") == 1, "a row chooses its head")
        row = browser.element("#heads tbody tr:nth-child(6)")
        wanted = [cell.text for cell in row.find_elements("css selector", "td")][:2]
        row.send_keys(Keys.ENTER)
        check(browser.text("largeTitle") == "Layer {}, head {}".format(*wanted), "Enter on a row chooses its head")
        check(browser.js("return document.activeElement.className") == "chosen", "and stays there")
        # Lines, and the light.
        browser.js("document.querySelectorAll('#lines text')[4].dispatchEvent(new MouseEvent('click'))")
        check(browser.js("return query") == 2, "a click on the lines' text")
        before = browser.js("return getComputedStyle(document.body).backgroundColor")
        browser.element("#theme").click()
        check(browser.js("return getComputedStyle(document.body).backgroundColor") != before, "light / dark")
        browser.finish("the page")


def live(program, browser, w, c):
    browser.open(program.page("live.html", PLAIN, "--live"))
    rng = random.Random(1)
    mixed = [open(ROOT / name, encoding="utf-8").read() for name in ("README.md", "dev/view/attention.html")]
    letters = "ab '\u00e9\u0301\u05d0\u4e2d\U0001f600 \n\t\0\u00a0\u3000_-0\u0663'sre\u2028\x7f"
    mixed += [HOSTILE, "", " ", "\0", "''s '' don''t WE'LL", "".join(rng.choices(letters, k=20000))]
    for text in mixed:
        right = program.tokens(text)
        ours = browser.js("return tokenizer.encode(arguments[0])", text)
        check(ours == right, f"tokens of {text[:30]!r}... ({len(text)} characters)")
    # Logits: those of the rounded weights to float32's precision, those of the weights to what rounding may do.
    halves = {name: x.astype(np.float16).astype(np.float32) for name, x in w.items()}
    worst, allowed = 0, 0
    for text in PLAIN, "class X(", "\n\n":
        tokens = program.tokens(text)[: c.T]
        ours = np.array(
            browser.js(
                "const cache = GPT.emptyCache(); let x; for (const t of arguments[0]) x = GPT.forward(t, cache); return [...x]",
                tokens,
            )
        )
        exact = computed(halves, c, tokens)[2][-1]
        check(
            np.abs(ours - exact).max() <= 3e-6 * np.abs(exact).max(),
            f"logits of the rounded weights: {np.abs(ours - exact).max():.1e} from the right ones",
        )
        right = computed(w, c, tokens)[2][-1]
        which = [int(v) for v in np.argsort(-np.abs(ours - right))[:4]]
        for v, limit in zip(which, half_precision_limit(w, c, tokens, which)):
            near(ours[v], right[v], limit, f"logit {v}")
            if abs(ours[v] - right[v]) > worst:
                worst, allowed = abs(ours[v] - right[v]), limit
    print(
        f"logits of the page: up to {worst:.1e} from those of float32's weights, where half precision allows {allowed:.1e}"
    )
    # Typing shows the same as the program would of that text: first the table of heads of the page's own text, where
    # weights of half precision change little, then a text that goes on otherwise than the one before.
    typed = "import os\0\u202e\u0301x</script>"
    type_in = "$('typed').value = arguments[0]; $('typed').dispatchEvent(new Event('input'))"
    for text in PLAIN, "import oss", typed:
        browser.js(type_in, text)
        browser.driver.execute_async_script("setTimeout(arguments[0], 500)")
        if text == PLAIN:
            ours, stored = browser.js("return [view.heads, data.heads]")
            for one, other in zip(ours, stored):
                check(one["pattern"] == other["pattern"], f"live, a head's pattern: {one}, not {other}")
                check(np.allclose(one["numbers"], other["numbers"], atol=0.02), f"live, a head: {one}, not {other}")
            shown = browser.js("return document.querySelectorAll('#heads tbody tr').length")
            check(shown == len(stored) == c.L * c.H, "live: the table of heads")
    tokens = program.tokens(typed)
    check(browser.js("return view.ids") == tokens, "tokens as one types")
    weights = computed(halves, c, tokens)[1]
    n = len(tokens)
    browser.element('[data-at="1,2"]').click()
    for i, j in (n - 1, 0), (n - 1, n - 2), (n // 2, 1):
        browser.move_to(i, j, n)
        near(shown_number(browser.text("hover")), weights[1, 2, i, j], 1e-5, f"hover, live, {i},{j}")
    scores = computed(halves, c, tokens)[0][1, 2] * (c.C / c.H) ** 0.5
    ours = browser.js("return view.ids.map((_, i) => view.ids.map((_, j) => view.exact(1, 2).score(i, j)))")
    check(np.abs(ours - scores).max() <= 1e-5 * np.abs(scores).max(), "live: q k of every query and key")
    said = browser.js("return view.next.map(x => x.rank ? x.bits : 0)")
    logits = computed(halves, c, tokens)[2]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    right = [-np.log2(p[i, t] / p[i].sum()) for i, t in enumerate(tokens[1:])] + [0]
    check(np.allclose(said, right, atol=1e-3), f"live: bits of the next tokens {said}, not {right}")
    check(len(browser.js("return $('tokens').textContent")) > 0 and "\0" not in browser.text("tokens"), "NUL is shown")
    # Writing: without chance the program's very text; and how fast, at the better of two times.
    speed = 0
    for prompt in PLAIN, "class ":
        said = program.run("--generate", prompt, "--temperature", "0", "--tokens", "200")
        browser.js("$('typed').value = arguments[0]; $('temperature').value = 0; $('write').click()", prompt)
        browser.driver.execute_async_script(
            "const done = arguments[0], look = () => (+$('speed').textContent.split(' ')[0] >= 200 ? done() : setTimeout(look, 50)); look()"
        )
        written = browser.text("out")
        said = said[len(prompt) :].removesuffix("\n")
        check(
            written[: len(said)] == said and len(said) > 150, f"greedy text after {prompt!r}: {written!r}, not {said!r}"
        )
        speed = max(speed, float(re.search(r"([0-9.]+) a second", browser.text("speed")).group(1)))
        browser.js("$('clear').click()")
    print(f"the page writes {speed:.0f} tokens a second")
    check(speed >= 20, "fewer than 20 tokens a second")
    # Drawing follows the distribution.
    shares = browser.js("return distribution([0, 1, 2, 3], 0.5, 3, 0.9)")
    p = np.exp(np.array([3, 2, 1]) / 0.5)
    kept = (np.cumsum(p) < 0.9 * p.sum()).sum() + 1
    check(
        [x[0] for x in shares] == [3, 2, 1][:kept]
        and np.allclose([x[1] for x in shares], p[:kept] / p[:kept].sum(), atol=1e-9),
        f"temperature, top-k, top-p: {shares}",
    )
    browser.finish("the live page")


def report(program, browser):
    """dev/bench/report.py of two runs."""
    out, text = program.work / "report.html", program.work / "sample"
    text.write_text("</pre><script>alert(1)</script>")
    command = [sys.executable, ROOT / "dev/bench/report.py", program.log, program.other_log, "--out", out, "--samples", text]
    for _ in range(2):  # and over itself
        check(subprocess.run(command, capture_output=True).returncode == 0, "report.py")
    browser.open(out)
    check(browser.js("return document.querySelectorAll('section').length") == 5, "report: panels")
    check(browser.js("return document.querySelectorAll('polyline').length") == 10, "report: lines")
    check(browser.js("return document.querySelectorAll('circle').length") == 5, "report: validations, three and two")
    for i, log in enumerate((program.log, program.other_log)):
        row = browser.js("return [...document.querySelectorAll('tr')[arguments[0]].cells].map(x => x.textContent)", 1 + i)
        check(row[0].strip() == log.name.removesuffix(".csv"), f"report: the run's name is {row[0]!r}")
        near(float(row[2]), float(log.read_text().split()[-1].split(",")[1]), 6e-5, "report: the last loss")
    check(browser.js("return document.scripts.length") == 0, "report: a script")
    for dark in False, True:
        browser.picture(None, 390, dark)
    browser.finish("the report")
    command[command.index(out)] = text
    check(subprocess.run(command, capture_output=True).returncode == 1, "report.py overwrites what is not its own")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--pictures", type=pathlib.Path)
    pictures = arguments.parse_args().pictures
    check(subprocess.run([sys.executable, HERE / "seal.py", "--check"]).returncode == 0, "the page is not sealed")
    with tempfile.TemporaryDirectory() as work:
        program = Program(pathlib.Path(work))
        w, c = program.weights()
        terminal(program)
        browser = Browser()
        try:
            page(program, browser, w, c)
            live(program, browser, w, c)
            report(program, browser)
            browser.open(program.page("page.html", PLAIN, "--ablate", "--live"))
            for name, width, dark in (
                ("light", 1200, False),
                ("dark", 1200, True),
                ("phone", 390, False),
                ("phone-dark", 390, True),
            ):
                browser.picture(pictures and pictures / f"{name}.png", width, dark)
        finally:
            browser.driver.quit()
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(counts[False] > 0)


if __name__ == "__main__":
    main()
