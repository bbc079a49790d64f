"""Makes PyTorch files of the head of the quickstart's digits, as the task-vector literature stores heads.

Usage: python make_golden.py pipelines/quickstart/head_digits.safetensors
Made with Python 3.11, torch 2.15.0, safetensors 0.8.0.
"""

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
tensors = load_file(sys.argv[1])
weight, bias = tensors["weight"].float(), tensors["bias"].float()

# The module that whole heads are pickled from (`src.heads` of task_vectors and its descendants).
heads = types.ModuleType("src.heads")


class ClassificationHead(torch.nn.Linear):
    def __init__(self, normalize, weights, biases):
        super().__init__(weights.shape[1], weights.shape[0])
        self.normalize = normalize
        self.weight = torch.nn.Parameter(weights.clone())
        self.bias = torch.nn.Parameter(biases.clone())


ClassificationHead.__module__ = "src.heads"
heads.ClassificationHead = ClassificationHead
sys.modules["src"], sys.modules["src.heads"] = types.ModuleType("src"), heads

torch.save(ClassificationHead(True, weight, bias), HERE / "module.pt")
torch.save({"weight": weight, "bias": bias}, HERE / "state_dict.pt")
torch.save(weight, HERE / "tensor.pt")
