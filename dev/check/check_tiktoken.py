#!/usr/bin/env python3
"""Compare the GPT-2 tokens of prepare_data.py, and of train_gpt where it is built, with those of tiktoken.

    pip install tiktoken
    python3 dev/check/check_tiktoken.py [--vocab data/gpt2.tiktoken] [--seed N] [--size MEGABYTES] [FILE ...]

The text has everything that could go wrong: the sources of Python's standard library, every code point there is
between letters and between spaces, scripts, numbers, spaces and emoji in random order, words cut and joined at
random, long runs of one character; and the FILEs, if any are given. Prints what was compared and the first
difference; the exit status is 1 if there is one, 2 if the check could not be made.
"""

import argparse
import array
import base64
import glob
import os
import random
import subprocess
import sys
import sysconfig
import tempfile

try:
    import tiktoken
except ImportError:
    print("check_tiktoken.py: tiktoken is not installed, try: pip install tiktoken", file=sys.stderr)
    sys.exit(2)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SNIPPETS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", "''", "’s", "the", "The", "it", "I", " ", " ", "  ",
            "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u180e",
            "\u2003", "\u200b", "\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "1", "2024", "3.14", "½", "Ⅻ", "٣",
            "五", "²", "é", "e\u0301", "\u0300", "ß", "ﬁ", "мир", "κόσμος", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "世界", "こんにちは",
            "안녕", "😀", "👍🏽", "👩\u200d👩\u200d👧", "🇩🇪", "𝔘", "𝟙", "\U000105c0", "\U0001e5f1", "\ue000", "\U0010ffff",
            "<|endoftext|>", "_", "-", "--", "...", "!?", "(", ")", "{", "};", "//", "/*", "==", "\\", '"', "`", "\0", "\x7f"]


def mixed_text(seed, size):
    """About size megabytes, the same for the same seed and Python."""
    choice = random.Random(seed)
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    parts = ["".join(points), "".join(f"a{c}b" for c in points), "".join(f" {c} {c}{c}\n" for c in points)]
    choice.shuffle(points)
    parts += ["".join(points), "".join(c + choice.choice(SNIPPETS) for c in points)]
    for path in sorted(glob.glob(os.path.join(glob.escape(sysconfig.get_paths()["stdlib"]), "*.py"))):
        with open(path, "rb") as file:
            parts.append(file.read().decode("utf-8", "replace"))
    code = parts[-1] + parts[-2]
    parts += [c * n for c in " \n\taé世😀1.\u3000" for n in (1, 2, 3, 7, 100, 5000)]
    room = size * 1000000 - sum(map(len, parts))
    while room > 0:
        parts.append("".join(choice.choices(SNIPPETS, k=1000)))
        at = choice.randrange(len(code))
        parts.append(code[at:at + choice.randrange(20)])
        room -= len(parts[-1]) + len(parts[-2])
    return "".join(parts)


def read_tokens(path):
    with open(path, "rb") as file:
        file.seek(1024)
        ids = array.array("H", file.read())
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def compare(name, encoding, ids, text):
    """Print how ids compare with tiktoken's of the text; true if they are the same."""
    wanted = encoding.encode_ordinary(text)
    if ids == wanted:
        print(f"{name}: {len(ids):,} tokens of {len(text.encode()):,} bytes are the same")
        return True
    at = next((i for i, (a, b) in enumerate(zip(ids, wanted)) if a != b), min(len(ids), len(wanted)))
    print(f"{name}: DIFFERENT, {len(ids):,} tokens, tiktoken {len(wanted):,}; the first difference is token {at}")
    print(f"    after {ascii(encoding.decode(wanted[max(at - 8, 0):at]))}")
    for who, tokens in ("tiktoken", wanted), (name, ids):
        tokens = tokens[at:at + 8]
        known = [t for t in tokens if 0 <= t < encoding.n_vocab]
        print(f"    {who} has {tokens} {encoding.decode_bytes(known)}")
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", default=os.environ.get("GPT2_VOCAB", os.path.join(ROOT, "data", "gpt2.tiktoken")))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=20, help="millions of characters, at least (default: 20)")
    parser.add_argument("files", nargs="*", metavar="FILE", help="more UTF-8 text")
    options = parser.parse_args()
    if not os.path.exists(options.vocab):
        parser.error(f"no {options.vocab}; give tiktoken's file of GPT-2's vocabulary with --vocab FILE")

    with open(options.vocab, "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    text = mixed_text(options.seed, options.size)
    for path in options.files:
        with open(path, encoding="utf-8", newline="") as file:
            text += file.read()

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "text")
        data = text.encode()
        with open(path, "wb") as file:
            file.write(data)
        subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), "--tokenizer", "gpt2", "--vocab",
                        options.vocab, "--out", folder, path], check=True, stdout=subprocess.DEVNULL)
        cut = len(data) * 9 // 10
        while data[cut] & 0xC0 == 0x80:
            cut -= 1
        same = [compare("prepare_data.py, train.bin", encoding, read_tokens(os.path.join(folder, "train.bin")),
                        data[:cut].decode()),
                compare("prepare_data.py, val.bin", encoding, read_tokens(os.path.join(folder, "val.bin")),
                        data[cut:].decode())]
        program = os.path.join(ROOT, "train_gpt")
        if os.path.exists(program):
            done = subprocess.run([program, "--data", folder, "--tokenize", path], check=True, stdout=subprocess.PIPE)
            same.append(compare("train_gpt --tokenize", encoding, list(map(int, done.stdout.split())), text))
        else:
            print("train_gpt is not built here: not compared")
    return 0 if all(same) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"check_tiktoken.py: {error}", file=sys.stderr)
        sys.exit(2)
