#!/usr/bin/env python3
"""Writes model.safetensors beside a pytorch_model.bin, for train_gpt --init.

    build/venv/bin/python dev/check/to_safetensors.py FOLDER [or its pytorch_model.bin]

or beside its parts, pytorch_model-00001-of-00002.bin and so on.

Needs torch and safetensors. A pytorch_model.bin is a Python pickle, which may run any program when it is read; it is
read here so that only tensors come of it, which torch 1.13 and later can.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file

if len(sys.argv) != 2:
    sys.exit(__doc__)
path = pathlib.Path(sys.argv[1])
if path.is_dir():
    path = path / "pytorch_model.bin"
parts = sorted(path.parent.glob("pytorch_model-*-of-*.bin"))
tensors = {}
for part in parts if path in parts or not path.exists() else [path]:
    tensors.update(torch.load(part, map_location="cpu", weights_only=True))
if not tensors:
    sys.exit(f"{path} is not there")
# The head is the token embedding again and shares its memory, which safetensors does not take.
tensors = {name: x.contiguous() for name, x in tensors.items() if name != "lm_head.weight"}
save_file(tensors, path.with_name("model.safetensors"), metadata={"format": "pt"})
print(path.with_name("model.safetensors"))
