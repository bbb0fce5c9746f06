#!/usr/bin/env python3
r"""Turn text into the tokens that train_gpt reads.

    python3 prepare_data.py                       tiny Shakespeare, byte-pair encoding trained on it
    python3 prepare_data.py book.txt              your own text: a file,
    python3 prepare_data.py notes/ letters.txt    a folder with everything below it, or several of either
    python3 prepare_data.py --tokenizer bytes     one token a byte, nothing to learn
    python3 prepare_data.py --tokenizer gpt2 --vocab gpt2.tiktoken book.txt
                                                  the tokens of GPT-2, to continue from its weights

It needs Python 3.8 or newer and nothing else. Without arguments it downloads tiny Shakespeare (1.1 MB); where
that fails it takes a text that is on every machine with Python, the sources of Python's standard library. The
two things that it may download, tinyshakespeare.txt and gpt2.tiktoken, are kept in the output folder and not
downloaded again; put there by hand, they serve as well.

Text is UTF-8. Of a folder, every file below it is read in sorted order; hidden files are passed over, and so are
files that are not text. Each file is a document. The first 90 % of the text's bytes (cut at a character) are
for training, the rest is for validation; the two parts are encoded separately. Documents are joined by a blank
line; for GPT-2, if there are several, each begins with the token <|endoftext|> instead, also the rest of the one
that the cut goes through. "<|endoftext|>" in the text itself is text like any other.

THE TOKENIZER. Bytes: token i is byte i. The other two are byte-pair encodings (Sennrich et al. 2016, over bytes
as in GPT-2, Radford et al. 2019). Text is first cut into pieces by GPT-2's pattern

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

A piece starts as single bytes. Among its adjacent pairs whose concatenation is a token, the one with the lowest
id is merged, the leftmost of equals first; this is repeated until no pair is a token. An id is thus its own rank,
and a list of tokens is all that an encoder needs: there is no table of merges. The token <|endoftext|> never
takes part.

Training grows the list. It begins with the 256 bytes and encodes the text with what it has; the string that most
often stands in two adjacent tokens of a piece becomes the next token, of equals the smallest byte string; this
is repeated until the list is as long as asked for, or nothing is left that occurs twice. Only the part of the
text that is for training is looked at.

GPT-2's list is read from gpt2.tiktoken (also called r50k_base.tiktoken) or from the vocab.json that comes with
its weights; merges.txt has nothing to add. Either way it must be GPT-2's to the last byte.

THE FILES, all little-endian, written to the output folder (data/ unless --out says otherwise):

train.bin, val.bin
    256 int32   header: 20240520, 1, number of tokens, in two words the fingerprint of tokenizer.bin (64-bit FNV-1a
                        of its bytes), zeros
    uint16      the tokens

tokenizer.bin
    256 int32   header: [0] 20261121
                        [1] 1, the version of this format
                        [2] kind: 0 bytes, 1 byte-pair encoding trained on the text, 2 GPT-2
                        [3] V, number of tokens, at most 65536
                        [4] S, bytes in all token strings together
                        [5] R, number of Unicode ranges (0 for kind bytes)
                        [6] id of <|endoftext|>, or -1 where there is none
                        the rest zero
    R x 3 uint32    first code point, last code point (inclusive), class: 1 letter \p{L}, 2 number \p{N},
                    3 white space \s; sorted and disjoint; any other code point is in none of the classes
    V+1 uint32      where each token's string starts among the strings; the first is 0, the last is S
    S bytes         the token strings in order of id

    Every single byte is a token: with id = byte for kinds 0 and 1, where merged tokens follow in the order in
    which they were made; in GPT-2's own order for kind 2, which has 50257 tokens, <|endoftext|> the last.
"""

import _signal  # the part of signal that is there at once
if __name__ == "__main__":
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)     # while Python loads what follows, Ctrl-C just ends it

import argparse
import array
import base64
import collections
import contextlib
import functools
import glob
import hashlib
import heapq
import itertools
import json
import os
import re
import signal
import struct
import sys
import sysconfig
import threading
import time
import unicodedata
import urllib.request

