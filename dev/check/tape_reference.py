#!/usr/bin/env python3
"""What PyTorch computes, for dev/learn/attention/test_tape.c: GRU, LSTM, and ten AdamW steps of a small network.

    python3 dev/check/tape_reference.py [--seed N] [--out DIR]         default: dev/check/fixtures/attention/

tape_fixture.py says what the file looks like. Weights are stored [in,out]. Needs torch 1.13 or later.
"""

import torch

from tape_fixture import Fixture

fixture = Fixture("tape.txt", 1, __doc__)
rounded, write = fixture.rounded, fixture.write
B, T, IN, N = 3, 5, 7, 6


def recurrent(prefix, layer, cell):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * rounded(*p.shape))
        if cell:  # the C code has one bias
            layer.bias_hh_l0.zero_()
    x, h0, c0, weights = rounded(T, B, IN), rounded(1, B, N), rounded(1, B, N), rounded(T, B, N)
    for v in (x, h0, c0):
        v.requires_grad_()
    states, _ = layer(x, (h0, c0) if cell else h0)
    (states * weights).sum().backward()
    tensors = {"x": x, "h0": h0, "W": layer.weight_ih_l0, "U": layer.weight_hh_l0, "b": layer.bias_ih_l0}
    tensors["c0" if cell else "c"] = c0 if cell else layer.bias_hh_l0
    for name, v in tensors.items():
        turn = (lambda m: m.t()) if name in "WU" else (lambda m: m)
        write(f"{prefix}.{name}", turn(v))
        write(f"d.{prefix}.{name}", turn(v.grad))
    write(f"{prefix}.states", states)
    write(f"{prefix}.weights", weights)


def network():
    x, targets = rounded(9, 5), torch.tensor([0, 3, -1, 2, 2, 1, 0, 3, 1])
    p = {"W1": rounded(5, 8), "b1": rounded(8), "gain": rounded(8), "bias": rounded(8), "W2": rounded(8, 4)}
    write("net.x", x)
    write("net.targets", targets.double())
    for name, v in p.items():
        write(f"net.{name}", v)
        v.requires_grad_()
    decayed, others = [p["W1"], p["W2"]], [p["b1"], p["gain"], p["bias"]]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.02)
    losses, lengths = [], []
    for _ in range(10):
        h = torch.relu(x @ p["W1"] + p["b1"])
        h = torch.nn.functional.layer_norm(h, (8,), p["gain"], p["bias"], 1e-5)
        loss = torch.nn.functional.cross_entropy(h @ p["W2"], targets, ignore_index=-1)
        adamw.zero_grad()
        loss.backward()
        losses.append(loss.item())
        length = torch.sqrt(sum((v.grad**2).sum() for v in p.values()))
        lengths.append(length.item())
        for v in p.values():
            v.grad *= min(1.0, 0.5 / length.item())
        adamw.step()
    write("net.losses", torch.tensor(losses))
    write("net.lengths", torch.tensor(lengths))
    for name, v in p.items():
        write(f"after.{name}", v)


recurrent("gru", torch.nn.GRU(IN, N), cell=False)
recurrent("lstm", torch.nn.LSTM(IN, N), cell=True)
network()
fixture.save()
