#!/usr/bin/env python3
"""stir_weights.py: move every weight of model directories away from its initial value, for tests of small models.

    python3 scripts/stir_weights.py DIRECTORY...

rewrites DIRECTORY/model.safetensors (of an export: a checkpoint would no longer have its checksums), so that no gain is
1, no bias 0, no recurrent matrix 0 and no two heads alike, and the input gates of xLSTM, which start closed, are open.
The numbers depend on the directory's name alone.
"""

import pathlib
import sys
import zlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def stir(directory):
    path = directory / "model.safetensors"
    generator = torch.Generator().manual_seed(zlib.crc32(directory.name.encode()))
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        tensor.add_(0.1 * noise * (1 + tensor.abs()))
        if "igate_preact.bias" in name:
            tensor.add_(11)
    save_file(tensors, path, metadata)


def main():
    if len(sys.argv) < 2:
        print("usage: stir_weights.py DIRECTORY...", file=sys.stderr)
        return 2
    for directory in sys.argv[1:]:
        stir(pathlib.Path(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