DEFAULT_VOCAB = 1024    # tokens of a trained vocabulary, unless --vocab-size says otherwise
MAX_VOCAB = 65536       # a token is a uint16
MIN_TEXT = 1000         # bytes; a tenth of less is no validation set
CONNECT_SECONDS = 6     # how long a download may take to begin,
DOWNLOAD_SECONDS = 30   # and to end,
DOWNLOAD_BYTES = 1 << 24    # and how much it may be: nothing that is wanted here is half as large

TOKENS_MAGIC, TOKENS_VERSION = 20240520, 1
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20261121, 1
BYTES, BPE, GPT2 = 0, 1, 2
LETTER, NUMBER, SPACE = 1, 2, 3
END_OF_TEXT = b"<|endoftext|>"

SHAKESPEARE = ("tinyshakespeare.txt",
               "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
GPT2_RANKS = ("gpt2.tiktoken",
              "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
              "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930")


class Failure(Exception):
    """Something that the user can mend; the message is one line."""


# ----------------------------------------------------------------------------------------------------------------
# Cutting text into pieces
#
# Python's re knows no \p{L} and \p{N}, and its \s has four characters too many (0x1C to 0x1F), so the classes are
# spelled out as ranges of code points. They also go into tokenizer.bin: C has no Unicode tables, and this way both
# sides agree by construction.

# Python's unicodedata is as old as Python. These are the letters and numbers that Unicode added between version
# 12.1 (Python 3.8) and 16 (tiktoken), so that every Python up to 3.14 gives the classes of Unicode 16, and a
# later one differs only in characters that are newer still.
NEW_LETTERS = """
    870-887 889-88E 8B5 8BE-8C9 C5D CDD D04 170D 171F 1B4C 1C89-1C8A 2C2F 2C5F 31BB-31BF 4DB6-4DBF
    9FF0-9FFF A7C0-A7C1 A7C7-A7CD A7D0-A7D1 A7D3 A7D5-A7DC A7F2-A7F6 AB68-AB69 10570-1057A 1057C-1058A
    1058C-10592 10594-10595 10597-105A1 105A3-105B1 105B3-105B9 105BB-105BC 105C0-105F3 10780-10785
    10787-107B0 107B2-107BA 10D4A-10D65 10D6F-10D85 10E80-10EA9 10EB0-10EB1 10EC2-10EC4 10F70-10F81
    10FB0-10FC4 11071-11072 11075 11147 1123F-11240 11380-11389 1138B 1138E 11390-113B5 113B7 113D1 113D3
    11460-11461 11740-11746 11900-11906 11909 1190C-11913 11915-11916 11918-1192F 1193F 11941 11AB0-11ABF
    11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 11FB0 12F90-12FF0 1342F 13441-13446 13460-143FA 16100-1611D
    16A70-16ABE 16D40-16D6C 18AF3-18CD5 18CFF-18D08 1AFF0-1AFF3 1AFF5-1AFFB 1AFFD-1AFFE 1B11F-1B122 1B132
    1B155 1DF00-1DF1E 1DF25-1DF2A 1E030-1E06D 1E290-1E2AD 1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 1E7E0-1E7E6
    1E7E8-1E7EB 1E7ED-1E7EE 1E7F0-1E7FE 2A6D7-2A6DF 2B735-2B739 2EBF0-2EE5D 30000-3134A 31350-323AF"""
NEW_NUMBERS = """
    10D40-10D49 10FC5-10FCB 116D0-116E3 11950-11959 11BF0-11BF9 11F50-11F59 16130-16139 16AC0-16AC9
    16D70-16D79 1CCF0-1CCF9 1D2C0-1D2D3 1E4F0-1E4F9 1E5F1-1E5FA 1FBF0-1FBF9"""
SPACES = "9-D 20 85 A0 1680 2000-200A 2028-2029 202F 205F 3000"


@functools.lru_cache(maxsize=None)
def unicode_ranges():
    """The classes of all code points: a sorted list of (first, last, class)."""
    major = {"L": LETTER, "N": NUMBER}
    classes = bytearray(major.get(unicodedata.category(chr(c))[0], 0) for c in range(0x110000))
    for table, kind in (NEW_LETTERS, LETTER), (NEW_NUMBERS, NUMBER), (SPACES, SPACE):
        for span in table.split():
            first, last = (int(c, 16) for c in (span + "-" + span).split("-")[:2])
            classes[first:last + 1] = bytes([kind]) * (last + 1 - first)
    return [(run.start(), run.end() - 1, run.group()[0]) for run in re.finditer(rb"\x01+|\x02+|\x03+", classes)]


@functools.lru_cache(maxsize=None)
def piece_pattern():
    """GPT-2's pattern with its classes spelled out."""
    def ranges(kind):
        return "".join(r"\U%08x-\U%08x" % (a, b) for a, b, k in unicode_ranges() if k == kind)
    L, N, S = ranges(LETTER), ranges(NUMBER), ranges(SPACE)
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+")


def cut(text, progress):
    """The pieces of the text, one by one. Nothing is lost: together they are the text."""
    for number, match in enumerate(piece_pattern().finditer(text)):
        if number % 4096 == 0:
            progress(match.end())
        yield match.group()


# ----------------------------------------------------------------------------------------------------------------
# Byte-pair encoding
#
# One class holds pieces while their symbols are merged, both when a vocabulary is trained and when it is used: so
# the trained text and the encoded text cannot come out differently.

class Pieces:
    """Pieces of text, each a row of symbols. A symbol is known by the position of its first byte.

    Symbols are linked to their neighbours, so a merge takes the same time in a piece of a million bytes as in a
    short word. An empty string marks the end of a piece, and the place of a symbol that was merged into another."""

    def __init__(self, pieces):
        self.symbol = [b""]
        for piece in pieces:
            self.symbol.extend(piece[i:i + 1] for i in range(len(piece)))
            self.symbol.append(b"")
        self.left = list(range(-1, len(self.symbol) - 1))
        self.right = list(range(1, len(self.symbol))) + [0]

    def pair(self, i):
        """Symbol i and the next one as one string; empty where there are no two."""
        a, b = self.symbol[i], self.symbol[self.right[i]]
        return a + b if a and b else b""

    def merge(self, todo, rank, count=None):
        """Merge the pairs in the heap todo of (rank, position), and the pairs that this makes, lowest rank first.

        Training asks to be told: count(position, -1) of a pair that is about to go, count(position, +1) of a
        new one."""
        symbol, left, right, pair = self.symbol, self.left, self.right, self.pair
        while todo:
            r, i = heapq.heappop(todo)
            if rank.get(pair(i)) != r:      # one of the two symbols is no longer what it was
                continue
            j = right[i]
            if count:
                count(left[i], -1), count(i, -1), count(j, -1)
            symbol[i], symbol[j] = symbol[i] + symbol[j], b""
            right[i] = right[j]
            left[right[j]] = i
            for k in left[i], i:
                if count:
                    count(k, +1)
                r = rank.get(pair(k))
                if r is not None:
                    heapq.heappush(todo, (r, k))


def encode_piece(piece, rank):
    """The ids of one piece, given the id (which is the rank) of every token string."""
    pieces = Pieces([piece])
    pairs = ((rank.get(pieces.pair(i)), i) for i in range(len(piece)))
    todo = [(r, i) for r, i in pairs if r is not None]
    heapq.heapify(todo)
    pieces.merge(todo, rank)
    return [rank[s] for s in pieces.symbol if s]


def train_bpe(text, size):
    """Learn a vocabulary of at most size tokens from the text; returns the token strings by id."""
    progress = Progress("counting words", len(text))
    words = collections.Counter(cut(text, progress))
    progress.end()

    pieces = Pieces(word.encode() for word in words)
    weight = [0]                            # of each position: how often its piece occurs
    for word, n in words.items():
        weight.extend([n] * (len(word.encode()) + 1))
    # A pair is known by its concatenation: "ab" + "c" and "a" + "bc" are one and the same.
    total = collections.Counter()           # how often each pair occurs,
    where = collections.defaultdict(list)   # at which positions, now or at some time before,
    changed = set()                         # and which totals are new since the last token

    def count(i, sign):
        pair = pieces.pair(i)
        if pair:
            total[pair] += sign * weight[i]
            changed.add(pair)
            if sign > 0:
                where[pair].append(i)

    for i in range(len(pieces.symbol)):
        count(i, +1)
    tokens = [bytes([b]) for b in range(256)]
    rank = {token: r for r, token in enumerate(tokens)}
    frequent = []                           # heap of (-total, pair); entries whose total is outdated are skipped
    progress = Progress("training the vocabulary", size)
    while len(tokens) < size:
        for pair in changed:
            if total[pair] > 1:
                heapq.heappush(frequent, (-total[pair], pair))
        changed.clear()
        while frequent and -frequent[0][0] != total[frequent[0][1]]:
            heapq.heappop(frequent)
        if not frequent:
            break
        pair = heapq.heappop(frequent)[1]
        rank[pair] = len(tokens)
        tokens.append(pair)
        pieces.merge([(rank[pair], i) for i in sorted(where.pop(pair))], rank, count)
        progress(len(tokens))
    progress.end()
    return tokens


class Tokenizer:
    def __init__(self, kind, tokens, end_of_text=-1):
        self.kind, self.tokens, self.end_of_text = kind, tokens, end_of_text
        self.rank = {token: i for i, token in enumerate(tokens) if i != end_of_text}
        self.known = {}                     # the ids of pieces seen before: the same words come again and again

    def encode(self, text, progress=lambda done: None):
        """The ids of a text."""
        ids = array.array("H")
        if self.kind == BYTES:
            ids.extend(iter(text.encode()))
            return ids
        known = self.known
        for piece in cut(text, progress):
            if piece not in known:
                known[piece] = encode_piece(piece.encode(), self.rank)
            ids.extend(known[piece])
        return ids

    def encode_documents(self, documents, several):
        """The ids of documents in a row; several says whether there is more than one in the whole text."""
        marked = several and self.end_of_text >= 0
        texts = documents if marked else ["\n\n".join(documents)]
        progress = Progress("encoding", sum(map(len, texts)))
        ids = array.array("H")
        for text in texts:
            if marked:
                ids.append(self.end_of_text)
            ids.extend(self.encode(text, progress))
            progress.before += len(text)
        progress.end()
        return ids


# ----------------------------------------------------------------------------------------------------------------
# The vocabulary of GPT-2

def parse_ranks(data):
    """tiktoken's file: a line for each token, its string in base64 and its id."""
    lines = (line.split() for line in data.splitlines() if line.strip())
    return {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}


def parse_vocab_json(data):
    """Hugging Face's vocab.json (OpenAI's encoder.json): {string: id}, with a printable character for each byte.

    Printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(b): b for b in printable}
    byte_of.update((chr(256 + n), b) for n, b in enumerate(b for b in range(256) if b not in printable))
    vocab = json.loads(data.decode())
    if vocab.pop(END_OF_TEXT.decode()) != 50256:
        raise ValueError
    return {i: bytes(byte_of[c] for c in token) for token, i in vocab.items()}


def gpt2_tokens(data, name):
    """The token strings of GPT-2, from the contents of either file.

    Whatever the file, the tokens are written out as tiktoken's file has them and compared with its checksum: one
    wrong byte would make another tokenizer, with no other sign than a bad loss."""
    try:
        vocab = parse_vocab_json(data) if data.lstrip()[:1] == b"{" else parse_ranks(data)
        tokens = [vocab[i] for i in range(50256)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Failure(f"{name}: neither a gpt2.tiktoken nor a vocab.json of GPT-2") from None
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))
    if len(vocab) != 50256 or hashlib.sha256(ranks).hexdigest() != GPT2_RANKS[2]:
        raise Failure(f"{name}: a vocabulary, but not the one of GPT-2")
    return tokens + [END_OF_TEXT]


def load_gpt2(path, out):
    if path is None:
        try:
            return gpt2_tokens(fetch(GPT2_RANKS, out), GPT2_RANKS[1])
        except OSError as error:
            raise Failure(f"cannot download the vocabulary of GPT-2 ({reason(error)}): give a local copy, "
                          "gpt2.tiktoken or vocab.json, with --vocab FILE") from None
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in ("vocab.json", "encoder.json", "gpt2.tiktoken")]
        if not any(map(os.path.exists, names)):
            raise Failure(f"{path}: no vocab.json and no gpt2.tiktoken in this folder")
        path = next(filter(os.path.exists, names))
    return gpt2_tokens(read_file(path), path)


# ----------------------------------------------------------------------------------------------------------------
# Text

def reason(error):
    """What went wrong, in a few words."""
    error = getattr(error, "reason", error)
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def download(url):
    """The contents of a URL, within the time limits; raises OSError.

    Looking up a name can block for minutes whatever timeout is set, so this is left to a thread that is
    abandoned when its time is over."""
    begun, ended, data, errors = threading.Event(), threading.Event(), [], []

    def work():
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
                begun.set()
                data.append(response.read(DOWNLOAD_BYTES))
        except Exception as error:          # whatever it is, the caller's thread is the one to report it
            errors.append(error)
        begun.set()
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    if not begun.wait(CONNECT_SECONDS):
        raise TimeoutError(f"no answer in {CONNECT_SECONDS} seconds")
    if not ended.wait(DOWNLOAD_SECONDS):
        raise TimeoutError(f"not done in {DOWNLOAD_SECONDS} seconds")
    if errors:
        raise OSError(reason(errors[0]))
    return data[0]


def fetch(source, out):
    """The contents of a known file: the copy in the output folder, or a download that is then kept there."""
    name, url, sha256 = source
    path = os.path.join(out, name)
    if os.path.exists(path):
        data = read_file(path)
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    data = download(url)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise OSError(f"its SHA-256 is wrong, got {len(data):,} bytes of something else")
    if os.path.exists(path):
        old = next(old for n in itertools.count(1) if not os.path.lexists(old := f"{path}.old{n if n > 1 else ''}"))
        os.rename(path, old)
        warn(f"{path} was another text than the one of this name: it is kept as {old}")
    write_files(out, {name: [data]})
    return data


def default_text(out):
    """Tiny Shakespeare, or where there is no network the sources of Python: (documents, what they are)."""
    try:
        return [fetch(SHAKESPEARE, out)], "tiny Shakespeare"
    except OSError as error:
        warn(f"cannot download tiny Shakespeare ({reason(error)}); "
             "using the sources of Python's standard library instead")
    folder = sysconfig.get_paths()["stdlib"]
    documents = [read_file(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.py")))]
    return [data for data in documents if data and is_text(data)], "the sources of Python's standard library"


def is_text(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def read_if_text(path):
    """The contents of a file, or None of a binary one, which may be large and is not read to its end."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        data = None if b"\0" in head else head + file.read()
    return data if data is not None and is_text(data) else None


def files_below(folder):
    """Every regular file below the folder, sorted, without hidden ones: (paths, number of hidden ones)."""
    def raise_error(error):
        raise error

    paths, hidden = [], 0
    for root, folders, names in os.walk(folder, onerror=raise_error):
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(root, name) for name in names if not name.startswith(".")]
    return sorted(filter(os.path.isfile, paths)), hidden


