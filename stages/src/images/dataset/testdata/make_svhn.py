"""Writes svhn.json: MATLAB files as scipy writes them.

    python -m venv v && v/bin/pip install scipy==1.17.1 numpy==2.4.6
    v/bin/python make_svhn.py
"""
import io, json
from pathlib import Path

import numpy, scipy
from scipy.io import savemat

images = numpy.random.default_rng(20240603).integers(0, 256, (3, 4, 5, 3), numpy.uint8)
found = []
for name, compressed, kind in [("compressed", True, numpy.uint8), ("plain, labels as doubles", False, numpy.float64)]:
    buffer = io.BytesIO()
    arrays = {"X": images.transpose(1, 2, 3, 0), "y": numpy.array([[1], [10], [9]], kind), "note": "text is passed over"}
    savemat(buffer, arrays, do_compression=compressed)
    found.append(dict(name=name, images=[image.tobytes().hex() for image in images], file=buffer.getvalue().hex()))
text = json.dumps({"scipy": scipy.__version__, "numpy": numpy.__version__, "cases": found}, indent=1)
(Path(__file__).parent / "svhn.json").write_text(text + "\n")
