#!/usr/bin/env python3
"""Would the tests notice? Makes small errors in train_gpt.c, one at a time, and runs the tests on each.

    make mutate                                    40 errors in each room of the file; half an hour
    python3 dev/check/mutate.py --room layers      in one room (or several) only
    python3 dev/check/mutate.py --sample 30        30 in all, in a few minutes; --seed N draws others
    python3 dev/check/mutate.py --list             what would be tried
    python3 dev/check/mutate.py --mutant 3fa01c    one of them again: its line, and what each test says
    python3 dev/check/mutate.py --file attention.h in dev/learn/attention/attention.h, five minutes; so the other
                                                   headers there (--help names them)

A changed copy is called a mutant. It is caught when a test fails, crashes or takes ten times as long as it should; if
all pass, the tests of its room run again with the sanitizers of make DEBUG=1, which see what is read or written beyond
an end. If these pass too, it has survived. Then either a check is missing, or the line does nothing, or the change
makes no difference to what the program computes. The last are called equivalent and do not count: the tool knows them
when the compiler makes the same machine code of both, and otherwise from mutants.txt, of attention.h from
mutants_attention.txt (and so on, where there are any), which have the reason for each.

The kinds of errors:

    sign         + and -, += and -=, ++ and -- exchanged, a minus left out
    operator     * for +, / for *, < for <=, == for !=, && for ||, << for >>, ...
    condition    if (x) becomes if (!(x)), true becomes false, the two results of ? : are exchanged
    bound        for (...; i < n; ...) stops one early
    dropped      a term, a factor or a condition is left out
    swapped      two neighbouring arguments of a call, or one name for its usual companion: i and j, rows and columns
    constant     2 becomes 3 or 1; 0.5f becomes 0.505f
    deleted      a statement is left out

A mutant's name is made from its line's text, not its number, and so is the choice among all possible mutants: when
another part of the file changes, the same ones are tried. Those that do not compile are passed over, and others are
tried for them.

Some places are left out from the start, because no test of results could or should look at them:

    performance         the sizes of tiles, blocks and shares (LANES, MR, KC, CHUNK, STRIP, ...), of buffers and room in
                        reserve; #pragma lines; how long threads spin
    given back          free(), fclose(), munmap() and what is made of them: forgotten, they change no result
    power cuts          fsync() of a file and of its folder
    wording             what is inside die(...), fail(...) and in what is printed for people to look at
    pictures            the loss curve, how often progress is shown and the time left, the layout of --help
    the machine         its speed, its clock, its memory
    preconditions       what the course's insist(...) asks, which holds in every program that is right
    limits              round numbers such as 1e12, that only keep an option's value sensible
"""

import argparse
import collections
import concurrent.futures
import hashlib
import os
import pathlib
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHECK = ROOT / "dev" / "check"
PER_ROOM = 40

# The tests that are tried first on a room's mutants: those with one of these in their names.
FIRST_TESTS = {
    "errors and files": "replace_file map_file allocate cli_full_disk".split(),
    "random numbers": "random shuffled".split(),
    "matrix multiply": "matmul linear".split(),
    "layers": "exp embedding layernorm linear attention gelu cross_entropy model".split(),
    "model": "model finite_differences adamw initialize memory step_op generation_cache".split(),
    "tokenizer": "tokenizer utf8".split(),
    "data loader": "data_".split(),
    "checkpoint": "checkpoint half export".split(),
    "generation": "utf8 sample generation".split(),
    "command line": "help option cli_".split(),
    "training loop": "log validation threads accumulate resume cli_ generation_cli".split(),
}
FIRST_ATTENTION_TESTS = {
    "products": ["pytorch", "differences"],
    "scores": ["pytorch", "scores", "projected", "extremes"],
    "masks and softmax": ["pytorch", "causal", "blind", "extremes"],
    "attention": ["pytorch"],
    "several heads": ["pytorch", "accumulation"],
    "local attention": ["pytorch", "local"],
    "flash attention": ["pytorch", "flash", "blind"],
    "linear attention": ["pytorch", "causal"],
    "positions": ["positions"],
}
FIRST_MASKS_TESTS = {
    "masks": ["pictures", "skipping"],
    "scores": ["relative", "gradients", "tiles"],
    "the definition": ["tiles"],
    "block mask": ["skipping", "tiles", "shared"],
    "in tiles": ["tiles", "gradients", "nothing_read"],
}
FIRST_FAST_WEIGHTS_TESTS = {"linear attention in chunks": ["linear"], "the delta rule": ["delta"]}
FIRST_TAPE_TESTS = {"the tape": ["training", "gradients"], "matrix product": ["product", "threads", "gradients"]}
FIRST_VISION_TESTS = {"pictures": ["pictures"], "operations": ["values", "operations"], "layers": ["beginnings"]}