def memory_available(proc="/proc", root="/sys/fs/cgroup"):
    """Bytes: what the system calls available, or the least limit of the control groups, of version 1 or 2, that this
    process is in. A limit also holds in all groups below, and in a container the path may be that outside of it, so all
    its prefixes are tried."""
    def found(path, pattern):
        try:
            return re.findall(pattern, read_file(path).decode(), re.M)
        except OSError:
            return []

    least = [int(kb) << 10 for kb in found(f"{proc}/meminfo", r"^MemAvailable: *(\d+) kB")]
    for controllers, path in found(f"{proc}/self/cgroup", r"^\d+:(|(?:[^:]*,)?memory(?:,[^:]*)?):(.*)"):
        for prefix in (path[:i] for i in range(len(path) + 1) if path[i:i + 1] in ("/", "")):
            limit = f"/memory{prefix}/memory.limit_in_bytes" if controllers else f"{prefix}/memory.max"
            least += map(int, found(root + limit, r"^\d+$"))
    return min(least, default=sys.maxsize)


def warn_of_memory(sources):
    """A text is held in memory several times over: as bytes, characters, pieces and tokens."""
    paths = [path for source in sources for path in (files_below(source)[0] if os.path.isdir(source) else [source])]
    needed, available = 8 * sum(map(os.path.getsize, paths)), memory_available()
    if needed > available:
        warn(f"this text may take {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available; "
             "a part of it may do")


