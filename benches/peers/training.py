"""Trains a model in PyTorch as people do it: forward, backward, AdamW of all weights.

    training.py prepare MODEL FOLDER
    training.py train MODEL FOLDER THREADS STEPS

MODEL is `deit_tiny` (timm) or `clip_vit_b32` (the image encoder, transformers), with random weights of a fixed seed. The first writes its
ONNX graph, its weights and a batch of 8 images; the second trains on that batch with the loss mean(y²) and prints as JSON, for every step, the loss
before it, its seconds and its processor seconds. The first step is not typical (memory is taken), so whoever reads them leaves it out. Needs torch,
timm, transformers, onnx, safetensors.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BATCH_SIZE = 8
RATE = 1e-5


class Embeddings(torch.nn.Module):
    """The image encoder of CLIP from pixels to embeddings, with the names of its tensors."""

    def __init__(self, **options):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        # The configuration's defaults are those of openai/clip-vit-base-patch32.
        model = CLIPVisionModelWithProjection._from_config(CLIPVisionConfig(**options), **options)
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, pixels):
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)


def build(name, for_export):
    torch.manual_seed(20)
    if name == "clip_vit_b32":
        # Fused attention has no ONNX form that keeps the weights as they are; in PyTorch it is the fastest.
        model = Embeddings(attn_implementation="eager" if for_export else "sdpa")
    else:
        import timm

        timm.layers.set_fused_attn(not for_export)
        model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    # Of equal tensors an exporter keeps one: give each values of its own.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    return model.eval()


def prepare(name, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(name, for_export=True)
    pixels = torch.randn(BATCH_SIZE, 3, 224, 224)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    save_file({"pixels": pixels}, folder / "batch.safetensors")
    torch.onnx.export(
        model, (pixels,), str(folder / "model.onnx"), input_names=["pixels"], output_names=["y"],
        dynamic_axes={"pixels": {0: "images"}, "y": {0: "images"}}, dynamo=False, opset_version=17, do_constant_folding=True,
    )


def train(name, folder, threads, steps):
    torch.set_num_threads(threads)
    folder = Path(folder)
    model = build(name, for_export=False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = load_file(folder / "batch.safetensors")["pixels"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    taken = {"losses": [], "seconds": [], "cpu_seconds": []}
    for _ in range(steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = model(pixels).square().mean()
        loss.backward()
        optimizer.step()
        taken["seconds"].append(time.perf_counter() - started)
        taken["cpu_seconds"].append(time.process_time() - cpu_started)
        taken["losses"].append(loss.item())
    print(json.dumps(taken))


if __name__ == "__main__":
    command, name, folder, *numbers = sys.argv[1:]
    if command == "prepare":
        prepare(name, folder)
    else:
        train(name, folder, *map(int, numbers))
