"""Writes, with the installed version of torch, the kinds of files that people share, and what they hold, into a folder of that version.

Run with: python versions.py (any torch since 1.13; nothing else is needed). The classes are named as in the programs that the files imitate:
task_vectors (whole pickled modules, some not by torch.save), tall_masks (state dicts of encoders, whole pickled heads, masks), TVQ (quantized
tensors beside their scales), KnOTS (heads that are one tensor), PEFT (adapters in .bin).
"""

import collections
import json
import os
import pickle
import struct
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "torch-" + torch.__version__.split("+")[0])
os.makedirs(os.path.join(FOLDER, "adapter"), exist_ok=True)
os.chdir(FOLDER)
torch.manual_seed(11)
# files before 1.6 carry the source of every module's class
torch.serialization.get_source_lines_and_file = lambda cls: ([f"class {cls.__name__}:\n", "    ...\n"], 1, f"{cls.__name__}.py")

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}


def expect(name, tensors):
    """Safetensors by hand: old versions of torch have no such package."""
    header, data = {}, b""
    for key in sorted(tensors):
        value = tensors[key].detach().contiguous()
        raw = bytes(value.reshape(-1).view(torch.uint8).tolist()) if value.dim() else bytes(value.reshape(1).view(torch.uint8).tolist())
        header[key] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    with open(f"{name}.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def named(module):
    def name(cls):
        cls.__module__ = module
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), type(sys)(".".join(parts[:end])))
        setattr(sys.modules[module], cls.__name__, cls)
        return cls
    return name


@named("open_clip.model")
class VisualTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 2, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(4))
        self.attn = torch.nn.MultiheadAttention(4, 2)
        self.proj = torch.nn.Parameter(torch.randn(4, 3))
        self.register_buffer("attn_mask", torch.zeros(2, 2), persistent=False)
        self.register_buffer("steps", torch.tensor(3))


@named("open_clip.model")
class CLIP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = VisualTransformer()
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.5))


@named("torchvision.transforms.transforms")
class Compose:
    def __init__(self, transforms):
        self.transforms = transforms


@named("src.modeling")
class ImageEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = CLIP()
        self.train_preprocess = Compose([1, "bicubic"])
        self.cache_dir = None


@named("src.models.modeling")
class ClassificationHead(torch.nn.Linear):
    def __init__(self, weights):
        super().__init__(weights.shape[1], weights.shape[0])
        self.normalize = True
        self.weight = torch.nn.Parameter(weights.clone())
        self.bias = torch.nn.Parameter(torch.zeros_like(self.bias))


# task_vectors: the encoder as a whole, by torch.save in both containers, and by pickle.dump
encoder = ImageEncoder()
torch.save(encoder, "image_encoder.pt")
torch.save(encoder, "image_encoder_legacy.pt", _use_new_zipfile_serialization=False)
with open("image_encoder_raw.pt", "wb") as file:
    pickle.dump(encoder, file)
expect("image_encoder", {key[len("model."):]: value for key, value in encoder.state_dict().items()})
assert "model.visual.attn_mask" not in encoder.state_dict()

# tall_masks: the encoder's state dict, the head as a whole
torch.save(encoder.state_dict(), "nonlinear_finetuned.pt")
expect("nonlinear_finetuned", encoder.state_dict())
head = ClassificationHead(torch.randn(5, 3))
torch.save(head, "head_MNISTVal.pt")
expect("head_MNISTVal", head.state_dict())

# KnOTS: a head is one tensor
torch.save(torch.randn(5, 3).half().t(), "mnist_head.pt")
expect("mnist_head", {"tensor": torch.load("mnist_head.pt")})

# TVQ: codes, and scale and zero point of each as tensors without axes
quantized = collections.OrderedDict()
for key, value in encoder.state_dict().items():
    if "weight" in key:
        scale = 255 / (value.max() - value.min())
        zero = -torch.round(scale * value.min())
        quantized[key] = torch.clamp(torch.round(scale * value + zero), 0, 255).to(torch.uint8)
        quantized[key + "_qscale"], quantized[key + "_qzeropoint"] = scale, zero
    else:
        quantized[key] = value
torch.save(dict(quantized), "finetuned_quantized.pt")
expect("finetuned_quantized", quantized)

# PEFT before safetensors
with open("adapter/adapter_config.json", "w") as file:
    json.dump({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "modules_to_save": None}, file)
module = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"
a, b = torch.randn(2, 4), torch.randn(4, 2)
torch.save({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, "adapter/adapter_model.bin")
product = 2.0 * (b.double() @ a.double())
expect("adapter", {"vision_model.encoder.layers.0.self_attn.q_proj.weight": product.float()})

# a training script's dictionary around DataParallel's names
training = {"epoch": 2, "state_dict": collections.OrderedDict(("module." + key, value) for key, value in head.state_dict().items())}
torch.save(training, "training.pt")

with open("written-by.txt", "w") as file:
    file.write(f"versions.py with torch {torch.__version__} and Python {sys.version.split()[0]}.\n")
