"""The attention mechanisms of attention.h, called from Python: build them with `make attention_lib`.

    >>> import numpy as np, attention
    >>> keys = np.array([[0, 1, 1], [5, 0, 1], [1, 1, 0], [0, 5, 1]])
    >>> out, weights = attention.attention([[10, 5, 10]], keys, keys, score="dot")
    >>> out.round(3)
    array([[5., 0., 1.]], dtype=float32)

m queries q (m,dq) look into n pairs of key k (n,dk) and value v (n,dv). Arrays may be anything that NumPy converts to
float32; results are new float32 arrays. A wrong shape is a ValueError that names the array and its shape. For each
mechanism there is a function X and X_backward(dout, ...) with the same arguments after dout, the loss's gradient by
X's first result; it returns the gradients by name: {"q": (m,dq), "k": ..., "v": ..., and one for each parameter}.

score is one of, with its parameters as keywords:

    "dot"         q . k                           dq = dk
    "scaled_dot"  q . k / sqrt(dk)                dq = dk
    "general"     q^T W k                         W (dq,dk)
    "additive"    v_a . tanh(W_q^T q + W_k^T k)   W_q (dq,h), W_k (dk,h), v_a (h)
    "concat"      v_a . tanh(W^T [q; k])          W (dq + dk,h), v_a (h)
    "cosine"      beta q . k / (|q| |k|)          dq = dk; beta (1), if not given: 1
    "location"    (W^T q)_j                       W (dq,h) with h >= n: the keys themselves are not looked at

and bias (m,n), added to any of them, if given. mask is one of

    None            every query sees every key
    "causal"        query i sees keys 0..i
    ("window", w)   query i sees keys i - w..i + w
    an array        boolean (m,n): True where query i sees key j

A query that sees nothing gets weights 0 and output 0. Needs numpy; ATTENTION_LIB names another library file.
"""

import ctypes
import os
import pathlib

import numpy as np

__all__ = ["attention", "attention_backward", "multi_head_attention", "multi_head_attention_backward",
           "flash_attention", "flash_attention_backward", "linear_attention", "linear_attention_backward",
           "local_attention", "local_attention_backward"]

SCORES = ("dot", "scaled_dot", "general", "additive", "concat", "cosine", "location")
PARAMETERS = {"general": ("W",), "additive": ("W_q", "W_k", "v_a"), "concat": ("W", "v_a"), "cosine": ("beta",),
              "location": ("W",)}

# ======================================================================================================================
# The library. The structures are those of attention.h and lib.c.

_float_p = ctypes.POINTER(ctypes.c_float)


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("m", "n", "dq", "dk", "dv")]


class _Score(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("h", ctypes.c_int),
                *((name, _float_p) for name in ("W", "W_q", "W_k", "v_a", "beta", "bias"))]


class _ScoreGradient(ctypes.Structure):
    _fields_ = [(name, _float_p) for name in ("W", "W_q", "W_k", "v_a", "beta")]


class _MaskChoice(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("argument", ctypes.c_int), ("table", ctypes.POINTER(ctypes.c_uint8))]


class _HeadSizes(ctypes.Structure):
    _fields_ = [("sizes", _Sizes), ("heads", ctypes.c_int), ("D", ctypes.c_int), ("dout", ctypes.c_int)]


class _Projections(ctypes.Structure):
    _fields_ = [(name, _float_p) for name in ("W_q", "W_k", "W_v", "W_o")]


class _Local(ctypes.Structure):
    _fields_ = [("D", ctypes.c_int), ("h", ctypes.c_int), ("W_p", _float_p), ("v_p", _float_p)]


def _load():
    path = pathlib.Path(__file__).resolve().parents[3] / "build" / "attention" / "libattention.so"
    path = pathlib.Path(os.environ.get("ATTENTION_LIB", path))
    if not path.exists():
        raise ImportError(f"{path} is not there; `make attention_lib` builds it")
    library = ctypes.CDLL(str(path))
    library.attn_message.restype = ctypes.c_char_p
    return library


_library = _load()


def _call(name, *arguments):
    """Calls attn_NAME. Arrays and structures go as pointers, None as a null pointer."""
    def as_argument(x):
        if isinstance(x, np.ndarray):
            return x.ctypes.data_as(_float_p)
        return ctypes.byref(x) if isinstance(x, ctypes.Structure) else x

    code = getattr(_library, "attn_" + name)(*map(as_argument, arguments))
    if code:
        message = f"{name}: {_library.attn_message().decode()}"
        raise MemoryError(message) if code == 3 else ValueError(message)


# ======================================================================================================================
# Arguments


