"""Writes the golden values of the segmentation tests.

    python -m venv v && v/bin/pip install numpy==2.4.6 scipy==1.17.1 scikit-image==0.26.0 opencv-python-headless==5.0.0.93 \
        pycocotools==2.0.11 pillow==13.0.0 torch==2.15.0
    v/bin/python make_golden.py

- rle.json: masks as pycocotools encodes them
- measures.json: J and F of pairs of masks, by dilating the boundaries with a disk (OpenCV, scikit-image) as davis2017-evaluation does
- prompts.json: the pixel deepest inside a mask (OpenCV's distance transform of the padded mask) and the box of the outermost pixels
- interpolate.json: torch.nn.functional.interpolate(mode="bilinear", align_corners=False)
- pngs.json: PNG masks of every kind, and what Pillow reads
"""
import io, json, sys
from pathlib import Path

import cv2, numpy, scipy, skimage
from pycocotools import mask as coco
from scipy.ndimage import gaussian_filter

HERE = Path(__file__).parent
VERSIONS = {"numpy": numpy.__version__, "opencv": cv2.__version__, "scikit-image": skimage.__version__, "pycocotools": "2.0.11"}


def dump(name, versions, cases):
    text = ",\n".join("  " + json.dumps(case) for case in cases)
    (HERE / name).write_text(f'{{\n "versions": {json.dumps(versions)},\n "cases": [\n{text}\n ]\n}}\n')


def short(values):
    """Single precision in as many digits as it takes."""
    return [float(f"{value:.9g}") for value in values.reshape(-1).tolist()]


def blob(rng, height, width, smooth, share):
    """A mask with smooth outlines that covers about a share of the image."""
    noise = gaussian_filter(rng.standard_normal((height, width)), smooth)
    return noise > numpy.quantile(noise, 1 - share)


def rle(mask):
    encoded = coco.encode(numpy.asfortranarray(mask.astype(numpy.uint8)))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def runs(mask):
    flat = mask.T.reshape(-1)
    edges = numpy.flatnonzero(numpy.diff(flat.astype(numpy.int8))) + 1
    lengths = numpy.diff([0, *edges, flat.size]).tolist()
    return lengths if not flat[0] else [0, *lengths]


def rle_cases():
    rng = numpy.random.default_rng(1)
    masks = [blob(rng, 7, 9, 1, .4), blob(rng, 12, 5, .5, .5), rng.random((10, 10)) < .5, numpy.ones((3, 4), bool), numpy.zeros((4, 3), bool)]
    masks += [blob(rng, 40, 60, 3, .2), blob(rng, 60, 40, 4, .7), blob(rng, 1, 30, 2, .5), blob(rng, 30, 1, 2, .5)]
    for mask in masks:
        encoded = rle(mask)
        counts = runs(mask)
        again = coco.frPyObjects({"size": encoded["size"], "counts": counts}, *encoded["size"])
        assert again["counts"].decode() == encoded["counts"]
        yield {
            "rows": ["".join("#" if p else "." for p in row) for row in mask], "area": int(mask.sum()),
            "compressed": encoded, "uncompressed": {"size": encoded["size"], "counts": counts},
        }


def outline(mask):
    right, below, corner = mask.copy(), mask.copy(), mask.copy()
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    corner[:-1, :-1] = mask[1:, 1:]
    result = (mask ^ right) | (mask ^ below) | (mask ^ corner)
    result[-1] = (mask ^ right)[-1]
    result[:, -1] = (mask ^ below)[:, -1]
    result[-1, -1] = False
    return result


def f_measure(found, truth):
    radius = int(numpy.ceil(.008 * numpy.linalg.norm(found.shape)))
    disk = skimage.morphology.disk(radius).astype(numpy.uint8)
    a, b = outline(found), outline(truth)
    near = lambda m: cv2.dilate(m.astype(numpy.uint8), disk) > 0
    if not a.any() or not b.any():
        precision, recall = float(not a.any()), float(not b.any())
    else:
        precision, recall = (a & near(b)).sum() / a.sum(), (b & near(a)).sum() / b.sum()
    return 0. if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def jaccard(found, truth):
    union = (found | truth).sum()
    return 1. if union == 0 else (found & truth).sum() / union


