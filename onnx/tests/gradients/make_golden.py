#!/usr/bin/env python3
"""Gradients of tiny models as PyTorch's autograd computes them.

    python make_golden.py FOLDER [FAMILY ...]

FOLDER holds the ONNX exports of tiny random models with the script that made them (`make_fixtures.py`, which builds the
PyTorch models; nothing is downloaded), and per family `perturbed.safetensors` and `<graph>.io.safetensors`.

The loss of a graph is the sum over its outputs y of mean(y²), at the perturbed weights and the stored inputs, computed in
float64 (sam2_meta, whose code insists on it: float32). Written to golden.json beside this script, per graph: the loss, and for every tensor of the checkpoint (buffers as well) that has a gradient g its
norm, eight sums Σ ±g, and all values where there are at most 32. The sign of element i (row-major) in sum j is the
highest bit of splitmix64(j · 2³² + i), set: minus.

Made with Python 3.11, torch 2.15.0, transformers 5.24.0, timm 1.0.31, open_clip_torch 3.3.0, sam2 1.1.0 (PyPI; its modeling
files are those of github.com/facebookresearch/sam2 at 2b90b9f).
"""
import importlib.util, json, os, sys
import numpy as np, torch
from safetensors.torch import load_file

SUMS, FULL = 8, 32
folder, families = sys.argv[1], sys.argv[2:]
spec = importlib.util.spec_from_file_location('make_fixtures', os.path.join(folder, 'make_fixtures.py'))
make = importlib.util.module_from_spec(spec); spec.loader.exec_module(make)
here = os.path.dirname(os.path.abspath(__file__))
path = os.path.join(here, 'golden.json')
golden = json.load(open(path)) if os.path.exists(path) else {}


def signs(j, n):
    with np.errstate(over='ignore'):
        z = np.uint64(j << 32) + np.arange(n, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z >> np.uint64(63), -1.0, 1.0)


def summary(g):
    g = g.detach().double().numpy().ravel()
    out = {'norm': float(np.linalg.norm(g)), 'sums': [float(g @ signs(j, g.size)) for j in range(SUMS)]}
    if g.size <= FULL: out['values'] = g.tolist()
    return out


def fixture(name, model, graphs, note):
    dtype = torch.float32 if name == 'sam2_meta' else torch.float64
    double = lambda x: x.to(dtype) if x.dtype.is_floating_point else x
    model = model.to(dtype)
    model.load_state_dict({k: double(v) for k, v in load_file(f'{folder}/{name}/perturbed.safetensors').items()})
    tensors = dict(model.named_parameters(remove_duplicate=False))
    stored = model.state_dict()
    tensors |= {n: b for n, b in model.named_buffers() if n in stored and b.dtype.is_floating_point}
    for t in tensors.values(): t.requires_grad_(True)
    for graph, (forward, inputs, names, outputs, _) in graphs.items():
        io = load_file(f'{folder}/{name}/{graph}.io.safetensors')
        for t in tensors.values(): t.grad = None
        y = forward(model, *[double(io[f'input.{n}']) for n in names])
        y = y if isinstance(y, (tuple, list)) else (y,)
        for n, v in zip(outputs, y):
            e = (v - io[f'perturbed.{n}']).abs().max() / v.abs().max()
            assert e < 1e-4, (name, graph, n, e)
        loss = sum(v.double().pow(2).mean() for v in y)
        loss.backward()
        summaries = {n: summary(t.grad) for n, t in sorted(tensors.items()) if t.grad is not None}
        golden[f'{name}/{graph}'] = {'loss': float(loss), 'tensors': summaries}
        print(name, graph, float(loss), len(summaries), flush=True)


def with_gradients():
    """transformers computes image embeddings of SAM 2 under no_grad"""
    from transformers import Sam2Model
    method = Sam2Model.get_image_embeddings
    Sam2Model.get_image_embeddings = getattr(method, '__wrapped__', method)


make.fixture = fixture
with_gradients()
torch.set_default_dtype(torch.float32)
for family in families or make.ALL:
    make.G.manual_seed(make.SEED_INPUT)
    make.ALL[family]()
with open(path, 'w') as f:
    json.dump(golden, f, separators=(',', ':'), sort_keys=True); f.write('\n')
