"""Writes other_formats.json: WebP, BMP and PNM files, and what Pillow's `convert("RGB")` makes of them.

    python -m venv v && v/bin/pip install pillow==13.0.0 numpy==2.4.6
    v/bin/python make_golden.py
"""
import io, json, zlib
from pathlib import Path

import numpy, PIL
from PIL import Image, features

HERE = Path(__file__).parent
random = numpy.random.default_rng(20240602)


def picture(height, width, mode):
    y, x = numpy.mgrid[0:height, 0:width].astype(float)
    bands = len(Image.new(mode, (1, 1)).getbands())
    planes = [128 + 80 * numpy.sin(x / (3 + c) + y / 7) + 50 * numpy.cos(y / (4 + c) - x / 9) + random.normal(0, 12, y.shape) for c in range(bands)]
    pixels = numpy.clip(numpy.stack(planes, -1), 0, 255).astype(numpy.uint8)
    return Image.fromarray(pixels[:, :, 0] if bands == 1 else pixels, mode)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cases():
    for quality in (5, 60, 80, 100):
        yield f"lossy {quality}.webp", saved(picture(33, 41, "RGB"), "WEBP", quality=quality)
    yield "lossy of one pixel.webp", saved(picture(1, 1, "RGB"), "WEBP")
    yield "lossy odd.webp", saved(picture(2, 3, "RGB"), "WEBP", quality=75)
    yield "lossy alpha.webp", saved(picture(17, 20, "RGBA"), "WEBP", quality=75)
    yield "lossless.webp", saved(picture(12, 19, "RGB"), "WEBP", lossless=True)
    yield "lossless alpha.webp", saved(picture(12, 19, "RGBA"), "WEBP", lossless=True, exact=True)
    frames = [picture(8, 9, "RGB") for _ in range(2)]
    yield "animation.webp", saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield "rgb.bmp", saved(picture(5, 7, "RGB"), "BMP")
    yield "grey.bmp", saved(picture(5, 7, "L"), "BMP")
    yield "palette.bmp", saved(picture(9, 7, "RGB").quantize(16), "BMP")
    yield "bilevel.bmp", saved(picture(9, 7, "L").convert("1"), "BMP")
    yield "rgb.ppm", saved(picture(5, 7, "RGB"), "PPM")
    yield "grey.pgm", saved(picture(5, 7, "L"), "PPM")
    yield "bilevel.pbm", saved(picture(5, 7, "L").convert("1"), "PPM")
    yield "plain.pgm", b"P2\n# by hand\n3 2\n255\n0 10 255\n7 8 9\n"
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "turned.png", saved(picture(4, 6, "RGB"), "PNG", exif=exif)
    yield "turned.webp", saved(picture(4, 6, "RGB"), "WEBP", lossless=True, exif=exif)


found = []
for name, data in cases():
    image = Image.open(io.BytesIO(data))
    pixels = image.convert("RGB").tobytes()
    found.append(dict(name=name, mode=image.mode, height=image.height, width=image.width, crc32=zlib.crc32(pixels), file=data.hex()))
versions = {"pillow": PIL.__version__, "numpy": numpy.__version__, "webp": features.version("webp")}
head = json.dumps(versions, indent=1)[:-2]
(HERE / "other_formats.json").write_text(head + ',\n "cases": [\n' + ",\n".join("  " + json.dumps(c) for c in found) + "\n ]\n}\n")
