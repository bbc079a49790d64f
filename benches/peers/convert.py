"""Writes safetensors checkpoints as torch state dicts, for peers that read nothing else: convert.py FOLDER BASE TUNED...

FOLDER gets `base.pt` and, per fine-tuned checkpoint, a file of its name with the ending `.pt`. Needs torch and safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

folder, base, *tuned = map(Path, sys.argv[1:])
for path in [base, *tuned]:
    torch.save(load_file(path), folder / f"{path.stem}.pt")
