#!/usr/bin/env python3
"""Checks of prepare_data.py; needs nothing but Python.

    python3 dev/check/test_prepare_data.py [-v] [name of a test ...]

The checks of GPT-2's encoding want its vocabulary, from data/gpt2.tiktoken or the file named by the environment
variable GPT2_VOCAB, and are skipped without it. The last line says how many checks passed, failed and were skipped.
"""

import array
import base64
import contextlib
import functools
import http.server
import io
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPT = os.path.join(ROOT, "prepare_data.py")
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True
import prepare_data as pd  # noqa: E402  it lives at the top

VOCAB = os.environ.get("GPT2_VOCAB", os.path.join(ROOT, "data", "gpt2.tiktoken"))
OUTPUTS = ["tokenizer.bin", "train.bin", "val.bin"]
OLD = {name: struct.pack("<i", 20261121 if name == "tokenizer.bin" else 20240520) + b"old " + name.encode()
       for name in OUTPUTS}     # no more of it than the program knows its own files by

# Text and what tiktoken makes of it.
KNOWN = [
    ('Hello, world!', [15496, 11, 995, 0]),
    ("I'll say it's what they'd've done; we're sure I'm not, isn't it?",
     [40, 1183, 910, 340, 338, 644, 484, 1549, 1053, 1760, 26, 356, 821, 1654, 314, 1101, 407, 11, 2125, 470,
      340, 30]),
    ("IT'S I'LL 'tis ''s don''t ' s",
     [2043, 6, 50, 314, 6, 3069, 705, 48010, 10148, 82, 836, 7061, 83, 705, 264]),
    ('a  b   c    d', [64, 220, 275, 220, 220, 269, 220, 220, 220, 288]),
    (' leading', [3756]),
    ('trailing ', [9535, 4386, 220]),
    ('trailing   ', [9535, 4386, 220, 220, 220]),
    ('two\nlines\n', [11545, 198, 6615, 198]),
    ('\n\n\nmany\n\n', [628, 198, 21834, 628]),
    ('   \n   x', [220, 220, 220, 198, 220, 220, 2124]),
    ('\tif (x):\n\t\treturn  1;\r\n', [197, 361, 357, 87, 2599, 198, 197, 197, 7783, 220, 352, 26, 201, 198]),
    ('\r\n\r\n a\r', [201, 198, 201, 198, 257, 201]),
    ('for(int i=0;i<10;i++){a[i]*=3.14e-10;}',
     [1640, 7, 600, 1312, 28, 15, 26, 72, 27, 940, 26, 72, 4880, 19953, 64, 58, 72, 60, 9, 28, 18, 13, 1415,
      68, 12, 940, 46956]),
    ('12345 1,000 0x1F 3rd x2y', [10163, 2231, 352, 11, 830, 657, 87, 16, 37, 513, 4372, 2124, 17, 88]),
    ('\xbd \u216b \u0663 x\xb2 \u2460\u2461\u2462 \u0969\u096a\u096b \u4e94\u516d',
     [23141, 2343, 227, 104, 18923, 96, 2124, 31185, 2343, 239, 254, 158, 239, 94, 158, 239, 95, 220, 24231,
      102, 24231, 103, 24231, 104, 220, 49390, 17739, 255]),
    ('a\xa0b \xa0 c\xa0\xa0', [64, 1849, 65, 5624, 269, 4603]),
    ('x\x1cy\x1d z \x1e\x1f w', [87, 216, 88, 217, 1976, 220, 218, 219, 266]),
    ('a\u2028b\u2029c\x85d', [64, 447, 101, 65, 447, 102, 66, 126, 227, 67]),
    ('a\u200bb\u200d\ufeffc', [64, 9525, 65, 447, 235, 171, 119, 123, 66]),
    ('\u3000\u5168\u89d2\u3000 \u30b9\u30da\u30fc\u30b9',
     [5099, 222, 17739, 101, 164, 100, 240, 5099, 222, 220, 8943, 1209, 248, 6312, 8943]),
    ('na\xefve caf\xe9, cafe\u0301 nai\u0308ve',
     [2616, 38776, 40304, 11, 26725, 136, 223, 299, 1872, 136, 230, 303]),
    ('\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, \u043c\u0438\u0440! \u041f\u0440\u0438\u0432\u0435\u0442',
     [140, 245, 43666, 21169, 16142, 38857, 21727, 20375, 38857, 35072, 140, 117, 11, 12466, 120, 18849,
      21169, 0, 12466, 253, 21169, 18849, 38857, 16843, 20375]),
    ('\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5',
     [138, 241, 30950, 29945, 138, 105, 18074, 225, 26517, 139, 227, 7377, 248, 139, 234, 38392, 34703, 30950]),
    ('\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd',
     [50227, 40010, 27072, 147, 251, 14360, 95, 27072, 40010, 147, 251]),
    ('\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663',
     [25405, 26897, 148, 255, 39848, 12919, 17550, 101, 23525, 44690, 23525, 25405, 18923, 94, 149, 95, 149,
      96]),
    ('\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e',
     [11976, 101, 11976, 106, 11976, 116, 24231, 235, 11976, 97, 24231, 229, 28225, 99, 24231, 223, 11976,
      101, 11976, 123, 11976, 107, 48077]),
    ('\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01',
     [19567, 103, 19567, 100, 19567, 109, 19567, 103, 19567, 242, 19567, 113, 19567, 232, 19567, 110, 19567,
      100, 31479, 224, 19567, 98, 19567, 223]),
    ('\u4f60\u597d,\u4e16\u754c\u3002', [19526, 254, 25001, 121, 11, 10310, 244, 45911, 234, 16764]),
    ('\u3053\u3093\u306b\u3061\u306f\u4e16\u754c',
     [46036, 22174, 28618, 2515, 94, 31676, 10310, 244, 45911, 234]),
    ('\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4',
     [168, 243, 230, 167, 227, 243, 47991, 246, 168, 226, 116, 168, 248, 242, 23821, 226, 116, 166, 111, 226]),
    ('\U0001f600\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea',
     [47249, 222, 41840, 235, 8582, 237, 121, 50169, 102, 447, 235, 41840, 102, 447, 235, 41840, 100, 12520,
      229, 102, 8582, 229, 103]),
    ('e\u0301\u0302\u0303 \u0300', [68, 136, 223, 136, 224, 136, 225, 220, 136, 222]),
    ('\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \U0001d7d8\U0001d7d9\U0001d7da',
     [47728, 242, 246, 47728, 242, 104, 47728, 242, 99, 47728, 242, 254, 47728, 242, 105, 47728, 242, 94,
      47728, 242, 95, 220, 47728, 253, 246, 47728, 253, 247, 47728, 253, 248]),
    ('\U000105c0\U000323af \U0001e5f1', [172, 238, 245, 222, 172, 110, 236, 107, 220, 172, 252, 245, 109]),
    ('\u1c89\u1c8a \u0870\u088e', [157, 110, 231, 157, 110, 232, 220, 156, 94, 108, 156, 95, 236]),
    ('\ue000\U0010ffff\u0378', [29773, 222, 176, 237, 123, 123, 137, 116]),
    ('<|endoftext|> is text', [27, 91, 437, 1659, 5239, 91, 29, 318, 2420]),
    ('____ ---- //// ==== !!!!', [1427, 13498, 3373, 1003, 796, 18604, 220, 13896]),
    ('https://example.com/a_b?c=d&e=%20',
     [5450, 1378, 20688, 13, 785, 14, 64, 62, 65, 30, 66, 28, 67, 5, 68, 28, 4, 1238]),
    ('supercalifragilisticexpialidocious antidisestablishmentarianism',
     [16668, 9948, 361, 22562, 346, 396, 501, 42372, 498, 312, 32346, 1885, 29207, 44390, 3699, 1042]),
    ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', [24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 64]),
    ("  'll 've", [220, 705, 297, 705, 303]),
    ('\u180e\u2060x', [157, 254, 236, 46256, 254, 87]),
    ('\x00\x01 \x7f', [188, 189, 220, 221]),
]