# What is tested with what: a source and its tests in a folder, which `make` there builds into a program. Copied is what
# they need besides, linked what the tests read.
Subject = collections.namedtuple("Subject", "folder source tests program copied linked equivalent first_tests")
SUBJECTS = {
    "train_gpt.c": Subject("", "train_gpt.c", "test_gpt.c", "build/test_gpt", ["Makefile"], ["dev"], "mutants.txt",
                           FIRST_TESTS),
}
COURSE = "dev/learn/attention"  # each of its tests includes one or two of its headers, or what includes them
for source, tests, first_tests in (
    ("attention.h", "test_attention", FIRST_ATTENTION_TESTS),
    ("masks.h", "test_masks", FIRST_MASKS_TESTS),
    ("fast_weights.h", "test_fast_weights", FIRST_FAST_WEIGHTS_TESTS),
    ("memory.h", "test_nodes", {"memory.h": ["memory", "lstmn", "pytorch"]}),
    ("glimpse.h", "test_nodes", {"glimpse.h": ["glimpses", "unbiased", "draws", "pytorch"]}),
    ("vision.h", "test_vision", FIRST_VISION_TESTS),
    ("dropout.h", "test_dropout", {"dropout.h": ["pytorch"]}),
    ("tape_attention.h", "test_tape_attention", {"tape_attention.h": ["pytorch"]}),
    ("tape.h", "test_tape", FIRST_TAPE_TESTS),
    ("recurrent.h", "test_tape", {"recurrent.h": ["cells", "gradients"]}),
):
    SUBJECTS[source] = Subject(COURSE, source, tests + ".c", f"../../../build/attention/{tests}",
                               [header.name for header in (ROOT / COURSE).glob("*.h")], ["dev/check"],
                               f"mutants_{source[:-2]}.txt", first_tests)

# Left out from the start; the docstring says why.
SKIPPED_FUNCTIONS = {"machine_peak", "draw_curve", "print_help", "clear_live_line", "memory_available", "seconds",
                     "free_model", "close_checkpoint", "prepare_threads"}
SKIPPED_LINES = re.compile(r"enum \{ (LANES|NR|CHUNK|STRIP|CURVE|STREAM_WEIGHTS|HEIGHT|FLASH_TILE|TILE_ROWS)|O_CLOEXEC|noreturn"
                           r"|room \? 2 \* room|average|fsync|if \(fd >= 0\)|slash - out->path|\[column\]|size_t column ="
                           r"|size_t every = |run->step % every")
WORDING = {"die", "fail", "insist", "json_fail", "printf", "puts", "fputs", "strerror"}
PRINTED = {"printf", "puts", "fputs", "putchar", "fflush", "check_output"}
PRINTED_FOR_PEOPLE = {"start_run", "report", "run_training", "run_export", "check_memory", "show_sample", "fail"}
GIVEN_BACK = {"free", "fclose", "close", "munmap", "globfree", "va_end", "fflush", "clear_live_line", "unmap_file",
              "free_model", "close_checkpoint"}

OPERATORS = {"*": "+", "/": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
             "&&": "||", "||": "&&", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "|", "*=": "+=", "/=": "*="}
