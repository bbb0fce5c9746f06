"""What tape_reference.py, vision_reference.py and nodes_reference.py have in common: options, numbers, the file.

A fixture is text, read by dev/learn/attention/check.h: for each tensor a line "name rows cols", then its numbers, of
which nine digits are enough to give every float32 back. Everything is computed in float64.
"""

import argparse
import pathlib

import torch


class Fixture:
    def __init__(self, file, seed, description):
        parser = argparse.ArgumentParser(description=description.splitlines()[0])
        parser.add_argument("--seed", type=int, default=seed, metavar="N", help=f"of the random numbers, default: {seed}")
        folder = pathlib.Path(__file__).resolve().parent / "fixtures" / "attention"
        parser.add_argument("--out", default=folder, type=pathlib.Path, metavar="DIR", help=f"for {file}")
        options = parser.parse_args()
        torch.manual_seed(options.seed)
        torch.set_default_dtype(torch.float64)
        self.path, self.seed, self.lines = options.out / file, options.seed, []

    @staticmethod
    def rounded(*shape):
        """Random numbers that float32 holds exactly: both sides start from the same."""
        return torch.randn(shape).float().double()

    def write(self, name, x):
        x = x.detach().double()
        x = x.reshape(1, -1) if x.dim() < 2 else x.reshape(-1, x.shape[-1])
        self.lines.append(f"{name} {x.shape[0]} {x.shape[1]}")
        self.lines.extend(" ".join(f"{v:.9g}" for v in row.tolist()) for row in x)

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines) + "\n")