def _array(name, x, *shape):
    """x as float32, of this shape; a letter stands for any size, and the same letter for the same size.

    shape has integers and strings; returns the array."""
    try:
        if np.iscomplexobj(x):
            raise TypeError
        array = np.ascontiguousarray(x, dtype=np.float32) if np.ndim(x) else np.asarray(x, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is no array of numbers") from None
    fits = array.ndim == len(shape) and all(isinstance(s, str) or s == a for s, a in zip(shape, array.shape))
    if not fits:
        expected = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; every size must be at least 1")
    return array


def _pointer(array):
    return None if array is None else array.ctypes.data_as(_float_p)


def _qkv(q, k, v, same=False):
    q = _array("q", q, "m", "dq")
    k = _array("k", k, "n", q.shape[1] if same else "dk")
    v = _array("v", v, k.shape[0], "dv")
    return q, k, v, _Sizes(q.shape[0], k.shape[0], q.shape[1], k.shape[1], v.shape[1])


def _needs_same(score):
    if score not in SCORES:
        raise ValueError(f"score is {score!r}, expected one of {', '.join(SCORES)}")
    return score in ("dot", "scaled_dot", "cosine")


def _score(score, sizes, parameters):
    """The C structure, and the parameters by name, which must live as long as it."""
    known = (*PARAMETERS.get(score, ()), "bias")
    for name in parameters:
        if name not in known:
            raise ValueError(f"score {score!r} has no parameter {name}; it has {', '.join(known)}")
    given = {name: x for name, x in parameters.items() if x is not None}
    for name in PARAMETERS.get(score, ()):
        if name not in given and name != "beta":
            raise ValueError(f"score {score!r} needs {name}")
    shapes = {"W": {"general": (sizes.dq, sizes.dk), "concat": (sizes.dq + sizes.dk, "h")}.get(score, (sizes.dq, "h")),
              "W_q": (sizes.dq, "h"), "bias": (sizes.m, sizes.n)}
    arrays, h = {}, 0
    if "beta" in given:
        arrays["beta"] = _array("beta", np.reshape(given["beta"], -1), 1)
    for name in ("W", "W_q", "bias"):
        if name in given:
            arrays[name] = _array(name, given[name], *shapes[name])
    if score in ("additive", "concat", "location"):
        h = arrays["W_q" if score == "additive" else "W"].shape[1]
    if score == "location" and h < sizes.n:
        raise ValueError(f"W has shape {arrays['W'].shape}, expected ({sizes.dq}, h) with h >= {sizes.n}, the keys")
    if "W_k" in given:
        arrays["W_k"] = _array("W_k", given["W_k"], sizes.dk, h)
    if "v_a" in given:
        arrays["v_a"] = _array("v_a", given["v_a"], h)
    pointers = {name: _pointer(x) for name, x in arrays.items()}
    return _Score(kind=SCORES.index(score), h=h, **pointers), arrays


def _mask(mask, m, n):
    if mask is None:
        return _MaskChoice(), None
    if isinstance(mask, str) and mask == "causal":
        return _MaskChoice(1), None
    if isinstance(mask, tuple) and len(mask) == 2 and isinstance(mask[0], str) and mask[0] == "window":
        if not isinstance(mask[1], (int, np.integer)) or isinstance(mask[1], bool) or not 0 <= mask[1] < 2**31:
            raise ValueError(f"mask is {mask}; a window's width is an integer, at least 0")
        return _MaskChoice(2, int(mask[1])), None
    table = None if isinstance(mask, (str, tuple)) else np.asarray(mask)
    if table is None or table.dtype != bool:
        raise ValueError(f"mask is {mask!r:.60}, expected None, 'causal', ('window', w) or a boolean ({m}, {n}) array")
    if table.shape != (m, n):
        raise ValueError(f"mask has shape {table.shape}, expected ({m}, {n})")
    table = np.ascontiguousarray(table).astype(np.uint8)
    return _MaskChoice(4, 0, table.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))), table


def _empty(*shape):
    return np.empty(shape, np.float32)


def _zeros_like(arrays):
    return {name: np.zeros_like(x) for name, x in arrays.items()}


def _score_gradient(gradients):
    return _ScoreGradient(**{name: _pointer(x) for name, x in gradients.items() if name not in ("q", "k", "v", "bias")})


# ======================================================================================================================
# The mechanisms


def attention(q, k, v, score="scaled_dot", mask=None, **parameters):
    """softmax(mask(score(q, k))) v: q (m,dq), k (n,dk), v (n,dv) -> out (m,dv), weights (m,n).

    score, its parameters, and mask: see the module. ValueError for wrong shapes, names, or parameters."""
    q, k, v, sizes = _qkv(q, k, v, _needs_same(score))
    s, arrays = _score(score, sizes, parameters)
    choice, table = _mask(mask, sizes.m, sizes.n)
    out, weights = _empty(sizes.m, sizes.dv), _empty(sizes.m, sizes.n)
    _call("attention", out, weights, sizes, q, k, v, s, choice)
    return out, weights