def read_sources(sources):
    """The user's files and folders: (documents, what they are)."""
    warn_of_memory(sources)
    documents = []
    for source in sources:
        if os.path.isdir(source):
            paths, hidden = files_below(source)
            contents = [read_if_text(path) for path in paths]
            documents += filter(None, contents)
            if hidden or None in contents:
                warn(f"{source}: passed over {hidden} hidden and {contents.count(None)} binary files")
        else:
            documents.append(read_file(source))
            try:
                documents[-1].decode()
            except UnicodeDecodeError as error:
                raise Failure(f"{source}: not UTF-8 text, see byte {error.start}") from None
    return [data for data in documents if data], sources[0] if len(sources) == 1 else f"{len(sources)} sources"


def split(documents):
    """Cut the documents' bytes at 90 %: (documents for training, documents for validation), as strings."""
    room = sum(map(len, documents)) * 9 // 10
    train, val = [], []
    for data in documents:
        end = here = min(room, len(data))
        while 0 < end < len(data) and data[end] & 0xC0 == 0x80:     # inside a character
            end -= 1
        room -= here
        train.append(data[:end].decode())
        val.append(data[end:].decode())
    return list(filter(None, train)), list(filter(None, val))


# ----------------------------------------------------------------------------------------------------------------
# Writing