SIGNS = {"+": "-", "-": "+", "+=": "-=", "-=": "+=", "++": "--", "--": "++"}
COMPANIONS = {}
for pair in ("i j", "K N", "M N", "T C", "B T", "rows columns", "h b", "n m", "mean rstd", "b1 b2", "a1 a2", "q k",
             "start end", "left right", "low high", "from to", "inputs targets", "x y", "moment1 moment2", "step steps",
             "correction1 correction2", "queries keys", "i0 j0", "k0 n0", "row column", "n0 m0", "size length",
             "width depth", "ln1 ln2", "att mid", "p ds", "first step", "w d", "sum largest", "a b", "V C", "D C"):
    one, other = pair.split()
    COMPANIONS.setdefault(one, other)
    COMPANIONS.setdefault(other, one)
COMPANIONS.update({"true": "false", "false": "true"})
KEYWORDS = {"return", "if", "else", "for", "while", "do", "sizeof", "case", "continue", "break", "goto"}

TOKEN = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|0[xX][0-9A-Fa-f]+[uUlL]*
                       |(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fFuUlL]*|[A-Za-z_]\w*|<<=|>>=|\+\+|--|->|&&|\|\|
                       |[-+*/%&|^<>=!]=|<<|>>|\.\.\.|\S""", re.S | re.X)

Mutant = collections.namedtuple("Mutant", "id room function kind line start end text before after")


def one_line(text):
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------------
# Making mutants


class Source:
    """A C file as tokens. Each has a text, a place, and what encloses it: a function, brackets, calls."""

    def __init__(self, text):
        self.text = text
        self.tokens, self.places = [], []
        hidden = self.preprocessor()
        for match in TOKEN.finditer(text):
            token = match.group()
            if token[:2] not in ("//", "/*") and token != "\\" and not hidden[match.start()]:
                self.tokens.append(token)
                self.places.append(match.start())
        self.match_brackets()
        self.find_rooms()

    def preprocessor(self):
        """Which bytes belong to preprocessor lines; the tables of parameters and activations do not count as such."""
        hidden = bytearray(len(self.text))
        for match in re.finditer(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", self.text, re.M):
            start = match.start()
            if re.match(r"#define (PARAMETERS|ACTIVATIONS)\(X\)", match.group()):
                hidden[start:start + match.group().index("\n")] = b"\1" * match.group().index("\n")
            else:
                hidden[start:match.end()] = b"\1" * (match.end() - start)
        return hidden

    def match_brackets(self):
        self.partner, self.function, self.calls = {}, [], []
        stack, function = [], ""
        for i, token in enumerate(self.tokens):
            if token in ")]}":
                opened = stack.pop()
                self.partner[opened], self.partner[i] = i, opened
            if token == "{" and not stack and i and self.tokens[i - 1] == ")":
                function = self.tokens[self.partner[i - 1] - 1]
            if token in "([{":
                stack.append(i)
            self.function.append(function)
            self.calls.append([self.tokens[s - 1] for s in stack if s and self.tokens[s] == "("])
            if token == "}" and not stack:
                function = ""

    def find_rooms(self):
        """What stands under a heading; in a file without such headings under its lesser ones, or all of it."""
        headings = (r"^// =+\n// ([^(:\n]*\w)", r"^// ---- ([^(:\n]*\w)[^\n]*-$", r"\A// ([^(:\n]*\w)")
        found = ([(m.start(), m.group(1).lower()) for m in re.finditer(h, self.text, re.M)] for h in headings)
        self.rooms = next(rooms for rooms in found if rooms)

    def room(self, place):
        name = ""
        for start, room in self.rooms:
            if start <= place:
                name = room
        return name

    def line(self, place):
        start = self.text.rfind("\n", 0, place) + 1
        return self.text[start:self.text.index("\n", place)]

    def end(self, i):
        return self.places[i] + len(self.tokens[i])

    def spaced(self, i):
        """Binary operators stand between spaces, pointers' stars and unary operators do not."""
        return self.text[self.places[i] - 1].isspace() and self.text[self.end(i)].isspace()

    def is_value_end(self, i):
        token = self.tokens[i]
        return (token[0].isalnum() or token[0] == "_" or token in ")]") and token not in KEYWORDS

    def operand(self, i):
        """The index after the operand that begins at token i: -(T)x.y[0](z), say."""
        while self.tokens[i] in ("-", "!", "~", "*", "&"):
            i += 1
        while self.tokens[i] == "(" and self.text[self.end(self.partner[i])] not in " ;,)]\n.-":
            i = self.partner[i] + 1  # a cast
        i = self.partner[i] + 1 if self.tokens[i] == "(" else i + 1
        while True:
            if self.tokens[i] in ("(", "["):
                i = self.partner[i] + 1
            elif self.tokens[i] in (".", "->"):
                i += 2
            elif self.tokens[i] in ("++", "--"):
                i += 1
            else:
                return i

    def term(self, i):
        """The index after the operand at token i and what it is multiplied with."""
        i = self.operand(i)
        while self.tokens[i] in ("*", "/", "%") and self.spaced(i):
            i = self.operand(i + 1)
        return i

    def condition_end(self, i):
        """The index of the && || ? ) or ; that ends the condition at token i."""
        while self.tokens[i] not in ("&&", "||", ")", ";", "?", ",", "}", ":"):
            i = self.partner[i] + 1 if self.tokens[i] in ("(", "[", "{") else i + 1
        return i


