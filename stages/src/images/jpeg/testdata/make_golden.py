"""Writes decoded.json: JPEG files, and what Pillow (libjpeg-turbo) makes of them.

    python -m venv v && v/bin/pip install pillow==13.0.0 numpy==2.4.6
    v/bin/python make_golden.py

Per file: its bytes, the mode that Pillow opens it in, its size, and the CRC-32 of `convert("RGB")`.
"""
import io, json, zlib
from pathlib import Path

import numpy, PIL
from PIL import Image, features

HERE = Path(__file__).parent
random = numpy.random.default_rng(20240601)


def picture(height, width, channels):
    """Smooth shapes, an edge, a little noise: all of a coefficient block is used, and colour differs from grey."""
    y, x = numpy.mgrid[0:height, 0:width].astype(float)
    planes = []
    for c in range(channels):
        plane = 128 + 70 * numpy.sin(x / (3 + c) + y / 7) + 50 * numpy.cos(y / (4 + c) - x / 9)
        plane[(x + 2 * y) % 23 < 7] += (60, -70, 40, 30)[c]
        planes.append(plane + random.normal(0, 9, plane.shape))
    pixels = numpy.clip(numpy.stack(planes, -1), 0, 255).astype(numpy.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, {1: "L", 3: "RGB", 4: "CMYK"}[channels])


def save(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_frame(data, height, width, factors):
    """The same entropy-coded data under another frame header of as many blocks in as many MCUs."""
    at = data.index(b"\xff\xc0") if b"\xff\xc0" in data else data.index(b"\xff\xc2")
    data = bytearray(data)
    data[at + 5:at + 9] = bytes([height >> 8, height & 255, width >> 8, width & 255])
    for i, factor in enumerate(factors):
        data[at + 11 + 3 * i] = factor
    return bytes(data)


def cases():
    for height, width in [(1, 1), (2, 3), (3, 2), (5, 7), (16, 16), (17, 33), (8, 40)]:
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            yield f"{width}x{height} {subsampling}", save(picture(height, width, 3), quality=80, subsampling=subsampling)
    for quality in (1, 30, 100):
        yield f"quality {quality}", save(picture(21, 19, 3), quality=quality)
    yield "grey", save(picture(13, 21, 1), quality=85)
    for subsampling in ("4:4:4", "4:2:0"):
        yield f"progressive {subsampling}", save(picture(35, 41, 3), quality=75, progressive=True, subsampling=subsampling)
    yield "progressive grey", save(picture(30, 17, 1), quality=92, progressive=True)
    yield "progressive with restarts", save(picture(35, 41, 3), quality=60, progressive=True, restart_marker_blocks=2)
    yield "restarts", save(picture(35, 41, 3), quality=60, restart_marker_blocks=1)
    yield "optimized", save(picture(20, 30, 3), quality=50, optimize=True)
    yield "rgb", save(picture(12, 11, 3), quality=90, keep_rgb=True)
    cmyk = save(picture(14, 15, 4), quality=90)
    yield "cmyk", cmyk
    at = cmyk.index(b"Adobe") + 11
    yield "ycck", cmyk[:at] + b"\x02" + cmyk[at + 1:]
    plain = cmyk.index(b"\xff\xee")
    yield "cmyk without an adobe marker", cmyk[:plain] + cmyk[plain + 16:]
    colour = save(picture(24, 32, 3), quality=85, subsampling="4:4:4")
    jfif = colour.index(b"\xff\xe0")
    bare = colour[:jfif] + colour[jfif + 18:]
    yield "without a jfif marker", bare
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    yield "adobe says rgb", bare[:2] + adobe + b"\x00" + bare[2:]
    yield "adobe says ycc", bare[:2] + adobe + b"\x01" + bare[2:]
    # Factors that Pillow does not write: a 4:2:2 file has two blocks of grey per MCU, a 4:2:0 file four.
    two = save(picture(24, 64, 3), quality=85, subsampling="4:2:2")
    yield "4:4:0", with_frame(two, 47, 31, [0x12, 0x11, 0x11])
    yield "4:4:0 of one column", with_frame(save(picture(30, 5, 3), quality=85, subsampling="4:2:2"), 63, 1, [0x12, 0x11, 0x11])
    four = save(picture(64, 32, 3), quality=85, subsampling="4:2:0")
    yield "4:1:1", with_frame(four, 31, 61, [0x41, 0x11, 0x11])
    yield "4:1:1 upright", with_frame(four, 125, 15, [0x14, 0x11, 0x11])
    yield "factors that cancel", with_frame(save(picture(30, 20, 1), quality=85), 30, 20, [0x22])
    yield "bytes before the end marker", save(picture(16, 16, 3), quality=80)[:-2] + b"\x00\x17\xff\xd9"
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "orientation 6", save(picture(9, 14, 3), quality=80, exif=exif.tobytes())


found = []
for name, data in cases():
    image = Image.open(io.BytesIO(data))
    pixels = image.convert("RGB").tobytes()
    found.append(dict(name=name, mode=image.mode, height=image.height, width=image.width, crc32=zlib.crc32(pixels), jpeg=data.hex()))
versions = {"pillow": PIL.__version__, "numpy": numpy.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}
head = json.dumps(versions, indent=1)[:-2]
(HERE / "decoded.json").write_text(head + ',\n "cases": [\n' + ",\n".join("  " + json.dumps(c) for c in found) + "\n ]\n}\n")