TEXT = "The quick brown fox jumps over the lazy dog; it's 1,234 times quicker.\n\tÀ bientôt, 世界! 😀\n" * 30
ALPHABET = ["a", "b", "ab", "the", "'s", "'", " ", "  ", "\n", "\t", "\r\n", "1", "23", "½", ".", "é", "e\u0301",
            "世", "😀", "\u00a0", "\u3000", "\x1c", "\u2028", "\U000105c0"]


def random_text(seed, length):
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def encode_by_the_rule(piece, tokens):
    """The rule of encoding, word for word."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while True:
        pairs = [(tokens.index(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in tokens]
        if not pairs:
            return [tokens.index(part) for part in parts]
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def train_by_the_rule(text, size):
    """The rule of training, word for word."""
    tokens = [bytes([b]) for b in range(256)]
    pieces = [piece.encode() for piece in pd.cut(text, lambda done: None)]
    while len(tokens) < size:
        total = {}
        for piece in pieces:
            parts = [tokens[i] for i in encode_by_the_rule(piece, tokens)]
            for a, b in zip(parts, parts[1:]):
                total[a + b] = total.get(a + b, 0) + 1
        best = min(total, key=lambda pair: (-total[pair], pair), default=None)
        if best is None or total[best] < 2:
            break
        tokens.append(best)
    return tokens


def open_read(path):
    with open(path, "rb") as file:
        return file.read()


def read_tokens(path):
    with open(path, "rb") as file:
        head = struct.unpack("<256i", file.read(1024))
        ids = array.array("H", file.read())
    if sys.byteorder == "big":
        ids.byteswap()
    assert head[:3] == (20240520, 1, len(ids)) and not any(head[5:])
    with open(os.path.join(os.path.dirname(path), "tokenizer.bin"), "rb") as file:
        assert struct.pack("<2i", *head[3:5]) == struct.pack("<Q", pd.fingerprint(file.read()))
    return list(ids)


def read_tokenizer(path):
    with open(path, "rb") as file:
        data = file.read()
    magic, version, kind, V, S, R, end_of_text, *zeros = struct.unpack_from("<256i", data)
    assert (magic, version) == (20261121, 1) and not any(zeros)
    ranges = list(struct.iter_unpack("<3I", data[1024:1024 + 12 * R]))
    offsets = struct.unpack_from(f"<{V + 1}I", data, 1024 + 12 * R)
    strings = data[1024 + 12 * R + 4 * (V + 1):]
    assert offsets[0] == 0 and offsets[-1] == S == len(strings) and list(offsets) == sorted(offsets)
    return kind, ranges, [strings[a:b] for a, b in zip(offsets, offsets[1:])], end_of_text


def without_progress(stderr):
    """Its lines, less those that a slow machine sees of long work."""
    return [line for line in stderr.decode().splitlines() if not re.fullmatch(r"[a-z ]+: \d+ %", line)]


def run(*arguments, **options):
    """The command as a user runs it: (exit status, stdout, lines of stderr)."""
    done = subprocess.run([sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60, **options)
    return done.returncode, done.stdout.decode(), without_progress(done.stderr)


class InFolder(unittest.TestCase):
    """A test with a folder of its own, in which it stands."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def write(self, path, data):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
        return path

    def main(self, *arguments):
        """The command within this process: (exit status, stdout, lines of stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = pd.main(list(arguments))
            except SystemExit as exit:
                status = exit.code
        return status, out.getvalue(), err.getvalue().splitlines()

    def decode(self, name):
        tokens = read_tokenizer("data/tokenizer.bin")[2]
        return b"".join(tokens[i] for i in read_tokens(f"data/{name}.bin"))


class Pattern(unittest.TestCase):
    def test_ranges_are_sorted_and_disjoint(self):
        ranges = pd.unicode_ranges()
        self.assertTrue(all(a <= b for a, b, _ in ranges))
        self.assertTrue(all(before[1] < after[0] for before, after in zip(ranges, ranges[1:])))

    def test_size_of_classes(self):
        size = {kind: sum(b - a + 1 for a, b, k in pd.unicode_ranges() if k == kind) for kind in (1, 2, 3)}
        if pd.unicodedata.unidata_version <= "16.0.0":
            self.assertEqual((size[pd.LETTER], size[pd.NUMBER]), (141028, 1911))
        self.assertEqual(size[pd.SPACE], 25)

    def test_pieces(self):
        def pieces(text):
            return list(pd.cut(text, lambda done: None))
        self.assertEqual(pieces("I'll say  it's\n\n 12½!?x"),
                         ["I", "'ll", " say", " ", " it", "'s", "\n\n", " 12½", "!?", "x"])
        self.assertEqual(pieces("a\x1cb \u00a0c\u3000"), ["a", "\x1c", "b", " ", "\u00a0", "c", "\u3000"])
        self.assertEqual(pieces("IT'S e\u0301"), ["IT", "'", "S", " e", "\u0301"])

    def test_nothing_is_lost(self):
        for seed in range(50):
            text = random_text(seed, 500)
            self.assertEqual("".join(pd.cut(text, lambda done: None)), text)


class BytePairs(unittest.TestCase):
    def test_order_of_merges(self):
        # ab occurs three times; then abc and xy twice each, and the smaller string comes first
        tokens = pd.train_bpe("abc\nabc\nab\nxy\nxy\n", 300)
        self.assertEqual(tokens[256:], [b"ab", b"abc", b"xy"])

    def test_equal_concatenations_are_one_pair(self):
        for text in ("aaa aaaa aaaaa aaaaaa aaaaaaa", "abab babab aabab abba bab"):
            self.assertEqual(pd.train_bpe(text * 3, 290), train_by_the_rule(text * 3, 290))

    def test_training_follows_the_rule(self):
        for seed in range(12):
            text = random_text(seed, 300) if seed % 2 else "".join(random.Random(seed).choices("aab ", k=400))
            self.assertEqual(pd.train_bpe(text, 300), train_by_the_rule(text, 300), f"seed {seed}")

    def test_encoding_follows_the_rule(self):
        for seed in range(12):
            tokens = pd.train_bpe(random_text(seed, 1000), 400)
            text = random_text(seed + 100, 300)
            wanted = []
            for piece in pd.cut(text, lambda done: None):
                wanted += encode_by_the_rule(piece.encode(), tokens)
            self.assertEqual(list(pd.Tokenizer(pd.BPE, tokens).encode(text)), wanted, f"seed {seed}")

    def test_every_token_encodes_to_itself(self):
        tokens = pd.train_bpe(random_text(7, 3000), 600)
        rank = {token: i for i, token in enumerate(tokens)}
        self.assertEqual([pd.encode_piece(token, rank) for token in tokens], [[i] for i in range(len(tokens))])

    def test_long_pieces_are_quick(self):
        begin = time.monotonic()
        for text in "a" * 200000, "".join(random.Random(1).choices("acgt", k=200000)), " " * 200000, "\n" * 200000:
            with contextlib.redirect_stderr(io.StringIO()):
                tokenizer = pd.Tokenizer(pd.BPE, pd.train_bpe(text, 400))
            ids = tokenizer.encode(text)
            self.assertEqual(b"".join(tokenizer.tokens[i] for i in ids).decode(), text)
        self.assertLess(time.monotonic() - begin, 60)       # seconds in truth; a quadratic search would take hours


class Files(InFolder):
    def test_bytes(self):
        self.write("text", TEXT)
        self.assertEqual(self.main("--tokenizer", "bytes", "text")[0], 0)
        self.assertEqual(read_tokenizer("data/tokenizer.bin"), (0, [], [bytes([b]) for b in range(256)], -1))
        self.assertEqual(bytes(read_tokens("data/train.bin") + read_tokens("data/val.bin")).decode(), TEXT)
        self.assertEqual(sorted(os.listdir("data")), OUTPUTS)

    def test_bpe(self):
        self.write("text", TEXT)
        status, out, err = self.main("--vocab-size", "300", "text", "--out", "data")
        self.assertEqual((status, err), (0, []))
        kind, ranges, tokens, end_of_text = read_tokenizer("data/tokenizer.bin")
        self.assertEqual((kind, ranges, end_of_text), (1, pd.unicode_ranges(), -1))
        self.assertEqual(tokens[:256], [bytes([b]) for b in range(256)])
        self.assertEqual((len(tokens), len(set(tokens))), (300, 300))
        self.assertEqual((self.decode("train") + self.decode("val")).decode(), TEXT)
        self.assertIn("300 tokens", out)

    def test_random_text_comes_back(self):
        for seed in range(5):
            text = random_text(seed, 3000)
            self.write("text", text)
            self.assertEqual(self.main("--vocab-size", "500", "text")[0], 0)
            self.assertEqual((self.decode("train") + self.decode("val")).decode(), text)

    def test_same_bytes_every_time(self):
        self.write("text", TEXT)
        seen = set()
        for hash_seed in "1", "2":
            self.assertEqual(run("text", env={**os.environ, "PYTHONHASHSEED": hash_seed})[0], 0)
            seen.add(b"".join(open_read(f"data/{name}") for name in OUTPUTS))
        self.assertEqual(len(seen), 1)

    def test_vocabulary_may_stay_small(self):
        self.write("text", "ab\n" * 500)
        status, out, _ = self.main("text")
        self.assertEqual(status, 0)
        self.assertRegex(out, r"25\d tokens \(not 1,024")

    def test_split(self):
        for text in "x" * 999 + "é" * 500, "世" * 1001, "😀" * 333 + "abc":
            data = text.encode()
            self.write("text", data)
            self.assertEqual(self.main("--tokenizer", "bytes", "text")[0], 0)
            train, val = self.decode("train"), self.decode("val")
            self.assertEqual(train + val, data)
            train.decode(), val.decode()
            self.assertIn(len(data) * 9 // 10 - len(train), range(4))

    def test_vocabulary_comes_from_training_part(self):
        self.write("text", "abc " * 900 + "xyz " * 100)
        self.assertEqual(self.main("text")[0], 0)
        self.assertFalse([token for token in read_tokenizer("data/tokenizer.bin")[2][256:] if b"x" in token])

    def test_documents(self):
        self.write("in/b", "b" * 600)
        self.write("in/a/z", "z" * 500)
        self.write("in/empty", "")
        self.write("in/.hidden", "h" * 500)
        self.write("in/.git/x", "h" * 500)
        self.write("in/binary", b"\0" * 500)
        self.write("in/latin", b"\xe9" * 500)
        os.mkfifo("in/pipe")
        self.write("c", "c" * 400)
        status, out, err = self.main("--tokenizer", "bytes", "in", "c")
        self.assertEqual((status, err), (0, ["prepare_data.py: in: passed over 2 hidden and 2 binary files"]))
        self.assertEqual(self.decode("train"), b"z" * 500 + b"\n\n" + b"b" * 600 + b"\n\n" + b"c" * 250)
        self.assertEqual(self.decode("val"), b"c" * 150)
        self.assertIn("3 documents", out)

    def test_progress(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            progress = pd.Progress("working", 200)
            progress(1)
            progress.next = 0
            progress(50)
            progress(60)
            progress.end()
        self.assertEqual(err.getvalue(), "working: 25 %\n")


class Errors(InFolder):
    """Each is one line on stderr, status 1, and leaves what was there."""

    def setUp(self):
        super().setUp()
        self.write("good", TEXT)
        for name in OUTPUTS:
            self.write(f"data/{name}", OLD[name])

    def check_unchanged(self):
        self.assertEqual(sorted(os.listdir("data")), OUTPUTS)
        for name in OUTPUTS:
            self.assertEqual(open_read(f"data/{name}"), OLD[name])

    def check_fails(self, pattern, *arguments, status=1, **options):
        result = run(*arguments, **options)
        self.assertEqual((result[0], result[1], len(result[2])), (status, "", 1), result)
        self.assertRegex(result[2][0], "^prepare_data.py: .*" + pattern)
        self.check_unchanged()

    def test_missing(self):
        self.check_fails("nowhere: No such file", "nowhere")

    def test_not_utf8(self):
        self.write("bad", TEXT.encode() + b"abc\xff")
        self.check_fails(f"bad: not UTF-8 text, see byte {len(TEXT.encode()) + 3}", "bad")

    def test_cut_character(self):
        self.write("bad", b"x" * 2000 + "é".encode()[:1])
        self.check_fails("bad: not UTF-8 text, see byte 2000", "good", "bad")

    def test_empty(self):
        self.write("bad", b"")
        self.check_fails("bad: no text; at least 1000 bytes", "bad")

    def test_empty_folder(self):
        os.mkdir("bad")
        self.check_fails("bad: no text", "bad")

    def test_too_small(self):
        self.write("bad", b"x" * 999)
        self.check_fails("bad: only 999 bytes of text; at least 1000", "bad")

    def test_too_few_tokens(self):
        self.write("bad", b"x" * 1280)
        tokens = [bytes([b]) for b in range(256)] + [b"x" * 2 ** n for n in range(1, 8)]
        with mock.patch.object(pd, "train_bpe", lambda text, size: tokens):     # the last 128 bytes are one token
            status, out, err = self.main("bad")
        self.assertEqual((status, out, len(err)), (1, "", 1))
        self.assertIn("a single token", err[0])
        self.check_unchanged()

    def test_unreadable(self):
        os.symlink("loop", "loop")
        self.check_fails("loop: Too many levels", "loop")

    @unittest.skipIf(os.getuid() == 0, "root may read everything")
    def test_no_permission_to_read(self):
        os.chmod("good", 0)
        self.check_fails("good: Permission denied", "good")

    @unittest.skipIf(os.getuid() == 0, "root may write everywhere")
    def test_no_permission_to_write(self):
        os.mkdir("closed", 0o500)
        self.check_fails("closed: no permission", "good", "--out", "closed")

    def test_out_is_a_file(self):
        self.check_fails("good: not a folder", "good", "--out", "good")
        self.check_fails("good/x: Not a directory", "good", "--out", "good/x")

    def test_output_is_a_folder(self):
        os.makedirs("other/val.bin")
        self.check_fails("other/val.bin: it is a folder", "good", "--out", "other")
        self.assertEqual(os.listdir("other"), ["val.bin"])

    def test_disk_full(self):
        # A limit on the size of files fails like a full disk: in the middle of a write.
        self.check_fails("cannot write data/train.bin: File too large", "good", "--tokenizer", "bytes",
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)))

    def test_disk_fails_at_each_step(self):
        def broken(function, calls):
            def call(*arguments):
                calls[0] -= 1
                if not calls[0]:
                    raise OSError(28, "No space left on device")
                return function(*arguments)
            return call
        for step in 1, 2, 3:
            with mock.patch.object(os, "fsync", broken(os.fsync, [step])):
                status, out, err = self.main("good", "--tokenizer", "bytes")
            self.assertEqual((status, out, len(err)), (1, "", 1))
            self.assertIn("No space left on device", err[0])
            self.check_unchanged()

    def test_no_memory(self):
        with mock.patch.object(pd, "read_sources", side_effect=MemoryError):
            self.assertEqual(self.main("good")[::2], (1, ["prepare_data.py: not enough memory for this text"]))

    def test_stdout_full(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        with open("/dev/full", "wb") as full:
            done = subprocess.run([sys.executable, SCRIPT, "good", "--out", "other"], stdout=full,
                                  stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, without_progress(done.stderr)),
                         (1, ["prepare_data.py: No space left on device"]))

    def test_interrupts(self):
        interrupted = b"prepare_data.py: interrupted\n"
        for number, status, message in (signal.SIGINT, 130, interrupted), (signal.SIGTERM, 143, b""):
            os.mkfifo(f"pipe{status}")
            process = subprocess.Popen([sys.executable, SCRIPT, f"pipe{status}"], stderr=subprocess.PIPE,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            with open(f"pipe{status}", "wb"):       # opens when the other side does
                # A signal just before it begins to read would only be seen after.
                while pathlib.Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "S":
                    time.sleep(0.01)
                process.send_signal(number)
                err = process.communicate(timeout=20)[1]
            self.assertEqual((process.returncode, err), (status, message))
            self.check_unchanged()

    def test_interrupted_while_it_starts(self):
        for delay in range(0, 120, 15):
            process = subprocess.Popen([sys.executable, "-S", SCRIPT, "good"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            time.sleep(0.03 + delay / 1000)
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=20)[1]
            self.assertNotRegex(err, b"prepare_data.py\", line [1-9]")    # line 0 comes before its first

    def test_other_files_stay(self):
        for name in OUTPUTS:
            self.write(f"mine/{name}", b"something else")
            self.check_fails(f"mine/{name} is not of this program", "good", "--out", "mine")
            self.assertEqual(open_read(f"mine/{name}"), b"something else")
            os.remove(f"mine/{name}")

    def test_memory_available(self):
        self.write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    7000 kB\n")
        self.assertEqual(pd.memory_available("proc", "groups"), 7000 << 10)
        self.write("groups/a/memory.max", "max\n")
        self.write("groups/a/b/memory.max", "6000000\n")
        self.write("groups/memory.max", "5000000\n")
        self.write("groups/memory/memory.limit_in_bytes", "4000000\n")
        self.write("groups/memory/c/memory.limit_in_bytes", "3000000\n")
        for groups, bytes_ in (("1:cpu:/c\n0::/a/b/c\n", 5000000), ("0::/a\n", 5000000), ("3:cpu,memory:/c/d\n", 3000000),
                               ("3:memory:/elsewhere\n1:cpu:/c\n", 4000000), ("3:cpu:/a\n4:memoryless:/\n", 7000 << 10)):
            self.write("proc/self/cgroup", groups)
            self.assertEqual(pd.memory_available("proc", "groups"), bytes_, groups)
        os.remove("groups/memory.max")
        self.write("proc/self/cgroup", "0::/a/b/c\n")
        self.assertEqual(pd.memory_available("proc", "groups"), 6000000)
        self.assertEqual(pd.memory_available("nowhere", "groups"), sys.maxsize)
        self.assertLess(pd.memory_available(), sys.maxsize)

    def test_text_larger_than_memory(self):
        with mock.patch.object(pd, "memory_available", return_value=len(TEXT)):
            err = self.main("good", "--tokenizer", "bytes")[2]
        self.assertIn("memory", err[0])

    def test_interrupted_write(self):
        with mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt):
            self.assertEqual(self.main("good", "--tokenizer", "bytes")[0], 130)
        self.check_unchanged()

    def test_usage(self):
        for arguments in (["--vocab-size", "256"], ["--vocab-size", "65537"], ["--vocab-size", "x"],
                          ["--tokenizer", "words"], ["--tokenizer", "bytes", "--vocab-size", "300"],
                          ["--vocab", "good"], ["--what"]):
            status, out, err = self.main("good", *arguments)
            self.assertEqual((status, out), (2, ""))
            self.assertRegex(err[-1], "^prepare_data.py: error: ")
        self.check_unchanged()

    def test_bad_vocabularies(self):
        ranks = [b"%s %d" % (base64.b64encode(b"%d" % i), i) for i in range(50256)]
        bad = [b"", b"\0" * 100, b"hello", b"IQ== x", b"I! 0", b"IQ== 0", b"\n".join(ranks), b"{}", b"{",
               b"[" * 100000, b'{"a":' * 100000, b'{"<|endoftext|>": 50256, "a": "b"}',
               b'{"<|endoftext|>": 50256, "a": []}',
               b'{"<|endoftext|>": 50256, "\\ud800": 0}', b'{"<|endoftext|>": 1}', b"{\xff}"]
        for data in bad:
            self.write("vocab", data)
            status, out, err = self.main("good", "--tokenizer", "gpt2", "--vocab", "vocab")
            self.assertEqual((status, out, len(err)), (1, "", 1), data[:50])
            self.assertRegex(err[0], "^prepare_data.py: vocab: (neither a|a vocabulary, but)")
        self.check_unchanged()

    def test_missing_vocabularies(self):
        self.check_fails("nowhere: No such file", "good", "--tokenizer", "gpt2", "--vocab", "nowhere")
        os.mkdir("folder")
        self.check_fails("folder: no vocab.json and", "good", "--tokenizer", "gpt2", "--vocab", "folder")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves /text, and /slow that begins and does not end."""

    def do_GET(self):
        if self.path == "/text":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(TEXT.encode())
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            time.sleep(1)
        else:
            self.send_error(404)

    def log_message(self, *arguments):
        pass