def measure_cases():
    rng = numpy.random.default_rng(2)
    for height, width in [(1, 1), (1, 9), (8, 1), (24, 30), (60, 80), (90, 90), (160, 200), (300, 400)]:
        for share in (.15, .5):
            truth = blob(rng, height, width, max(1, height / 12), share)
            kinds = {
                "near": numpy.roll(truth, (1, 2), (0, 1)), "same": truth.copy(), "other": blob(rng, height, width, max(1, height / 12), share),
                "empty": numpy.zeros_like(truth), "full": numpy.ones_like(truth), "coarse": cv2.erode(truth.astype(numpy.uint8), numpy.ones((3, 3), numpy.uint8)) > 0,
            }
            for kind, found in kinds.items():
                if kind in ("near", "coarse") or (share == .15 and height < 100):
                    yield {"kind": kind, "found": rle(found), "truth": rle(truth), "j": float(jaccard(found, truth)), "f": float(f_measure(found, truth))}


def prompt_cases():
    rng = numpy.random.default_rng(3)
    masks = [numpy.ones((1, 1), bool), numpy.ones((5, 8), bool), blob(rng, 1, 20, 2, .5), blob(rng, 20, 1, 2, .5)]
    masks += [blob(rng, height, width, smooth, share) for height, width, smooth, share in
              [(20, 30, 2, .3), (33, 21, 2, .6), (50, 50, 4, .1), (50, 50, 4, .9), (64, 48, 1, .5), (90, 120, 6, .4), (120, 90, 8, .2)]]
    for mask in masks:
        deep = cv2.distanceTransform(numpy.pad(mask.astype(numpy.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        exact = scipy.ndimage.distance_transform_edt(numpy.pad(mask, 1))[1:-1, 1:-1]
        y, x = divmod(int(exact.argmax()), mask.shape[1])
        # OpenCV works in single precision: among pixels that are equally deep it may take another.
        assert abs(deep.max() - exact[y, x]) < 1e-3
        ys, xs = numpy.nonzero(mask)
        yield {"mask": rle(mask), "point": [[x, y]], "box": [[int(xs.min()), int(ys.min())], [int(xs.max()), int(ys.max())]]}


def interpolate_cases():
    import torch
    rng = numpy.random.default_rng(4)
    for in_h, in_w, out_h, out_w in [(1, 1, 3, 2), (2, 2, 5, 5), (4, 4, 16, 16), (8, 8, 8, 8), (8, 8, 21, 13), (5, 7, 9, 6), (9, 4, 3, 10), (6, 6, 1, 1), (12, 12, 20, 23)]:
        logits = (rng.standard_normal((in_h, in_w)) * 3).clip(-8, 8).astype(numpy.float32)
        output = torch.nn.functional.interpolate(torch.from_numpy(logits)[None, None], (out_h, out_w), mode="bilinear", align_corners=False)
        yield {"in_h": in_h, "in_w": in_w, "out_h": out_h, "out_w": out_w, "input": short(logits), "output": short(output.numpy())}


def png_cases():
    from PIL import Image
    rng = numpy.random.default_rng(5)
    for kind, most in [("1", 2), ("L", 4), ("P", 2), ("P", 4), ("P", 16), ("P", 256), ("I;16", 600)]:
        values = rng.integers(0, most, (5, 11)).astype(numpy.uint16)
        if kind == "1":
            image = Image.fromarray((values > 0).astype(numpy.uint8) * 255).convert("1")
        elif kind == "I;16":
            image = Image.fromarray(values)
        else:
            image = Image.fromarray(values.astype(numpy.uint8))
        if kind == "P":
            image.putpalette(rng.integers(0, 256, 3 * most).astype(numpy.uint8).tobytes())
        file = io.BytesIO()
        image.save(file, "PNG")
        back = numpy.array(Image.open(io.BytesIO(file.getvalue())))
        yield {"kind": kind, "palette": kind == "P", "png": file.getvalue().hex(), "values": [[int(v) for v in row] for row in back]}


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["rle", "measures", "prompts", "interpolate", "pngs"]
    makers = {"rle": rle_cases, "measures": measure_cases, "prompts": prompt_cases, "interpolate": interpolate_cases, "pngs": png_cases}
    for name in wanted:
        versions = VERSIONS
        if name == "interpolate":
            import torch
            versions = {"torch": torch.__version__}
        dump(f"{name}.json", versions, makers[name]())
