"""Merges checkpoints with the authors' own functions, taken from a checkout of their repository and called unchanged.

    authors.py METHOD CHECKOUT BASE OUT TUNED...

METHOD is `tsv-m` (github.com/AntoAndGar/task_singular_vectors) or `iso-c` (github.com/danielm1405/iso-merging). Checkpoints are safetensors;
the merged one is written to OUT. Needs torch, safetensors and packaging. Nothing of the checkouts is kept here.
"""

import importlib.util
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

FUNCTIONS = {
    "tsv-m": ("src/utils/TSVM_utils.py", "compute_and_sum_svd_mem_reduction"),
    "iso-c": ("src/utils/iso.py", "iso_c"),
}


def main():
    method, checkout, base_path, out, *tuned = sys.argv[1:]
    file, name = FUNCTIONS[method]
    spec = importlib.util.spec_from_file_location("authors", f"{checkout}/{file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    base = load_file(base_path)
    vectors = []
    for path in tuned:
        checkpoint = load_file(path)
        vectors.append(SimpleNamespace(vector={key: checkpoint[key] - base[key] for key in base}))
    config = SimpleNamespace(DATASETS=[str(i) for i in range(len(tuned))], device="cpu")
    merged = getattr(module, name)(vectors, config)
    save_file({key: (base[key] + merged[key]).contiguous() for key in base}, out)


main()
