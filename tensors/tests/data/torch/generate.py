"""Writes the PyTorch and NumPy files beside this script, and what they hold as safetensors of the same name.

Run with: python generate.py (torch, numpy and safetensors of the versions that README.md names).
Files in `refused/` are those that must not be read; the tests say why. Nothing here is a trained model.
"""

import collections
import io
import json
import os
import pickle
import sys
import zipfile

import numpy as np
import torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)
os.makedirs("refused", exist_ok=True)
torch.manual_seed(7)
# the classes below are pickled as if they lived in a user's project
MODULE = "src.modeling"


# files before 1.6 carry the source of every module's class, and where it was
torch.serialization.get_source_lines_and_file = lambda cls: ([f"class {cls.__name__}:\n", "    ...\n"], 1, f"{cls.__name__}.py")


def expect(name, tensors):
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, f"{name}.safetensors")


def in_module(cls):
    cls.__module__ = MODULE
    sys.modules.setdefault("src", type(sys)("src"))
    module = sys.modules.setdefault(MODULE, type(sys)(MODULE))
    setattr(module, cls.__name__, cls)
    return cls


# --- plain state dicts ------------------------------------------------------------------------------------------------------------
types = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8_e4m3": torch.float8_e4m3fn, "f8_e5m2": torch.float8_e5m2, "f8_e4m3fnuz": torch.float8_e4m3fnuz,
    "f8_e5m2fnuz": torch.float8_e5m2fnuz, "f8_e8m0": torch.float8_e8m0fnu,
}
everything = {name: (torch.randn(3, 5) + 0.1).abs().to(dtype) for name, dtype in types.items()}
for name in ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]:
    everything[name] = torch.arange(6).reshape(2, 3).to(getattr(torch, name))
everything["bool"] = torch.tensor([True, False, True])
everything["scalar"] = torch.tensor(2.5)
everything["empty"] = torch.zeros(0, 3)
torch.save(everything, "types.pt")
expect("types", everything)

old_types = {name: value for name, value in everything.items() if "f8" not in name and name not in ("uint16", "uint32", "uint64")}
torch.save(old_types, "types_legacy.pt", _use_new_zipfile_serialization=False)
expect("types_legacy", old_types)

base = torch.arange(60, dtype=torch.float32)
matrix = base[12:].reshape(6, 8)
views = collections.OrderedDict(
    whole=base, transposed=matrix.t(), rows=matrix[1:3], columns=matrix[:, 2:5], steps=matrix[::2, ::3],
    permuted=base[:24].reshape(2, 3, 4).permute(2, 0, 1), expanded=base[3:6].expand(4, 3), element=base[7],
    halves=torch.arange(12).to(torch.bfloat16).reshape(3, 4).t(), tied=torch.ones(4, 2),
)
views["tied_again"] = views["tied"]
for protocol in (2, 3, 4, 5):
    torch.save(views, f"views_{protocol}.pt", pickle_protocol=protocol)
    torch.save(views, f"views_legacy_{protocol}.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
for protocol in (3, 4, 5):
    with open(f"views_{protocol}.pkl", "wb") as file:
        pickle.dump(views, file, protocol=protocol)
expect("views", views)
for protocol in (0, 1, 2):
    with open(f"refused/text_{protocol}.pkl", "wb") as file:
        pickle.dump({"w": torch.ones(2)}, file, protocol=protocol)

# --- big-endian: this machine writes little-endian, so the storages are turned around --------------------------------------------
wide = {"f32": torch.randn(4, 3), "f64": torch.randn(3), "i64": torch.arange(5), "f16t": torch.randn(2, 6).half().t(), "u8": torch.arange(3, dtype=torch.uint8)}
buffer = io.BytesIO()
torch.save(wide, buffer)
widths = {str(i): value.element_size() for i, value in enumerate(wide.values())}
with zipfile.ZipFile(buffer) as old, zipfile.ZipFile("big_endian.pt", "w", zipfile.ZIP_STORED) as new:
    for info in old.infolist():
        data, last = old.read(info), info.filename.rsplit("/", 1)[-1]
        if "/data/" in info.filename:
            width = widths[last]
            data = b"".join(data[i:i + width][::-1] for i in range(0, len(data), width))
        elif last == "byteorder":
            data = b"big"
        new.writestr(zipfile.ZipInfo(info.filename, (1980, 1, 1, 0, 0, 0)), data)
loaded = torch.load("big_endian.pt")
assert all(torch.equal(loaded[key], wide[key]) for key in wide)
expect("big_endian", wide)


# --- modules ----------------------------------------------------------------------------------------------------------------------
@in_module
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(4, 2)
        self.norm = torch.nn.BatchNorm1d(4)
        self.absent = None
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.arange(4))
        self.register_buffer("dropped", torch.arange(9), persistent=False)


