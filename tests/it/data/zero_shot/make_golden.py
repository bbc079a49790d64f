"""Makes the images, the tokenizer and the logits of the zero-shot tests, with PyTorch and transformers.

Usage: python make_golden.py FOLDER, where FOLDER is onnx/tests/fixtures/clip_hf (or the same folder elsewhere).
Made with Python 3.11, torch 2.15.0, transformers 5.24.0, safetensors 0.8.0, numpy 2.4.6.
"""

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

HERE = Path(__file__).parent
FIXTURE = Path(sys.argv[1])
CLASSES = ["cat", "Red  Fox", "bird", "seal", "otter"]
# The last one is longer than the twelve tokens that the text tower takes.
TEMPLATES = ["a photo of a {}", "the {}", "{}", "an old and grainy picture of some {}"]

# A vocabulary of 64: letters inside and at the end of a word, ten merges, begin and end.
letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
merges = [("p", "h"), ("o", "t"), ("ot", "o</w>"), ("ph", "oto</w>"), ("o", "f</w>"), ("a", "t</w>"), ("t", "h"),
          ("th", "e</w>"), ("r", "d</w>"), ("e", "r</w>")]
tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
vocabulary = {token: i for i, token in enumerate(tokens + ["<|startoftext|>", "<|endoftext|>"])}
assert len(vocabulary) == 64
(HERE / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
(HERE / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))

rng = np.random.default_rng(23)
images = rng.integers(0, 256, (20, 32, 32), dtype=np.uint8)
labels = rng.integers(0, len(CLASSES), 20, dtype=np.uint8)
for name, array in (("images", images), ("labels", labels)):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    (HERE / f"{name}.idx.gz").write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
config = CLIPConfig(
    text_config=dict(sizes, vocab_size=64, max_position_embeddings=12, bos_token_id=62, eos_token_id=63, pad_token_id=63),
    vision_config=dict(sizes, image_size=32, patch_size=8),
    projection_dim=24,
)
model = CLIPModel(config).eval()
tokenizer = CLIPTokenizer(str(HERE / "vocab.json"), str(HERE / "merges.txt"))
pixels = torch.from_numpy(images).float().div(255).sub(0.5).div(0.5)[:, None].expand(-1, 3, -1, -1)


def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


golden = {"classes": CLASSES, "templates": TEMPLATES, "tokens": {}, "logits": {}}
for weights in ("base", "perturbed"):
    missing, unexpected = model.load_state_dict(load_file(FIXTURE / f"{weights}.safetensors"), strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    io = load_file(FIXTURE / "text.io.safetensors")
    with torch.no_grad():
        again = features(model.get_text_features(input_ids=io["input.input_ids"], attention_mask=io["input.attention_mask"]))
        assert torch.allclose(again, io[f"{weights}.text_embeds"], atol=1e-5), "the configuration is not the fixture's"
        head = []
        for name in CLASSES:
            texts = [template.format(name) for template in TEMPLATES]
            encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
            golden["tokens"].update(zip(texts, encoded["input_ids"].tolist()))
            embeddings = torch.nn.functional.normalize(features(model.get_text_features(**encoded)).double(), dim=-1)
            head.append(torch.nn.functional.normalize(embeddings.mean(0), dim=0))
        head = torch.stack(head) * model.logit_scale.double().exp()
        embeddings = torch.nn.functional.normalize(features(model.get_image_features(pixel_values=pixels)).double(), dim=-1)
        golden["logits"][weights] = (embeddings @ head.T).tolist()
(HERE / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