def attention_backward(dout, q, k, v, score="scaled_dot", mask=None, **parameters):
    """dout (m,dv) -> {"q": (m,dq), "k": (n,dk), "v": (n,dv), "scores": (m,n), and each parameter given}."""
    _, weights = attention(q, k, v, score, mask, **parameters)
    q, k, v, sizes = _qkv(q, k, v, _needs_same(score))
    dout = _array("dout", dout, sizes.m, sizes.dv)
    s, arrays = _score(score, sizes, parameters)
    d, dscores = _zeros_like({"q": q, "k": k, "v": v, **arrays}), _empty(sizes.m, sizes.n)
    _call("attention_backward", d["q"], d["k"], d["v"], _score_gradient(d), dscores, dout, weights, sizes, q, k, v, s)
    d["scores"] = dscores
    if "bias" in d:
        d["bias"] = dscores.copy()
    return d


def _heads(q, k, v, W_q, W_k, W_v, W_o, bias):
    q, k, v, sizes = _qkv(q, k, v)
    W_q = _array("W_q", W_q, "heads", sizes.dq, "D")
    heads, _, D = W_q.shape
    W = {"W_q": W_q, "W_k": _array("W_k", W_k, heads, sizes.dk, D), "W_v": _array("W_v", W_v, heads, sizes.dv, D),
         "W_o": _array("W_o", W_o, heads, D, "dout")}
    bias = None if bias is None else _array("bias", bias, heads, sizes.m, sizes.n)
    return q, k, v, W, bias, _HeadSizes(sizes, heads, D, W["W_o"].shape[2])


def _projections(W):
    return _Projections(**{name: _pointer(W[name]) for name in ("W_q", "W_k", "W_v", "W_o")})


def multi_head_attention(q, k, v, W_q, W_k, W_v, W_o, mask=None, bias=None):
    """Heads of scaled dot product attention, joined by W_o -> out (m,dout), weights (heads,m,n).

    q (m,dq), k (n,dk), v (n,dv); W_q (heads,dq,D), W_k (heads,dk,D), W_v (heads,dv,D), W_o (heads,D,dout);
    bias (heads,m,n) is added to the scores, if given. From a torch.nn.MultiheadAttention with bias=False:

        W_q, W_k, W_v = in_proj_weight.reshape(3, heads, D, C).transpose(0, 1, 3, 2)
        W_o = out_proj.weight.T.reshape(heads, D, C)

    ValueError for wrong shapes."""
    q, k, v, W, bias, size = _heads(q, k, v, W_q, W_k, W_v, W_o, bias)
    choice, table = _mask(mask, size.sizes.m, size.sizes.n)
    out, weights = _empty(size.sizes.m, size.dout), _empty(size.heads, size.sizes.m, size.sizes.n)
    _call("multi_head", out, weights, size, q, k, v, _projections(W), bias, choice)
    return out, weights


def multi_head_attention_backward(dout, q, k, v, W_q, W_k, W_v, W_o, mask=None, bias=None):
    """dout (m,dout) -> {"q", "k", "v", "W_q", "W_k", "W_v", "W_o", "scores": (heads,m,n), and "bias" if given}."""
    q, k, v, W, bias, size = _heads(q, k, v, W_q, W_k, W_v, W_o, bias)
    choice, table = _mask(mask, size.sizes.m, size.sizes.n)
    dout = _array("dout", dout, size.sizes.m, size.dout)
    d, dscores = _zeros_like({"q": q, "k": k, "v": v, **W}), _empty(size.heads, size.sizes.m, size.sizes.n)
    _call("multi_head_backward", d["q"], d["k"], d["v"], _projections(d), dscores, dout, size, q, k, v,
          _projections(W), bias, choice)
    d["scores"] = dscores
    if bias is not None:
        d["bias"] = dscores.copy()
    return d


def local_attention(q, k, v, D, W_p=None, v_p=None, score="general", **parameters):
    """Luong's local attention -> out (m,dv), weights (m,n), centers (m): query i sees keys within D of its centre.

    Without W_p and v_p local-m: the centre is i. With W_p (dq,h), v_p (h) local-p: the centre is
    (n - 1) logistic(v_p . tanh(W_p^T q_i)), and weights are multiplied with a Gaussian around it of deviation D / 2.
    q (m,dq), k (n,dk), v (n,dv), D an integer, at least 1; score and parameters: see the module. ValueError for wrong
    shapes."""
    if _local_m(D, W_p, v_p):
        out, weights = attention(q, k, v, score, ("window", D), **parameters)
        return out, weights, np.arange(len(out), dtype=np.float32)
    return _local_forward(q, k, v, D, W_p, v_p, score, parameters)[:3]