def little_endian(values):
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def header(*values):
    return struct.pack("<256i", *values, *[0] * (256 - len(values)))


def fingerprint(data):
    """FNV-1a, by which train_gpt knows a tokenizer.bin."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def token_file(ids, tokenizer):
    """The contents of train.bin or val.bin, in parts; tokenizer: those of tokenizer.bin."""
    mark = struct.pack("<Q", fingerprint(b"".join(tokenizer)))
    return [header(TOKENS_MAGIC, TOKENS_VERSION, len(ids), *struct.unpack("<2i", mark)), little_endian(ids)]


def tokenizer_file(tokenizer):
    """The contents of tokenizer.bin, in parts."""
    tokens, ranges = tokenizer.tokens, [] if tokenizer.kind == BYTES else unicode_ranges()
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return [header(TOKENIZER_MAGIC, TOKENIZER_VERSION, tokenizer.kind, len(tokens), offsets[-1], len(ranges),
                   tokenizer.end_of_text),
            *(struct.pack("<3I", *span) for span in ranges),
            struct.pack(f"<{len(offsets)}I", *offsets),
            *tokens]


def write_files(folder, files):
    """Write {name: parts} so that, whatever happens, a name holds its old contents or all of the new.

    All go to temporary names first and are renamed only when the last one is safely on the disk."""
    names = {os.path.join(folder, name): parts for name, parts in files.items()}
    names = {os.path.realpath(path) if os.path.islink(path) else path: parts for path, parts in names.items()}
    temporary = {path: f"{path}.{os.getpid()}.tmp" for path in names}
    try:
        for path, parts in names.items():
            if os.path.isdir(path):
                raise Failure(f"cannot write {path}: it is a folder")
            with open(temporary[path], "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
        for path in names:
            os.replace(temporary[path], path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {reason(error)}") from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                os.remove(path)


class Progress:
    """Says on stderr how far long work has come; silent for the first second."""

    def __init__(self, what, total):
        self.what, self.total, self.before, self.shown = what, total, 0, False
        self.live = sys.stderr.isatty()     # a terminal has one line that changes, a log a line now and then
        self.next = time.monotonic() + 1

    def __call__(self, done):
        if time.monotonic() >= self.next:
            line = f"{self.what}: {100 * (self.before + done) // self.total} %"
            sys.stderr.write(f"\r{line}\x1b[K" if self.live else line + "\n")
            sys.stderr.flush()
            self.shown = True
            self.next = time.monotonic() + (0.2 if self.live else 10)

    def end(self):
        if self.shown and self.live:
            sys.stderr.write("\r\x1b[K")


def warn(message):
    print(f"prepare_data.py: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------
# The command

def parse_arguments(argv):
    def vocab_size(word):
        size = int(word)
        if not 257 <= size <= MAX_VOCAB:
            raise argparse.ArgumentTypeError(f"{size} is not from 257 to {MAX_VOCAB}")
        return size

    usage, examples = (__doc__ or "\n\n").split("\n\n")[:2]      # python -OO has none
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=usage, epilog="examples:\n" + examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="FILE_OR_FOLDER",
                        help="UTF-8 text; default: tiny Shakespeare, downloaded")
    parser.add_argument("--tokenizer", choices=("bytes", "bpe", "gpt2"), default="bpe",
                        help="single bytes, byte-pair encoding trained on the text, or GPT-2's (default: bpe)")
    parser.add_argument("--vocab-size", type=vocab_size, metavar="N",
                        help=f"tokens to train for bpe, 257 to {MAX_VOCAB} (default: {DEFAULT_VOCAB})")
    parser.add_argument("--vocab", metavar="FILE",
                        help="GPT-2's vocabulary: gpt2.tiktoken, or vocab.json or its folder; default: downloaded")
    parser.add_argument("--out", metavar="DIR", default="data",
                        help="where train.bin, val.bin and tokenizer.bin go (default: data)")
    options = parser.parse_args(argv)
    if options.vocab_size and options.tokenizer != "bpe":
        parser.error("--vocab-size goes with --tokenizer bpe")
    if options.vocab and options.tokenizer != "gpt2":
        parser.error("--vocab goes with --tokenizer gpt2")
    return options


def make_tokenizer(options, train):
    if options.tokenizer == "gpt2":
        return Tokenizer(GPT2, load_gpt2(options.vocab, options.out), 50256)
    if options.tokenizer == "bytes":
        return Tokenizer(BYTES, [bytes([b]) for b in range(256)])
    return Tokenizer(BPE, train_bpe("\n\n".join(train), options.vocab_size or DEFAULT_VOCAB))


def prepare(options):
    try:
        os.makedirs(options.out, exist_ok=True)
    except FileExistsError:
        raise Failure(f"{options.out}: not a folder") from None
    if not os.access(options.out, os.W_OK | os.X_OK):
        raise Failure(f"{options.out}: no permission to write in this folder")
    for name, magic in ("train.bin", TOKENS_MAGIC), ("val.bin", TOKENS_MAGIC), ("tokenizer.bin", TOKENIZER_MAGIC):
        path = os.path.join(options.out, name)
        if os.path.isfile(path) and os.path.getsize(path):
            with open(path, "rb") as file:
                if file.read(4) != struct.pack("<i", magic):
                    raise Failure(f"{path} is not of this program and would be replaced: give --out another folder")
    documents, name = read_sources(options.sources) if options.sources else default_text(options.out)
    size = sum(map(len, documents))
    if size < MIN_TEXT:
        raise Failure(f"{name}: {f'only {size} bytes of' if size else 'no'} text; at least {MIN_TEXT} bytes are "
                      "needed, a tenth of them for validation")
    train, val = split(documents)
    tokenizer = make_tokenizer(options, train)
    train_ids = tokenizer.encode_documents(train, len(documents) > 1)
    val_ids = tokenizer.encode_documents(val, len(documents) > 1)
    if len(val_ids) < 2:
        raise Failure(f"{name}: its last tenth is a single token, too little for validation; give more text")
    if len(train_ids) >= 1 << 31:
        raise Failure(f"{name}: {len(train_ids):,} tokens are more than a file can hold, 2,147,483,647")
    made = tokenizer_file(tokenizer)
    write_files(options.out, {"train.bin": token_file(train_ids, made), "val.bin": token_file(val_ids, made),
                              "tokenizer.bin": made})

    several = f"{len(documents):,} documents, " if len(documents) > 1 else ""
    count, wanted = len(tokenizer.tokens), options.vocab_size or DEFAULT_VOCAB
    early = f" (not {wanted:,}: no pair of tokens is left that occurs twice)"
    files = [os.path.join(options.out, name) for name in ("train.bin", "val.bin", "tokenizer.bin")]
    print(f"text        {name}, {several}{size:,} bytes")
    print(f"tokenizer   {options.tokenizer}, {count:,} tokens"
          + (early if tokenizer.kind == BPE and count < wanted else ""))
    print(f"tokens      {len(train_ids):,} for training, {len(val_ids):,} for validation, "
          f"{size / (len(train_ids) + len(val_ids)):.2f} bytes per token")
    print(f"written     {', '.join(files)}", flush=True)


def main(argv=None):
    for stream in sys.stdout, sys.stderr:   # a file's name need not be text
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        prepare(parse_arguments(argv))
        return 0
    except Failure as error:
        warn(error)
    except OSError as error:
        warn(f"{error.filename}: {reason(error)}" if error.filename else reason(error))
    except MemoryError:
        warn("not enough memory for this text")
    except KeyboardInterrupt:
        warn("interrupted")
        return 130
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # an exit cleans up, the default does not
    sys.exit(main())