class Downloads(InFolder):
    """With a server on this machine, so that they run without a network."""

    def setUp(self):
        super().setUp()
        server = http.server.HTTPServer(("127.0.0.1", 0), Server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        try:
            socket.create_connection(server.server_address, timeout=5).close()
        except OSError:
            self.skipTest("not even the loopback network is up here")
        self.url = f"http://127.0.0.1:{server.server_port}/"
        self.write("stdlib/one.py", TEXT)
        self.write("stdlib/two.py", b"\xff")
        self.write("stdlib/three.py", TEXT)
        patches = [mock.patch.object(pd, "CONNECT_SECONDS", 0.5), mock.patch.object(pd, "DOWNLOAD_SECONDS", 0.5),
                   mock.patch.object(pd.sysconfig, "get_paths", lambda: {"stdlib": "stdlib"}),
                   mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"})]
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def main_with(self, url, sha256="", *arguments):
        with mock.patch.object(pd, "SHAKESPEARE", ("tinyshakespeare.txt", url, sha256)):
            return self.main("--tokenizer", "bytes", *arguments)

    def check_falls_back(self, url, why):
        begin = time.monotonic()
        status, out, err = self.main_with(url)
        self.assertLess(time.monotonic() - begin, 5)
        self.assertEqual((status, len(err)), (0, 1), err)
        self.assertRegex(err[0], f"^prepare_data.py: cannot download tiny Shakespeare .*{why}.*; using the sources")
        self.assertEqual((self.decode("train") + self.decode("val")).decode(), TEXT + "\n\n" + TEXT)
        self.assertEqual(sorted(os.listdir("data")), OUTPUTS)

    def test_download_is_kept(self):
        sha256 = pd.hashlib.sha256(TEXT.encode()).hexdigest()
        self.write("data/tinyshakespeare.txt", "half a downl")
        for url in self.url + "text", self.url + "gone":
            status, out, err = self.main_with(url, sha256)
            self.assertEqual((status, len(err)), (0, url.endswith("text")), err)
            self.assertEqual((self.decode("train") + self.decode("val")).decode(), TEXT)
            self.assertEqual(open_read("data/tinyshakespeare.txt").decode(), TEXT)
            self.assertEqual(open_read("data/tinyshakespeare.txt.old").decode(), "half a downl")
        for name in "half another", "half a third":     # numbered as train_gpt does
            self.write("data/tinyshakespeare.txt", name)
            self.main_with(self.url + "text", sha256)
        self.assertEqual(open_read("data/tinyshakespeare.txt.old2").decode(), "half another")
        self.assertEqual(open_read("data/tinyshakespeare.txt.old3").decode(), "half a third")

    def test_wrong_checksum(self):
        self.check_falls_back(self.url + "text", "SHA-256 is wrong")

    def test_not_found(self):
        self.check_falls_back(self.url + "gone", "Not Found")

    def test_refused(self):
        self.check_falls_back("http://127.0.0.1:1/", "refused")

    def test_slow(self):
        self.check_falls_back(self.url + "slow", "not done in|timed out")

    def test_name_lookup_hangs(self):
        with mock.patch.object(pd.urllib.request, "urlopen", lambda *_, **__: time.sleep(8)):
            self.check_falls_back("https://example.com/", "no answer in 0.5 seconds")

    def test_vocabulary(self):
        self.write("good", TEXT)
        with mock.patch.object(pd, "GPT2_RANKS", ("gpt2.tiktoken", self.url + "gone", "")):
            status, out, err = self.main("good", "--tokenizer", "gpt2")
        self.assertEqual((status, out, len(err)), (1, "", 1))
        self.assertIn("--vocab FILE", err[0])


@unittest.skipUnless(os.path.exists(VOCAB), "no data/gpt2.tiktoken here, and GPT2_VOCAB names no other")
class GPT2(InFolder):
    @staticmethod
    @functools.lru_cache(maxsize=None)
    def tokenizer():
        return pd.Tokenizer(pd.GPT2, pd.load_gpt2(VOCAB, None), 50256)

    def test_known(self):
        for text, ids in KNOWN:
            self.assertEqual(list(self.tokenizer().encode(text)), ids, ascii(text))

    def test_file(self):
        self.write("text", TEXT)
        self.assertEqual(self.main("--tokenizer", "gpt2", "--vocab", VOCAB, "text")[0], 0)
        kind, ranges, tokens, end_of_text = read_tokenizer("data/tokenizer.bin")
        self.assertEqual((kind, ranges, end_of_text), (2, pd.unicode_ranges(), 50256))
        self.assertEqual((len(tokens), tokens[0], tokens[50256]), (50257, b"!", b"<|endoftext|>"))
        self.assertEqual((self.decode("train") + self.decode("val")).decode(), TEXT)

    def test_documents_are_marked(self):
        self.write("a", "a b" * 300)
        self.write("b", "c d" * 300)
        self.assertEqual(self.main("--tokenizer", "gpt2", "--vocab", VOCAB, "a", "b")[0], 0)
        mark = b"<|endoftext|>"
        self.assertEqual(self.decode("train"), mark + b"a b" * 300 + mark + b"c d" * 240)
        self.assertEqual(self.decode("val"), mark + b"c d" * 60)
        self.assertEqual(read_tokens("data/train.bin").count(50256), 2)

    def test_vocab_json(self):
        tokens = self.tokenizer().tokens
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        other = [b for b in range(256) if b not in printable]
        character = {b: chr(b if b in printable else 256 + other.index(b)) for b in range(256)}
        vocab = {"".join(character[b] for b in token): i for i, token in enumerate(tokens)}
        self.write("model/vocab.json", json.dumps(vocab))
        for path in "model", "model/vocab.json":
            self.assertEqual(pd.load_gpt2(path, None), tokens)
        vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
        self.write("model/vocab.json", json.dumps(vocab))
        with self.assertRaisesRegex(pd.Failure, "a vocabulary, but not the one of GPT-2"):
            pd.load_gpt2("model", None)

    def test_every_token_encodes_to_itself(self):
        rank = self.tokenizer().rank
        self.assertFalse([token for token, i in rank.items() if pd.encode_piece(token, rank) != [i]])


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


if __name__ == "__main__":
    runner = unittest.TextTestRunner(resultclass=Result, warnings="ignore", verbosity=1 + ("-v" in sys.argv))
    result = unittest.main(testRunner=runner, exit=False).result
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    print(f"{result.passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