def is_buffer_size(source, i):
    """Token i stands in the [...] of a declaration without a value, such as `char name[64]`."""
    line = source.line(source.places[i])
    start = source.places[i] - (source.text.rfind("\n", 0, source.places[i]) + 1)
    return (re.match(r"\s*(static |const )*(char|float|uint8_t|vec|size_t|double|Tensor|Json|int)\b", line)
            and "=" not in line[:start] and re.search(r"\[[A-Z0-9_ +*()]*$", line[:start])
            and re.match(r"[A-Z0-9_ +*()]*\]", line[start:]))


def is_left_out(source, i):
    place = source.places[i]
    return (not source.room(place) or source.function[i] in SKIPPED_FUNCTIONS
            or SKIPPED_LINES.search(source.line(place)) or WORDING & set(source.calls[i])
            or is_buffer_size(source, i))


def other_constants(token):
    """A number that is a little wrong: 1% for a fraction, one up and one down for an integer."""
    if re.fullmatch(r"0[xX][0-9A-Fa-f]+[uUlL]*", token):
        digits = token.rstrip("uUlL")
        return [hex(int(digits, 16) + 1) + token[len(digits):]]
    if re.fullmatch(r"1e\d+", token):
        return []  # a limit
    if re.search(r"[.eE]|f$", token):
        value = float(token.rstrip("fF"))
        return [repr(value * 1.01 if value else 0.01) + ("f" if token[-1] in "fF" else "")]
    digits = token.rstrip("uUlL")
    value, suffix = int(digits), token[len(digits):]
    return [f"{n}{suffix}" for n in (value + 1, value - 1) if n >= 0]


