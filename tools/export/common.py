"""What the export scripts share: the options that keep weights recognizable, a check against PyTorch, and the files that go with a graph."""

import json
import math
import os
from pathlib import Path

import numpy
import onnxruntime
import torch
from safetensors.torch import save_file

# nn.MultiheadAttention would take a fused operator that has no ONNX form.
torch.backends.mha.set_fastpath_enabled(False)

# The TorchScript exporter with constant folding: every weight stays in the graph as it is in the checkpoint, or transposed. The newer exporter
# computes some of SAM 2's weights into constants, which no longer follow when weights are exchanged.
OPTIONS = dict(dynamo=False, opset_version=17, do_constant_folding=True, verbose=False)

# Largest difference between ONNX Runtime and PyTorch, relative to the largest value.
TOLERANCE = 1e-4


class Wrapped(torch.nn.Module):
    """A forward pass of our own over a model, whose weights keep their names."""

    def __init__(self, model, forward):
        super().__init__()
        self.__dict__["model"] = model
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self.__dict__["model"], *inputs)


def export(model, forward, path, inputs, outputs, dynamic, check=None):
    """Writes a graph, and compares ONNX Runtime with PyTorch on the inputs of `check` (by default those of the export).

    `inputs` are example tensors by name, `outputs` are names, `dynamic` says which dimensions are free: {name: {axis: label}}.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = Wrapped(model, forward).eval()
    with torch.no_grad():
        torch.onnx.export(
            wrapped, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=outputs, dynamic_axes=dynamic, **OPTIONS
        )
        given = check or inputs
        expected = wrapped(*[tensor.clone() for tensor in given.values()])
    expected = [expected] if torch.is_tensor(expected) else list(expected)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = {port.name for port in session.get_inputs()}
    actual = session.run(outputs, {name: tensor.numpy() for name, tensor in given.items() if name in taken})
    worst = 0.0
    for name, a, b in zip(outputs, actual, expected):
        b = b.numpy()
        if a.shape != b.shape:
            raise SystemExit(f"{path}: output {name} has shape {a.shape}, in PyTorch {b.shape}")
        worst = max(worst, float(numpy.abs(a - b).max() / max(1e-12, numpy.abs(b).max())))
    if not worst <= TOLERANCE:
        raise SystemExit(f"{path}: differs from PyTorch by {worst:.1e} of the largest value")
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, differs from PyTorch by {worst:.1e} of the largest value")


def save_weights(model, folder, name="model.safetensors"):
    """Writes the checkpoint that the graphs were exported from: what goes to the port `origin`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in model.state_dict().items()}
    save_file(tensors, str(folder / name), metadata={"format": "pt"})
    print(f"{folder / name}: {len(tensors)} tensors")


def save_preprocessing(folder, **fields):
    """Writes a preprocessor_config.json beside the graphs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=1) + "\n")


def shortest_edge_and_crop(size, crop_fraction, resample, mean, std):
    """The preprocessing of most classifiers: the shorter side to `size / crop_fraction`, then the centre."""
    return dict(
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": math.floor(size / crop_fraction)},
        resample={"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[resample],
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
    )


def randomize(model, seed=0):
    """Gives every tensor values of its own. (Of equal tensors an exporter keeps one.)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if tensor.dtype.is_floating_point:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(tensor + 0.05 * noise if tensor.ndim < 2 else noise * min(0.3, tensor[0].numel() ** -0.5))
    return model.eval()


def images(size, n=2, seed=1):
    """Inputs for the export and its check."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def arguments(parser):
    """The arguments that all scripts have."""
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--tiny", action="store_true", help="a small model of random weights, to try things out without a download")
    parser.add_argument("--no-weights", action="store_true", help="do not write the checkpoint (you have it already)")
    return parser
