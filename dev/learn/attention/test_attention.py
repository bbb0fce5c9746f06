#!/usr/bin/env python3
"""The checks of attention.py: results against plain NumPy in float64, gradients against finite differences of that,
and what is said of wrong arguments, by the module and, where it is passed by, by the library itself."""

import ctypes
import math
import re
import sys

try:
    import numpy as np
except ImportError:
    print(f"skipped: attention.py's checks; {sys.executable} has no numpy")
    print("0 passed, 0 failed, 1 skipped")
    sys.exit(0)

import attention as A

passed = failed = 0


def check(condition, what):
    global passed, failed
    if condition:
        passed += 1
    else:
        failed += 1
        print(f"  FAILED: {what}")


rng = np.random.default_rng(1)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def error(got, want):
    return np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The mechanisms in float64, written for this test


def score(kind, q, k, W=None, W_q=None, W_k=None, v_a=None, beta=1.0, bias=0.0):
    if kind == "dot":
        s = q @ k.T
    elif kind == "scaled_dot":
        s = q @ k.T / math.sqrt(k.shape[1])
    elif kind == "general":
        s = q @ W @ k.T
    elif kind == "additive":
        s = np.tanh((q @ W_q)[:, None] + (k @ W_k)[None]) @ v_a
    elif kind == "concat":
        s = np.tanh((q @ W[: q.shape[1]])[:, None] + (k @ W[q.shape[1]:])[None]) @ v_a
    elif kind == "cosine":
        s = beta * (q @ k.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=1)
    elif kind == "location":
        s = (q @ W)[:, : len(k)]
    return s + bias


def softmax(s, mask):
    e = np.where(mask, np.exp(np.minimum(s, 300)), 0)
    total = e.sum(-1, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total > 0)


def table(mask, m, n):
    i, j = np.arange(m)[:, None], np.arange(n)
    if mask is None:
        return np.ones((m, n), bool)
    if isinstance(mask, str):
        return j <= i
    return abs(i - j) <= mask[1] if isinstance(mask, tuple) else mask


def plain_attention(q, k, v, score_name="scaled_dot", mask=None, **parameters):
    return softmax(score(score_name, q, k, **parameters), table(mask, len(q), len(k))) @ v


def plain_heads(q, k, v, W_q, W_k, W_v, W_o, mask=None, bias=None):
    zeros = np.zeros(len(W_q)) if bias is None else bias
    return sum(plain_attention(q @ a, k @ b, v @ c, "scaled_dot", mask, bias=x) @ o
               for a, b, c, o, x in zip(W_q, W_k, W_v, W_o, zeros))


def plain_local(q, k, v, W_p, v_p, D, **parameters):
    centers = (len(k) - 1) / (1 + np.exp(-np.tanh(q @ W_p) @ v_p))
    distance = np.arange(len(k)) - centers[:, None]
    return softmax(score("general", q, k, **parameters), abs(distance) <= D) * np.exp(-2 * distance**2 / D**2) @ v


def plain_linear(q, k, v, causal=False):
    a, b = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    similarity = a @ b.T * table("causal" if causal else None, len(q), len(k))
    return similarity @ v / similarity.sum(1, keepdims=True)


def compare(what, plain, function, backward, arrays, *rest, **options):
    """arrays: the arguments that have a gradient, by name; plain is given float64 copies of them."""
    out = function(**arrays, **options)[0]
    exact = {name: x.astype(np.float64) for name, x in arrays.items()}
    want = plain(**exact, **options)
    check(out.dtype == np.float32 and error(out, want) < 1e-6, f"{what}: {error(out, want):.2g}")
    dout = normal(*out.shape)
    d = backward(dout, **arrays, **options)
    for name, x in exact.items():
        numeric = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            before, e = x[at], 1e-5
            x[at] = before + e
            above = (plain(**exact, **options) * dout).sum()
            x[at] = before - e
            numeric[at] = (above - (plain(**exact, **options) * dout).sum()) / (2 * e)
            x[at] = before
        check(d[name].shape == x.shape and error(d[name], numeric) < 1e-5,
              f"{what}: gradient of {name}: {error(d[name], numeric):.2g}")