def changes(source):
    """Every possible change: (kind, index of a token in it, from, to, new text)."""
    tokens, places, end = source.tokens, source.places, source.end
    for i in range(1, len(tokens) - 2):
        if is_left_out(source, i):
            continue
        token, before, after = tokens[i], tokens[i - 1], tokens[i + 1]
        whole = places[i], end(i)
        binary = source.spaced(i) and source.is_value_end(i - 1)
        if token in SIGNS and (binary or (token in ("++", "--") and source.calls[i][-1:] != ["for"])):
            yield "sign", i, *whole, SIGNS[token]
        elif token == "-" and not source.is_value_end(i - 1):
            yield "sign", i, *whole, ""
        if token in OPERATORS and binary:
            yield "operator", i, *whole, OPERATORS[token]
        if binary and token in ("+", "-"):
            yield "dropped", i, places[i], end(source.term(i + 1) - 1), ""
        if binary and token in ("*", "/", "%"):
            yield "dropped", i, places[i], end(source.operand(i + 1) - 1), ""
            if tokens[i - 2] in ("=", "(", ",", "+", "-", "return", "+=", "[") and token == "*":
                yield "dropped", i, places[i - 1], places[i + 1], ""
        if token in ("&&", "||"):
            yield "dropped", i, places[i], end(source.condition_end(i + 1) - 1), ""
        if token == "<" and binary and source.calls[i][-1:] == ["for"]:
            limit = source.condition_end(i + 1)
            if tokens[limit] in (";", "&&"):
                yield "bound", i, end(limit - 1), end(limit - 1), " - 1"
        if token == "?" and not re.match(r"\s*X\(", source.line(places[i])):
            first = source.condition_end(i + 1)
            if tokens[first] == ":":
                second = source.condition_end(first + 1)
                one, other = source.text[places[i + 1]:end(first - 1)], source.text[places[first + 1]:end(second - 1)]
                yield "condition", i, places[i + 1], end(second - 1), f"{other} : {one}"
        if token == "if":
            yield ("condition", i, end(i + 1), places[source.partner[i + 1]],
                   "!(" + source.text[end(i + 1):places[source.partner[i + 1]]] + ")")
        if token in ("true", "false"):
            yield "condition", i, *whole, COMPANIONS[token]
        elif token in COMPANIONS and before not in (".", "->") and not re.match(r"[A-Za-z_]", before) and after != "(":
            yield "swapped", i, *whole, COMPANIONS[token]
        elif token in COMPANIONS and before in (".", "->"):
            yield "swapped", i, *whole, COMPANIONS[token]
        if before in ("(", ",") and after == "," and source.calls[i] and tokens[i + 3] in (",", ")"):
            if token[0].isalpha() and tokens[i + 2][0].isalpha() and token != tokens[i + 2]:
                yield "swapped", i, places[i], end(i + 2), tokens[i + 2] + ", " + token
        if token[0].isdigit():
            for other in other_constants(token):
                yield "constant", i, *whole, other
        yield from deletions(source, i)


def deletions(source, i):
    """The simple statement that begins at token i, left out."""
    tokens = source.tokens
    if not source.function[i] or tokens[i - 1] not in (";", "{", "}", ")", "else", "do"):
        return
    if tokens[i - 1] == ")" and tokens[source.partner[i - 1] - 1] not in ("if", "for", "while"):
        return
    if source.calls[i] or not re.match(r"[A-Za-z_*]", tokens[i]) or tokens[i] in GIVEN_BACK | {"insist"}:
        return
    if tokens[i] in KEYWORDS - {"continue", "break"}:
        return
    if tokens[i] in PRINTED and source.function[i] in PRINTED_FOR_PEOPLE:
        return
    if re.match(r"[A-Za-z_]", tokens[i + 1]) or (tokens[i + 1] == "*" and not source.spaced(i + 1)):
        return  # a declaration
    last = i
    while tokens[last] != ";":
        last = source.partner[last] + 1 if tokens[last] in ("(", "[", "{") else last + 1
    yield "deleted", i, source.places[i], source.end(last - 1), ""


def all_mutants(text):
    source = Source(text)
    seen = collections.Counter()
    mutants = []
    for kind, i, start, end, new in changes(source):
        first = text.rfind("\n", 0, start) + 1
        last = text.index("\n", end)
        before = one_line(text[first:last])
        after = one_line(text[first:start] + new + text[end:last])
        if before == after:
            continue
        # The same line may stand in several places.
        key = f"{source.room(start)}|{before}|{after}"
        seen[key] += 1
        name = hashlib.sha1(f"{key}|{seen[key]}".encode()).hexdigest()[:6]
        mutants.append(Mutant(name, source.room(start), source.function[i], kind, text.count("\n", 0, start) + 1,
                              start, end, new, before, after))
    return list({m.after + str(m.start): m for m in mutants}.values())


