"""Writes torch.json: the evaluation transforms of timm and open_clip, which torchvision applies to PIL images.

    python -m venv v && v/bin/pip install pillow==13.0.0 numpy==2.4.6 torch==2.15.0 torchvision==0.29.2 timm==1.0.31 open_clip_torch==3.3.0
    v/bin/python make_torch.py

Per case: a configuration, the pattern of make_golden.py, and the CRC-32 of the little-endian float32 bytes.
"""
import json, zlib
from pathlib import Path

import numpy, open_clip, PIL, timm, torch, torchvision
from PIL import Image

MASK = 0xFFFFFFFF


def pixel(y, x, c):
    v = (y * 2654435761 & MASK) ^ (x * 2246822519 & MASK) ^ ((c + 1) * 3266489917 & MASK)
    v ^= v >> 15
    v = v * 2246822519 & MASK
    v ^= v >> 13
    if (y // 3 + x // 5) % 4 == 0:
        return 255 if v & 1 else 0
    return ((v & 0x7F) + y * 5 + x * 3 + c * 40) & 0xFF


def pattern(height, width, channels):
    a = numpy.array([[[pixel(y, x, c) for c in range(channels)] for x in range(width)] for y in range(height)], numpy.uint8)
    return Image.fromarray(a[:, :, 0] if channels == 1 else a)


TIMM = [
    {"input_size": [3, 16, 16], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    {"input_size": [3, 15, 15], "interpolation": "bilinear"},
    {"input_size": [3, 16, 20], "interpolation": "lanczos", "crop_pct": 0.95, "crop_mode": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    {"input_size": [3, 24, 24], "crop_pct": 1.0},
]
OPEN_CLIP = [
    {"model_cfg": {"vision_cfg": {"image_size": 12}}, "preprocess_cfg": {}},
    {"preprocess_cfg": {"size": 16, "resize_mode": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}},
]


def transforms():
    for config in TIMM:
        data = timm.data.resolve_data_config(pretrained_cfg=config)
        yield config, timm.data.create_transform(**data)
    for config in OPEN_CLIP:
        cfg = config["preprocess_cfg"]
        size = cfg.get("size", config.get("model_cfg", {}).get("vision_cfg", {}).get("image_size"))
        yield config, open_clip.image_transform(size, is_train=False, mean=cfg.get("mean"), std=cfg.get("std"), resize_mode=cfg.get("resize_mode"), interpolation=cfg.get("interpolation"))


found = []
for config, transform in transforms():
    for height, width, channels in [(23, 31, 3), (40, 17, 1), (9, 14, 3), (33, 33, 3)]:
        # timm leaves the conversion to its datasets, which convert as they open.
        out = transform(pattern(height, width, channels).convert("RGB")).numpy()
        assert out.dtype == numpy.float32, out.dtype
        found.append(dict(config=config, height=height, width=width, channels=channels, crc32=zlib.crc32(numpy.ascontiguousarray(out).tobytes())))
modules = {"pillow": PIL, "numpy": numpy, "torch": torch, "torchvision": torchvision, "timm": timm, "open_clip": open_clip}
head = json.dumps({name: module.__version__ for name, module in modules.items()}, indent=1)[:-2]
(Path(__file__).parent / "torch.json").write_text(head + ',\n "cases": [\n' + ",\n".join("  " + json.dumps(c) for c in found) + "\n ]\n}\n")