@in_module
class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Parameter(torch.randn(4, 3).t())
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.head = torch.nn.Linear(4, 2, bias=False)
        self.tied = self.head
        self.lookup = {"a": [1, 2.5, None, (True, "x")], "b": {1, 2}}


@in_module
class ImageEncoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.cache_dir = None
        self.function = torch.nn.functional.relu


@in_module
class ClassificationHead(torch.nn.Linear):
    def __init__(self, normalize, weights, biases=None):
        output_size, input_size = weights.shape
        super().__init__(input_size, output_size)
        self.normalize = normalize
        self.weight = torch.nn.Parameter(weights.clone())
        self.bias = torch.nn.Parameter(torch.zeros_like(self.bias))


encoder = Encoder()
wrapped = ImageEncoder(encoder)
torch.save(wrapped, "module.pt")
torch.save(wrapped, "module_legacy.pt", _use_new_zipfile_serialization=False)
torch.save(torch.nn.DataParallel(wrapped), "module_parallel.pt", pickle_protocol=4)
with open("module_raw.pt", "wb") as file:
    pickle.dump(wrapped, file)
assert not any("dropped" in key for key in wrapped.state_dict())
expect("module", encoder.state_dict())
expect("module_stored", wrapped.state_dict())
head = ClassificationHead(True, torch.randn(3, 4))
torch.save(head, "head.pt")
expect("head", head.state_dict())