def shuffled(mutants, seed):
    """In an order that depends on each mutant alone, taking one of each kind in turn."""
    kinds = collections.defaultdict(list)
    for m in sorted(mutants, key=lambda m: hashlib.sha1(f"{seed}|{m.id}".encode()).digest()):
        kinds[m.kind].append(m)
    turns = [(turn, hashlib.sha1(f"{seed}|{kind}".encode()).digest(), m)
             for kind, list_ in kinds.items() for turn, m in enumerate(list_)]
    return [m for _, _, m in sorted(turns, key=lambda t: t[:2])]


def read_equivalent(path):
    """A mutants.txt: @ and a function, or @ alone; - and one of its lines as it is, + and the same line changed."""
    changes, function, before = set(), None, None
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        mark, rest = line[:1], one_line(line[1:])
        if mark == "@":
            function = rest
        elif mark == "-":
            before = rest
        elif mark == "+":
            changes.add((function, before, rest))
        elif mark not in ("", "#"):
            sys.exit(f"{path}:{number}: a line begins with #, @, - or +")
    return changes


def is_equivalent(m, known):
    return (m.function, m.before, m.after) in known


# ---------------------------------------------------------------------------------------------------------------------
# Trying them


def build_command(subject, *variables):
    """The Makefile's, but -O1, which is quicker to build, and without warnings and -g."""
    lines = subprocess.run(["make", "-n", "-B", subject.program, *variables], cwd=ROOT / subject.folder,
                           capture_output=True, text=True).stdout
    command = [line for line in lines.splitlines() if f" {subject.tests} -o {subject.program}" in line]
    if len(command) != 1:
        sys.exit(f"mutate: `make -n {subject.program}` does not say how the tests are built")
    return [word for word in shlex.split(command[0]) if not re.match(r"-[OWg]", word)] + ["-O1", "-w"]


