#!/usr/bin/env python3
"""What PyTorch computes, for dev/learn/attention/test_vision.c: the attention mechanisms of vision and their gradients.

    python3 dev/check/vision_reference.py [--seed N] [--out DIR]       default: dev/check/fixtures/attention/

Written with conv2d, pooling and softmax on (batch,channels,side,side), where vision.h has matrices with a row for each
place; gradients by autograd. A case's parameters p0, p1 ... are in the order in which vision.h makes them. The file is
as tape_fixture.py says. Needs torch 1.13 or later.
"""

import torch
import torch.nn.functional as F

from tape_fixture import Fixture

fixture = Fixture("vision.txt", 3, __doc__)
write = fixture.write
B, S, C, R = 2, 6, 5, 3


def rounded(*shape, scale=1.0):
    """Random numbers that float32 holds exactly: both sides start from the same."""
    return (scale * torch.randn(*shape)).float().double().requires_grad_()


def picture(x, side):
    return x.reshape(B, side, side, -1).permute(0, 3, 1, 2)


def rows(x):
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def convolve(x, W, b, extent, stride, pad):
    kernel = W.reshape(extent, extent, x.shape[1], -1).permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, b.reshape(-1), stride, pad)


def channel_gates(x, p, summaries):
    """x (B,C,S,S) -> (B,C,1,1)"""
    return torch.sigmoid(sum(torch.relu(s @ p[0] + p[1]) @ p[2] + p[3] for s in summaries)).reshape(B, -1, 1, 1)


def channels(x, p):
    x = picture(x, S)
    return rows(x * channel_gates(x, p, [x.mean((2, 3))]))


def places(x, p):
    x = picture(x, S)
    low = torch.relu(convolve(x, p[0], p[1], 3, 2, 1))
    gates = torch.sigmoid(F.interpolate(convolve(low, p[2], p[3], 1, 1, 0), scale_factor=2, mode="nearest"))
    return rows(x * (1 + gates))


def both(x, p):
    x = picture(x, S)
    x = x * channel_gates(x, p, [x.mean((2, 3)), x.amax((2, 3))])
    summary = torch.stack([x.mean(1), x.amax(1)], 1)
    return rows(x * torch.sigmoid(convolve(summary, p[4], p[5], 7, 1, 3)))


def non_local(x, p):
    x = x.reshape(B, S * S, C)
    q, k, v = x @ p[0], x @ p[1], x @ p[2]
    weights = torch.softmax(q @ k.transpose(1, 2) / R**0.5, -1)
    return (x + weights @ v @ p[3]).reshape(-1, C)


WIDTH, HEADS, HIDDEN, CHANNELS, TOKENS, LAYERS = 4, 2, 6, 2, 10, 2
kept = []


def vit(x, p):
    p = iter(p)
    W, b, class_token, positions, gain, bias = (next(p) for _ in range(6))
    patches = rows(convolve(picture(x, S), W, b, 3, 2, 1)).reshape(B, TOKENS - 1, WIDTH)
    x = torch.cat([class_token.expand(B, 1, WIDTH), patches], 1) + positions
    for _ in range(LAYERS):
        g1, b1, g2, b2, W_q, W_k, W_v, W_o, W1, c1, W2, c2 = (next(p) for _ in range(12))
        h = F.layer_norm(x, (WIDTH,), g1.reshape(-1), b1.reshape(-1))
        q, k, v = ((h @ M).reshape(B, TOKENS, HEADS, -1).transpose(1, 2) for M in (W_q, W_k, W_v))
        weights = torch.softmax(q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5, -1)
        weights.retain_grad()
        kept.append(weights)
        x = x + (weights @ v).transpose(1, 2).reshape(B, TOKENS, WIDTH) @ W_o
        h = F.layer_norm(x, (WIDTH,), g2.reshape(-1), b2.reshape(-1))
        x = x + torch.relu(h @ W1 + c1) @ W2 + c2
    return F.layer_norm(x[:, 0], (WIDTH,), gain.reshape(-1), bias.reshape(-1))


def case(name, function, x, p):
    y = function(x, p)
    by = rounded(*y.shape)
    (y * by).sum().backward()
    for label, value in [("x", x), ("by", by), ("y", y), ("d.x", x.grad)]:
        write(f"{name}.{label}", value)
    for i, parameter in enumerate(p):
        write(f"{name}.p{i}", parameter)
        write(f"{name}.d.p{i}", parameter.grad)


gates = [rounded(C, R), rounded(1, R), rounded(R, C), rounded(1, C)]
case("channels", channels, rounded(B * S * S, C), gates)
case("places", places, rounded(B * S * S, C), [rounded(9 * C, R), rounded(1, R), rounded(R, 1), rounded(1, 1)])
gates = [rounded(C, R), rounded(1, R), rounded(R, C), rounded(1, C)]
case("both", both, rounded(B * S * S, C), gates + [rounded(98, 1), rounded(1, 1)])
case("non_local", non_local, rounded(B * S * S, C), [rounded(C, R), rounded(C, R), rounded(C, R), rounded(R, C)])
shapes = [(9 * CHANNELS, WIDTH), (1, WIDTH), (1, WIDTH), (TOKENS, WIDTH), (1, WIDTH), (1, WIDTH)]
shapes += ([(1, WIDTH)] * 4 + [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN), (1, HIDDEN), (HIDDEN, WIDTH), (1, WIDTH)]) * 2
case("vit", vit, rounded(B * S * S, CHANNELS), [rounded(*shape, scale=0.5) for shape in shapes])

eye, rollout, weighted = torch.eye(TOKENS), torch.eye(TOKENS), torch.eye(TOKENS)
for weights in kept:
    rollout = (0.5 * eye + 0.5 * weights.mean(1)) @ rollout
    weighted = (eye + (weights * weights.grad).clamp(min=0).mean(1)) @ weighted
write("vit.rollout", rollout)
write("vit.weighted", weighted)

fixture.save()
