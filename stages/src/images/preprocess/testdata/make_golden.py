"""Writes the golden values of the image tests.

    python -m venv v && v/bin/pip install pillow==13.0.0 numpy==2.4.6 transformers==5.23.0
    v/bin/python make_golden.py

- resize.json: Image.resize of a deterministic pattern (CRC-32 of the bytes; the bytes too where they are few)
- processed.json: transformers' CLIPImageProcessorPil (CRC-32 of the little-endian float32 bytes)
- ../../dataset/testdata/png_modes.json: PNG files of every mode and what Image.convert("RGB") makes of them
"""
import io, json, struct, zlib
from pathlib import Path

import numpy, PIL, transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

HERE = Path(__file__).parent
MASK = 0xFFFFFFFF
VERSIONS = {"pillow": PIL.__version__, "numpy": numpy.__version__, "transformers": transformers.__version__}


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


def dump(path, value, cases):
    head = json.dumps(value, indent=1)[:-2]
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + ',\n "cases": [\n' + ",\n".join("  " + json.dumps(c) for c in cases) + "\n ]\n}\n")


def resize_cases():
    sizes = [
        (1, 1, 1, 1), (1, 1, 5, 7), (7, 5, 1, 1), (2, 3, 4, 6), (4, 6, 2, 3), (8, 8, 8, 5), (8, 8, 5, 8),
        (9, 13, 9, 13), (10, 10, 7, 13), (10, 10, 6, 8), (10, 10, 6, 7), (13, 7, 6, 17), (16, 16, 15, 17), (31, 33, 32, 32), (28, 28, 32, 32),
        (28, 28, 224, 224), (64, 48, 24, 18), (75, 100, 30, 40), (256, 256, 224, 224), (301, 2, 7, 5), (2, 301, 5, 7),
        (200, 3, 32, 32), (96, 96, 3, 3),
    ]
    for in_h, in_w, out_h, out_w in sizes:
        for channels in (1, 3):
            image = pattern(in_h, in_w, channels)
            for resample in range(6):
                out = image.resize((out_w, out_h), resample).tobytes()
                case = dict(in_h=in_h, in_w=in_w, channels=channels, out_h=out_h, out_w=out_w, resample=resample, crc32=zlib.crc32(out))
                if len(out) <= 48:
                    case["pixels"] = out.hex()
                yield case


def processed_cases():
    configs = [
        {}, {"size": {"height": 12, "width": 20}, "do_center_crop": False},
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
        {"size": {"shortest_edge": 9}, "crop_size": {"height": 16, "width": 12}},
        {"size": {"shortest_edge": 15}, "crop_size": {"height": 11, "width": 20}, "resample": 2},
        {"do_resize": False, "crop_size": {"height": 21, "width": 8}, "do_normalize": False},
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "do_rescale": False, "image_mean": [10, 20, 30], "image_std": [3, 5, 7]},
    ]
    for config in configs:
        processor = CLIPImageProcessorPil(**config)
        for height, width, channels in [(20, 14, 3), (13, 22, 1), (5, 6, 3)]:
            out = processor(pattern(height, width, channels), return_tensors="np")["pixel_values"][0]
            assert out.dtype == numpy.float32, out.dtype
            yield dict(config=config, height=height, width=width, channels=channels, shape=list(out.shape),
                       first=float(out[0, 0, 0]), crc32=zlib.crc32(numpy.ascontiguousarray(out).tobytes()))


def png(width, height, depth, color, rows, extra=()):
    """A PNG file from packed rows, for what Pillow cannot write."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    ihdr = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + b"".join(chunk(*e) for e in extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_cases():
    def saved(image, **options):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return buffer.getvalue()

    rgb, grey = pattern(5, 7, 3), pattern(5, 7, 1)
    alpha = pattern(5, 7, 3).getchannel(2)
    rgba, la = rgb.copy(), grey.copy()
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    noise = bytes(pixel(0, x, 0) for x in range(48))
    files = {
        "rgb.png": saved(rgb), "grey.png": saved(grey), "rgba.png": saved(rgba), "grey_alpha.png": saved(la),
        "palette.png": saved(rgb.quantize(8)), "palette_transparent.png": saved(rgb.quantize(8), transparency=2),
        "palette_256.png": saved(pattern(16, 20, 3).quantize(256)),
        "bilevel.png": saved(grey.point(lambda v: 255 * (v > 99)).convert("1")),
        "grey_transparent.png": saved(grey, transparency=255), "rgb_transparent.png": saved(rgb, transparency=(0, 0, 0)),
        "grey2.png": png(6, 2, 2, 0, [noise[:2], noise[2:4]]), "grey4.png": png(5, 2, 4, 0, [noise[:3], noise[3:6]]),
        "grey16.png": png(3, 2, 16, 0, [struct.pack(">3H", 0, 255, 256), struct.pack(">3H", 40, 65535, 1000)]),
        "rgb16.png": png(2, 2, 16, 2, [noise[:12], noise[12:24]]),
        "rgba16.png": png(2, 2, 16, 6, [noise[:16], noise[16:32]]),
        "grey_alpha16.png": png(2, 2, 16, 4, [noise[:8], noise[8:16]]),
    }
    for name, data in files.items():
        image = Image.open(io.BytesIO(data))
        yield dict(name=name, mode=image.mode, png=data.hex(), rgb=image.convert("RGB").tobytes().hex())


dump(HERE / "resize.json", VERSIONS, list(resize_cases()))
dump(HERE / "processed.json", VERSIONS, list(processed_cases()))
dump(HERE.parent.parent / "dataset/testdata/png_modes.json", VERSIONS, list(png_cases()))