def limits():
    """A mutant may write without end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(command, folder, timeout, memory=16 << 30):
    """The exit status, or None after `timeout` seconds. A mutant may ask for all memory there is."""
    environment = dict(os.environ, OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="2", ASAN_OPTIONS="detect_leaks=0")
    command = ["sh", "-c", f'ulimit -v {memory // 1024 if memory else "unlimited"}; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, preexec_fn=limits,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and what it may have left running
        except ProcessLookupError:
            pass
        process.wait()


class Bench:
    """A folder with a copy of the sources, in which a mutant is built and its tests run."""

    def __init__(self, subject, folder, tests_source):
        self.subject, self.folder = subject, folder / subject.folder
        self.folder.mkdir(parents=True)
        for name in subject.linked:
            (folder / name).symlink_to(ROOT / name)
        for name in subject.copied:
            shutil.copy(ROOT / subject.folder / name, self.folder)
        (self.folder / subject.tests).write_text(tests_source)
        self.program = (self.folder / subject.program).resolve()
        self.program.parent.mkdir(parents=True)

    def build(self, command, text):
        self.memory = 0 if any("sanitize" in word for word in command) else 16 << 30  # sanitizers lay claim to more
        (self.folder / self.subject.source).write_text(text)
        self.program.unlink(missing_ok=True)
        return run(command, self.folder, 300) == 0

    def test(self, name, timeout):
        """One test: in a folder of its own, as test_gpt itself would start it; test_attention needs none."""
        with tempfile.TemporaryDirectory(dir=self.program.parent, ignore_cleanup_errors=True) as folder:
            own = ["--test", name, os.path.relpath(folder, self.folder)]
            command = [str(self.program), *(own if self.subject.source == "train_gpt.c" else [name])]
            status = run(command, self.folder, timeout, self.memory)
        return status in (0, 77)  # passed, or cannot be done here


class Trial:
    def __init__(self, subject, work, jobs):
        self.subject = subject
        self.text = (ROOT / subject.folder / subject.source).read_text()
        tests_source = (ROOT / subject.folder / subject.tests).read_text()
        self.command, self.sanitized_command = build_command(subject), build_command(subject, "DEBUG=1")
        self.tests = re.findall(r'\{"(?!twin_)(\w+)", test_\w+', tests_source)  # twin_: train_gpt.cu's
        if not self.tests:
            sys.exit(f"mutate: {subject.tests} has no table of tests that can be read")
        self.equivalent = read_equivalent(CHECK / subject.equivalent)
        self.benches = queue.Queue()
        for number in range(jobs):
            self.benches.put(Bench(subject, work / str(number), tests_source))
        self.measure()
        self.sanitized_bench, self.sanitized_seconds = Bench(subject, work / "sanitized", tests_source), None
        self.lock = threading.Lock()

    def measure(self):
        """The program as it is: its machine code, and that it passes each test, and how long that takes."""
        bench = self.benches.queue[0]
        if not bench.build(self.command, self.text):
            sys.exit("mutate: the tests do not build: " + " ".join(self.command))
        self.code = bench.program.read_bytes()
        self.seconds = {}
        for name in self.tests:
            start = time.monotonic()
            if not bench.test(name, 300):
                sys.exit(f"mutate: {name} fails already: {self.subject.program} {name}")
            self.seconds[name] = time.monotonic() - start

    def measure_sanitized(self, names):
        """Which of these tests the program as it is passes with sanitizers, and how long that takes."""
        with self.lock:
            bench = self.sanitized_bench
            if self.sanitized_seconds is None:
                built = bench.build(self.sanitized_command, self.text)
                self.sanitized_seconds = {} if built else dict.fromkeys(self.tests)
            for name in names:
                if name not in self.sanitized_seconds:
                    start = time.monotonic()
                    passed = bench.test(name, 300)
                    self.sanitized_seconds[name] = time.monotonic() - start if passed else None
            return {name: self.sanitized_seconds[name] for name in names if self.sanitized_seconds[name]}

    def is_first(self, room, name):
        return any(first in name for first in self.subject.first_tests.get(room, []))

    def order(self, room):
        """The room's own tests and then all others, the quick ones first."""
        return sorted(self.tests, key=lambda name: (not self.is_first(room, name), self.seconds[name]))

    def passes(self, bench, name, seconds, report):
        start = time.monotonic()
        passed = bench.test(name, 20 + 10 * seconds)
        if report:
            report(f"    {name:32} {'passed' if passed else 'FAILED'}  {time.monotonic() - start:.1f} s")
        return passed

    def verdict(self, m, report=None):
        """no code, same code, equivalent, caught by TEST, or survived"""
        if is_equivalent(m, self.equivalent):
            return "equivalent"
        bench = self.benches.get()
        try:
            text = self.text[:m.start] + m.text + self.text[m.end:]
            if not bench.build(self.command, text):
                return "no code"
            if bench.program.read_bytes() == self.code:
                return "same code"
            for name in self.order(m.room):
                if not self.passes(bench, name, self.seconds[name], report):
                    return "caught by " + name
            expected = self.measure_sanitized([name for name in self.order(m.room) if self.is_first(m.room, name)])
            if expected and bench.build(self.sanitized_command, text):
                for name in expected:
                    if not self.passes(bench, name, expected[name], report):
                        return "caught by " + name + " with sanitizers"
            return "survived"
        finally:
            self.benches.put(bench)


def show(m, verdict):
    print(f"{m.id}  {m.room}, line {m.line}, {m.kind}: {verdict}\n    - {m.before}\n    + {m.after}", flush=True)


def try_room(trial, pool, candidates, count, verbose):
    """The verdicts on the first `count` candidates that compile."""
    verdicts, waiting = {}, collections.deque(candidates)
    while waiting and len(verdicts) < count:
        batch = [waiting.popleft() for _ in range(min(count - len(verdicts), len(waiting)))]
        futures = {pool.submit(trial.verdict, m): m for m in batch}
        for future in concurrent.futures.as_completed(futures):
            m, verdict = futures[future], future.result()
            if verdict != "no code":
                verdicts[m] = verdict
            if verdict == "survived" or (verbose and verdict != "no code"):
                show(m, verdict)
    return verdicts