def check_results():
    m, n, dq, dk, dv, h = 4, 6, 3, 5, 2, 7
    own = {"general": {"W": (dq, dk)}, "additive": {"W_q": (dq, h), "W_k": (dk, h), "v_a": (h,)},
           "concat": {"W": (dq + dk, h), "v_a": (h,)}, "cosine": {"beta": (1,)}, "location": {"W": (dq, h)}}
    seen = rng.random((m, n)) < 0.6
    seen[1] = False
    for kind in A.SCORES:
        for mask in (None, "causal", ("window", 1), seen):
            arrays = {"q": normal(m, dk if kind in ("dot", "scaled_dot", "cosine") else dq), "k": normal(n, dk)}
            arrays["v"] = normal(n, dv)
            arrays.update({name: normal(*shape) for name, shape in own.get(kind, {}).items()}, bias=normal(m, n))

            def plain(q, k, v, kind=kind, mask=mask, **p):
                return plain_attention(q, k, v, kind, mask, **p)

            def call(kind=kind, mask=mask, **x):
                return A.attention(score=kind, mask=mask, **x)

            def back(dout, kind=kind, mask=mask, **x):
                return A.attention_backward(dout, score=kind, mask=mask, **x)

            compare(f"{kind}, mask {mask if mask is not seen else 'array'}", plain, call, back, arrays)
            if mask is seen:
                out, weights = call(**arrays)
                check(not out[1].any() and not weights[1].any(), f"{kind}: a query that sees nothing gets 0")

    arrays = {"q": normal(4, 3), "k": normal(5, 2), "v": normal(5, 6), "W_q": normal(2, 3, 4), "W_k": normal(2, 2, 4)}
    arrays.update(W_v=normal(2, 6, 4), W_o=normal(2, 4, 3), bias=normal(2, 4, 5))
    compare("heads", plain_heads, A.multi_head_attention, A.multi_head_attention_backward, arrays, mask="causal")
    del arrays["bias"]
    compare("heads, no bias", plain_heads, A.multi_head_attention, A.multi_head_attention_backward, arrays)

    arrays = {"q": normal(4, 3), "k": normal(7, 2), "v": normal(7, 5), "W_p": normal(3, 4), "v_p": normal(4)}
    arrays["W"] = normal(3, 2)
    compare("local-p", plain_local, A.local_attention, A.local_attention_backward, arrays, D=2)
    del arrays["W_p"], arrays["v_p"]
    compare("local-m", lambda D, **x: plain_attention(mask=("window", D), score_name="general", **x), A.local_attention,
            A.local_attention_backward, arrays, D=2)

    for mask in (None, "causal", ("window", 3)):
        arrays = {"q": normal(35, 3), "k": normal(38, 3), "v": normal(38, 2)}
        compare(f"flash, {mask}", plain_attention, A.flash_attention, A.flash_attention_backward, arrays, mask=mask)
    for m, n, causal in ((4, 7, False), (6, 6, True), (3, 5, True)):
        arrays = {"q": normal(m, 3), "k": normal(n, 3), "v": normal(n, 2)}
        compare("linear", plain_linear, A.linear_attention, A.linear_attention_backward, arrays, causal=causal)

    # What attention.py promises of arguments: lists, other types, views.
    x = normal(5, 8)
    want = A.attention(x[:, ::2].copy(), x[:, ::2].copy(), x.copy())[0]
    check((A.attention(x[:, ::2].astype(np.float64), x[:, ::2], x.tolist())[0] == want).all(), "views, lists, float64")


# ----------------------------------------------------------------------------------------------------------------------
# Wrong arguments


def refused(expected, function, *arguments, **options):
    """Raises a ValueError that says this."""
    try:
        function(*arguments, **options)
        check(False, f"accepted: {expected}")
    except ValueError as e:
        check(re.search(expected, str(e)), f"'{e}' does not say '{expected}'")


