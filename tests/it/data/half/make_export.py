"""Exports the image tower of the fixture `clip_hf` in half precision, as `model.half()` before an export does.

Usage: python make_export.py onnx/tests/fixtures/clip_hf/base.safetensors
Made with Python 3.11, torch 2.15.0, transformers 5.24.0, safetensors 0.8.0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPVisionModelWithProjection

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
config = CLIPConfig(vision_config=dict(sizes, image_size=32, patch_size=8), projection_dim=24).vision_config
config.projection_dim = 24
model = CLIPVisionModelWithProjection(config).eval()
tensors = {name: tensor for name, tensor in load_file(sys.argv[1]).items() if name.startswith("vis")}
missing, unexpected = model.load_state_dict(tensors, strict=False)
assert not unexpected and all("position_ids" in name for name in missing)


class Embeds(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.m = model.half()

    def forward(self, pixel_values):
        return self.m(pixel_values=pixel_values).image_embeds


torch.onnx.export(
    Embeds(), (torch.randn(2, 3, 32, 32).half(),), str(Path(__file__).parent / "vision.onnx"), dynamo=False, opset_version=17,
    input_names=["pixel_values"], output_names=["image_embeds"],
    dynamic_axes={"pixel_values": {0: "batch"}, "image_embeds": {0: "batch"}},
)