def main():
    parser = argparse.ArgumentParser(description="Makes small errors in a file and runs its tests on each.")
    parser.add_argument("--file", choices=SUBJECTS, default="train_gpt.c", help="default: train_gpt.c")
    parser.add_argument("--room", action="append", metavar="NAME", help="only rooms with this in their name")
    parser.add_argument("--count", type=int, default=PER_ROOM, metavar="N", help=f"errors a room, default: {PER_ROOM}")
    parser.add_argument("--sample", type=int, metavar="N", help="errors in all, spread over the rooms")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the choice, default: 1")
    parser.add_argument("--mutant", nargs="+", metavar="ID", help="only these")
    parser.add_argument("--list", action="store_true", help="show what would be tried, and end")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count()), metavar="N", help="at a time, default: 2")
    parser.add_argument("--at-least", type=float, metavar="PERCENT", help="fail if fewer are caught")
    parser.add_argument("-v", action="store_true", help="show every verdict, not only the survivors'")
    options = parser.parse_args()

    subject = SUBJECTS[options.file]
    text = (ROOT / subject.folder / subject.source).read_text()
    mutants = all_mutants(text)
    rooms = list(dict.fromkeys(m.room for m in mutants))
    rooms = [room for room in rooms if not options.room or any(r.lower() in room for r in options.room)]
    if not rooms:
        sys.exit("mutate: no such room")
    known = read_equivalent(CHECK / subject.equivalent)
    for function, before, _ in known - {(m.function, m.before, m.after) for m in mutants}:
        print(f"{subject.equivalent}: {subject.source} has no such line any more: @ {function}: {before}",
              file=sys.stderr)
    chosen = {room: shuffled([m for m in mutants if m.room == room], options.seed) for room in rooms}
    counts = {room: options.count for room in rooms}
    if options.sample is not None:
        counts = {room: (options.sample + i) // len(rooms) for i, room in enumerate(rooms)}
    if options.mutant:
        unknown = set(options.mutant) - {m.id for m in mutants}
        if unknown:
            sys.exit("mutate: no mutant is called " + ", ".join(sorted(unknown)))
        chosen = {room: [m for m in mutants if m.room == room and m.id in options.mutant] for room in rooms}
        counts = {room: len(chosen[room]) for room in rooms}
    if options.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # it may be piped into head
        for room in rooms:
            for m in chosen[room][:counts[room]]:
                show(m, "equivalent" if is_equivalent(m, known) else "to be tried")
            print(f"{room}: {len([m for m in mutants if m.room == room])} are possible")
        return 0

    os.nice(10)
    (ROOT / "build").mkdir(exist_ok=True)
    results = {}
    with (tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="mutants.", ignore_cleanup_errors=True) as work,
          concurrent.futures.ThreadPoolExecutor(options.jobs) as pool):
        trial = Trial(subject, pathlib.Path(work), options.jobs)
        if trial.text != text:
            sys.exit(f"mutate: {subject.source} has just changed; start again")
        try:
            for room in rooms:
                if options.mutant and len(options.mutant) == 1:
                    verdicts = {m: trial.verdict(m, report=print) for m in chosen[room]}
                    for m, verdict in verdicts.items():
                        show(m, verdict)
                else:
                    verdicts = try_room(trial, pool, chosen[room], counts[room], options.v)
                results[room] = collections.Counter(v.split()[0] for v in verdicts.values())
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            return 130

    print(f"\n{'room':20} {'mutants':>8} {'caught':>8} {'equivalent':>11} {'survived':>9}")
    total = sum(results.values(), collections.Counter())
    for room, r in [*results.items(), ("all", total)]:
        print(f"{room:20} {sum(r.values()):8} {r['caught']:8} {r['equivalent'] + r['same']:11} {r['survived']:9}")
    counted = total["caught"] + total["survived"]
    share = 100 * total["caught"] / counted if counted else 100
    print(f"{share:.1f}% of those that are not equivalent were caught")
    if options.at_least is None:
        return 0
    print("1 passed, 0 failed" if share >= options.at_least else "0 passed, 1 failed")
    return share < options.at_least


if __name__ == "__main__":
    sys.exit(main())