def _local_m(D, W_p, v_p):
    if not isinstance(D, (int, np.integer)) or isinstance(D, bool) or not 1 <= D <= 2**15:
        raise ValueError(f"D is {D!r}, expected an integer from 1 to 32768")
    if (W_p is None) != (v_p is None):
        raise ValueError("W_p and v_p: either both are given, or neither")
    return W_p is None


def _local_forward(q, k, v, D, W_p, v_p, score, parameters):
    q, k, v, sizes = _qkv(q, k, v, _needs_same(score))
    s, arrays = _score(score, sizes, parameters)
    W_p = _array("W_p", W_p, sizes.dq, "h")
    v_p = _array("v_p", v_p, W_p.shape[1])
    local = _Local(int(D), W_p.shape[1], _pointer(W_p), _pointer(v_p))
    out, weights, aligned = _empty(sizes.m, sizes.dv), _empty(sizes.m, sizes.n), _empty(sizes.m, sizes.n)
    centers = _empty(sizes.m)
    _call("local", out, weights, aligned, centers, sizes, q, k, v, s, local)
    return out, weights, centers, aligned, (q, k, v, sizes, s, arrays, local, W_p, v_p)


def local_attention_backward(dout, q, k, v, D, W_p=None, v_p=None, score="general", **parameters):
    """dout (m,dv) -> {"q", "k", "v", "scores": (m,n), each parameter, and with local-p "W_p" and "v_p"}."""
    if _local_m(D, W_p, v_p):
        return attention_backward(dout, q, k, v, score, ("window", D), **parameters)
    _, weights, centers, aligned, inputs = _local_forward(q, k, v, D, W_p, v_p, score, parameters)
    q, k, v, sizes, s, arrays, local, W_p, v_p = inputs
    dout = _array("dout", dout, sizes.m, sizes.dv)
    d, dscores = _zeros_like({"q": q, "k": k, "v": v, **arrays}), _empty(sizes.m, sizes.n)
    gradient = _score_gradient(d)
    d.update(_zeros_like({"W_p": W_p, "v_p": v_p}))
    _call("local_backward", d["q"], d["k"], d["v"], gradient, d["W_p"], d["v_p"], dscores, dout, weights, aligned,
          centers, sizes, q, k, v, s, local)
    d["scores"] = dscores
    if "bias" in d:
        d["bias"] = dscores.copy()
    return d


def flash_attention(q, k, v, mask=None):
    """Scaled dot product attention without the (m,n) weights in memory -> out (m,dv), lse (m).

    q (m,dk), k (n,dk), v (n,dv); lse is the logarithm of the sum of e^score over the keys seen, -inf if there are none.
    Time m n (dk + dv), memory m + n. ValueError for wrong shapes."""
    q, k, v, sizes = _qkv(q, k, v, same=True)
    choice, table = _mask(mask, sizes.m, sizes.n)
    out, lse = _empty(sizes.m, sizes.dv), _empty(sizes.m)
    _call("flash", out, lse, sizes, q, k, v, choice)
    return out, lse


def flash_attention_backward(dout, q, k, v, mask=None):
    """dout (m,dv) -> {"q": (m,dk), "k": (n,dk), "v": (n,dv)}. The forward pass is run again."""
    out, lse = flash_attention(q, k, v, mask)
    q, k, v, sizes = _qkv(q, k, v, same=True)
    choice, table = _mask(mask, sizes.m, sizes.n)
    dout = _array("dout", dout, sizes.m, sizes.dv)
    d = _zeros_like({"q": q, "k": k, "v": v})
    _call("flash_backward", d["q"], d["k"], d["v"], dout, out, lse, sizes, q, k, v, choice)
    return d


def linear_attention(q, k, v, causal=False):
    """Similarity phi(q) . phi(k) with phi = elu + 1 in place of e^(q . k) -> out (m,dv), sums (m).

    q (m,dk), k (n,dk), v (n,dv); causal: query i sees keys 0..i, and m <= n. sums are what the weights are divided by.
    Time (m + n) dk dv, memory dk dv. ValueError for wrong shapes."""
    q, k, v, sizes = _qkv(q, k, v, same=True)
    if causal and sizes.m > sizes.n:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: causal, and no key for the last queries")
    out, sums = _empty(sizes.m, sizes.dv), _empty(sizes.m)
    _call("linear", out, sums, sizes, q, k, v, int(causal))
    return out, sums


def linear_attention_backward(dout, q, k, v, causal=False):
    """dout (m,dv) -> {"q": (m,dk), "k": (n,dk), "v": (n,dv)}. The forward pass is run again."""
    out, sums = linear_attention(q, k, v, causal)
    q, k, v, sizes = _qkv(q, k, v, same=True)
    dout = _array("dout", dout, sizes.m, sizes.dv)
    d = _zeros_like({"q": q, "k": k, "v": v})
    _call("linear_backward", d["q"], d["k"], d["v"], dout, out, sums, sizes, q, k, v, int(causal))
    return d