def check_refusals():
    q, k, v = normal(4, 3), normal(6, 3), normal(6, 2)
    a = A.attention
    refused(r"k has shape \(6, 4\), expected \(n, 3\)", a, q, normal(6, 4), v)
    refused(r"v has shape \(5, 2\), expected \(6, dv\)", a, q, k, normal(5, 2))
    refused(r"q has shape \(4,\), expected \(m, dq\)", a, normal(4), k, v)
    refused(r"q has shape \(0, 3\); every size", a, normal(0, 3), k, v)
    refused(r"q has shape \(\), expected", a, 1.0, k, v)
    refused("q is no array of numbers", a, [["x", "y", "z"]], k, v)
    refused("q is no array of numbers", a, q + 1j, k, v)
    refused("q is no array of numbers", a, [[1, 2, 3], [1]], k, v)
    refused("score is 'softmax', expected one of dot", a, q, k, v, score="softmax")
    refused("score is 3, expected one of dot", a, q, k, v, score=3)
    refused("'general' needs W", a, q, k, v, score="general")
    refused("'scaled_dot' has no parameter W", a, q, k, v, W=normal(3, 3))
    refused("'additive' needs v_a", a, q, k, v, score="additive", W_q=normal(3, 5), W_k=normal(3, 5))
    refused(r"W has shape \(3, 4\), expected \(3, 3\)", a, q, k, v, score="general", W=normal(3, 4))
    refused(r"W has shape \(5, 4\), expected \(6, h\)", a, q, k, v, score="concat", W=normal(5, 4), v_a=normal(4))
    refused(r"v_a has shape \(3,\), expected \(4,\)", a, q, k, v, score="concat", W=normal(6, 4), v_a=normal(3))
    refused(r"W_k has shape \(3, 4\), expected \(3, 5\)", a, q, k, v, score="additive", W_q=normal(3, 5),
            W_k=normal(3, 4), v_a=normal(5))
    refused(r"W has shape \(3, 5\), expected \(3, h\) with h >= 6", a, q, k, v, score="location", W=normal(3, 5))
    refused(r"beta has shape \(2,\), expected \(1,\)", a, q, k, v, score="cosine", beta=[1, 2])
    refused(r"bias has shape \(6, 4\), expected \(4, 6\)", a, q, k, v, bias=normal(6, 4))
    refused(r"mask has shape \(6, 4\), expected \(4, 6\)", a, q, k, v, mask=np.ones((6, 4), bool))
    refused("mask is 'future', expected None", a, q, k, v, mask="future")
    refused("mask is .*expected None", a, q, k, v, mask=normal(4, 6))
    refused("mask is .*a window's width", a, q, k, v, mask=("window", -1))
    refused("mask is .*a window's width", a, q, k, v, mask=("window", 1.5))
    refused(r"dout has shape \(4, 3\), expected \(4, 2\)", A.attention_backward, normal(4, 3), q, k, v)
    W = dict(W_q=normal(2, 3, 5), W_k=normal(2, 3, 5), W_v=normal(2, 2, 5), W_o=normal(2, 5, 7))
    for name, shape, expected in (("W_q", (2, 4, 5), "heads, 3, D"), ("W_k", (3, 3, 5), "2, 3, 5"),
                                  ("W_v", (2, 3, 5), "2, 2, 5"), ("W_o", (2, 4, 7), "2, 5, dout")):
        refused(rf"{name} has shape \({str(shape)[1:-1]}\), expected \({expected}\)", A.multi_head_attention, q, k, v,
                **{**W, name: normal(*shape)})
    refused(r"bias has shape \(4, 6\), expected \(2, 4, 6\)", A.multi_head_attention, q, k, v, **W, bias=normal(4, 6))
    refused(r"dout has shape \(4, 2\), expected \(4, 7\)", A.multi_head_attention_backward, normal(4, 2), q, k, v, **W)
    refused(r"k has shape \(6, 4\), expected \(n, 3\)", A.flash_attention, q, normal(6, 4), v)
    refused(r"k has shape \(6, 4\), expected \(n, 3\)", A.linear_attention, q, normal(6, 4), v)
    refused(r"q has shape \(6, 3\), k \(4, 3\): causal", A.linear_attention, k, q, normal(4, 2), causal=True)
    refused("D is 0, expected an integer", A.local_attention, q, k, v, 0)
    refused("D is 1.5, expected an integer", A.local_attention, q, k, v, 1.5)
    refused("either both", A.local_attention, q, k, v, 1, W_p=normal(3, 4))
    refused(r"v_p has shape \(3,\), expected \(4,\)", A.local_attention, q, k, v, 1, W_p=normal(3, 4), v_p=normal(3),
            score="dot")


