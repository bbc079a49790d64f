"""Scores a CLIP image encoder as people do it in Python: PIL, a DataLoader with workers, onnxruntime.

    evaluate.py prepare FOLDER OUT SIZE COPIES
    evaluate.py score GRAPH PREPROCESSOR_CONFIG HEAD FOLDER BATCH_SIZE

The first enlarges the images of an image folder to SIZE pixels (PNG) and writes each COPIES times; the second prints `correct`, `images` and
`seconds` as JSON. The seconds are those of the session, the data set and the loop: importing torch is not counted. Needs torch, onnxruntime,
pillow, safetensors.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Folder(Dataset):
    """One folder per class, in the order of their names."""

    def __init__(self, root, config):
        classes = sorted(path for path in Path(root).iterdir() if path.is_dir())
        self.items = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
        self.size = config["size"]["shortest_edge"]
        self.mean = np.array(config["image_mean"], np.float32)
        self.std = np.array(config["image_std"], np.float32)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        image = Image.open(path).convert("RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return pixels.transpose(2, 0, 1), label


def prepare(folder, out, size, copies):
    for path in sorted(Path(folder).glob("*/*")):
        target = Path(out) / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).resize((size, size), Image.BICUBIC)
        for copy in range(copies):
            image.save(target / f"{path.stem}_{copy:03}.png")


def score(graph, config, head, folder, batch_size):
    import onnxruntime
    from safetensors.numpy import load_file

    started = time.perf_counter()
    cores = os.cpu_count()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tensors = load_file(head)
    weight, bias = tensors["weight"], tensors.get("bias", 0)
    loader = DataLoader(Folder(folder, json.loads(Path(config).read_text())), batch_size, num_workers=cores)
    name = session.get_inputs()[0].name
    correct = 0
    for pixels, labels in loader:
        features = session.run(None, {name: pixels.numpy()})[0]
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        correct += int(((features @ weight.T + bias).argmax(1) == labels.numpy()).sum())
    seconds = time.perf_counter() - started
    print(json.dumps({"correct": correct, "images": len(loader.dataset), "seconds": seconds}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    if command == "prepare":
        prepare(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
    else:
        score(*arguments[:4], int(arguments[4]))