# --- dictionaries around state dicts ----------------------------------------------------------------------------------------------
small = {"a.weight": torch.randn(2, 3), "b": torch.randn(4)}
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
optimizer.step()
training = {"state_dict": {f"module.{key}": value for key, value in small.items()}, "epoch": 3, "arch": "vit", "optimizer": optimizer.state_dict(), "loss": torch.tensor(0.25)}
torch.save(training, "nested_state_dict.pt")
torch.save({"model": {f"_orig_mod.{key}": value for key, value in small.items()}, "model_ema": {key: value + 1 for key, value in small.items()}}, "nested_model.pt")
torch.save({"model_state_dict": collections.OrderedDict(small), "step": 7}, "nested_model_state_dict.pt", _use_new_zipfile_serialization=False)
torch.save({"weights": {"encoder": small}, "other": {"x": torch.ones(1)}}, "nested_key.pt")
torch.save(collections.OrderedDict((f"module.{key}", torch.nn.Parameter(value)) for key, value in small.items()), "parameters.pt")
torch.save({**small, "note": "text", "scale": 0.5, "list": [1, 2]}, "with_extras.pt")
expect("small", small)
torch.save({"first": small, "second": small}, "refused/ambiguous.pt")
torch.save({"state_dict": small, "model": {"c": torch.ones(1)}}, "refused/ambiguous_known.pt")
torch.save(torch.arange(6.0).reshape(2, 3), "single.pt")
expect("single", {"tensor": torch.arange(6.0).reshape(2, 3)})
torch.save([torch.ones(2), torch.zeros(1)], "list.pt")
expect("list", {"0": torch.ones(2), "1": torch.zeros(1)})
os.makedirs("sharded", exist_ok=True)
torch.save({"a.weight": small["a.weight"]}, "sharded/pytorch_model-00001-of-00002.bin")
torch.save({"b": small["b"]}, "sharded/pytorch_model-00002-of-00002.bin")
index = {"metadata": {"total_size": 40}, "weight_map": {"a.weight": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
with open("sharded/pytorch_model.bin.index.json", "w") as file:
    json.dump(index, file)

# --- what must be refused ---------------------------------------------------------------------------------------------------------
torch.save({"q": torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)}, "refused/quantized.pt")
torch.save({"s": torch.eye(3).to_sparse()}, "refused/sparse.pt")
torch.save({"c": torch.view_as_complex(torch.randn(3, 2)).conj()}, "refused/conjugated.pt")
torch.save({"c": torch.zeros(2, dtype=torch.complex128)}, "refused/complex128.pt")
torch.save({"m": torch.zeros(2, device="meta")}, "refused/meta.pt")
torch.jit.script(torch.nn.Linear(2, 2)).save("refused/script.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


torch.save(Evil(), "refused/evil.pt")
torch.save({**small, "payload": Evil()}, "evil_extra.pt")
evil_module = torch.nn.Linear(2, 2)
evil_module._modules["child"] = Evil()
torch.save(evil_module, "refused/evil_module.pt")
for protocol in (0, 2, 4):
    with open(f"refused/evil_{protocol}.pkl", "wb") as file:
        pickle.dump(Evil(), file, protocol=protocol)

# --- NumPy ------------------------------------------------------------------------------------------------------------------------
values = np.random.default_rng(7).normal(size=(3, 4)).astype("<f4")
np.save("c_order.npy", values)
np.save("fortran.npy", np.asfortranarray(values))
np.save("big_endian.npy", values.astype(">f4"))
for name in ("c_order", "fortran", "big_endian"):
    expect(f"{name}.npy", {"tensor": torch.from_numpy(values)})
arrays = {
    "layer/kernel": values, "f2": values.astype("f2"), "f8": values.astype("f8"), "bool": values > 0, "scalar": np.float32(3).reshape(()),
    "empty": np.zeros((0, 2), "f4"), "fortran": np.asfortranarray(values.astype(">f8")),
    **{code: np.arange(5).astype(code) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")},
}
np.savez("arrays.npz", **arrays)
expect("arrays", {key: torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))).reshape(value.shape)) for key, value in arrays.items()})
np.savez_compressed("refused/compressed.npz", values=np.zeros(1000, "f4"))
np.save("refused/objects.npy", np.array([{"a": 1}, None], dtype=object))
np.save("refused/text.npy", np.array(["a", "b"]))
np.save("refused/complex.npy", np.zeros(2, "c16"))
masks = {f"task{i}Val": np.packbits(np.random.default_rng(i).random(20 + i) > 0.5) for i in range(3)}
np.save("masks.npy", masks)
torch.save(masks, "masks_array.pt")
torch.save(masks, "masks_array_4.pt", pickle_protocol=4)
torch.save({key: torch.from_numpy(value) for key, value in masks.items()}, "masks_tensor.pt")
with open("masks_5.pkl", "wb") as file:
    pickle.dump(masks, file, protocol=5)
expect("masks", {key: torch.from_numpy(value) for key, value in masks.items()})
assert not os.path.exists("executed")

with open("README.md", "w") as file:
    file.write(f"""# Small PyTorch and NumPy files

Written by `generate.py` with torch {torch.__version__}, numpy {np.__version__} and Python {sys.version.split()[0]}. Beside each file, or
each group of files with the same content, lies what PyTorch itself sees in it, as safetensors. `refused/` holds what must not be
read. Some of these pickles ask for `os.system`: load them in Python only where a file `executed` may appear.

`torch-1.13.1` (Python 3.11.7, the oldest torch for it) and `torch-2.15.0` hold what `versions.py` wrote with these versions: the kinds of
files that the programs of the field share, again with what they hold. `../hostile` holds files that were made to do harm, written by the
script there.
""")