def check_library():
    """What attention.py would have refused: the library's codes and messages."""
    call, sizes = A._library.attn_attention, A._Sizes
    q, out = normal(4, 4), normal(4, 4)
    arrays = [x.ctypes.data_as(A._float_p) for x in (out, normal(4, 4), q, q, q)]
    before = out.copy()

    def refusal(code, expected, size, s=None, mask=None, arrays=arrays):
        out_, weights, q_, k_, v_ = arrays
        s, mask = s or A._Score(), mask or A._MaskChoice()
        got = call(out_, weights, ctypes.byref(size), q_, k_, v_, ctypes.byref(s), ctypes.byref(mask))
        said = A._library.attn_message().decode()
        check(got == code and re.search(expected, said), f"code {got}, '{said}'; expected {code}, '{expected}'")
        check((out == before).all(), "nothing is written")

    four = sizes(4, 4, 4, 4, 4)
    for at in range(5):
        wrong = [4] * 5
        wrong[at] = 0
        refusal(1, "at least 1", sizes(*wrong))
        wrong[at] = -1
        refusal(1, "at least 1", sizes(*wrong))
    refusal(1, r"weights \(1,65536,65536\): more than", sizes(65536, 65536, 1, 1, 1))
    refusal(1, r"q \(1,2147483647,2\): more than", sizes(2**31 - 1, 1, 2, 2, 1))
    refusal(1, "q of size 4 and k of size 3", sizes(4, 4, 4, 3, 4))
    refusal(2, "no score number 7", four, A._Score(kind=7))
    refusal(2, "no score number -1", four, A._Score(kind=-1))
    refusal(2, "general: W is missing", four, A._Score(kind=2))
    refusal(2, "additive: v_a is missing", four, A._Score(kind=3, h=3))
    refusal(2, "additive: W_q or W_k is missing", four, A._Score(kind=3, h=3, v_a=arrays[0]))
    refusal(1, "W has 3 columns, fewer than the 4", four, A._Score(kind=6, h=3, W=arrays[0]))
    refusal(1, "at least 1", four, A._Score(kind=4, h=0, W=arrays[0], v_a=arrays[0]))
    refusal(2, "no mask number 5", four, mask=A._MaskChoice(5))
    refusal(2, "a mask's width of -2", four, mask=A._MaskChoice(2, -2))
    refusal(2, "the mask is missing", four, mask=A._MaskChoice(4))
    refusal(2, r"number 4 of \(out, weights, size, q, k, v, score, choice\) is a null pointer", four,
            arrays=arrays[:2] + [None] + arrays[3:])
    byref = ctypes.byref
    for name in ("attn_flash", "attn_linear"):
        last = byref(A._MaskChoice()) if name == "attn_flash" else 0
        code = getattr(A._library, name)(*arrays[:2], byref(sizes(4, 4, 4, 3, 4)), *arrays[2:], last)
        check(code == 1, f"{name}: sizes that differ")
    code = A._library.attn_linear(*arrays[:2], byref(sizes(4, 3, 4, 4, 4)), *arrays[2:], 1)
    check(code == 1, "causal, more queries than keys")
    check((out == before).all(), "nothing is written")


check_results()
check_refusals()
check_library()
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
