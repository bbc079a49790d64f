"""Writes files that were made to do harm. Run with: python generate.py (nothing else is needed; nothing is executed by writing them)."""

import io
import json
import os
import struct
import zipfile

os.chdir(os.path.dirname(os.path.abspath(__file__)))


def archive(name, members):
    with zipfile.ZipFile(name, "w") as file:
        for member, data, method in members:
            info = zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0))
            info.compress_type = method
            file.writestr(info, data)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def integers(values):
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def state_dict(shape, strides):
    """A pickle of {"w": …} over storage 0 with 4 elements."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(4) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(0) + integers(shape) + integers(strides) + b"\x89NtR"
    return b"\x80\x02}" + text("w") + tensor + b"s."


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
plain = state_dict([2, 2], [2, 1])
archive("negative_strides.pt", [("a/data.pkl", state_dict([2, 2], [-2, 1]), STORED), ("a/data/0", bytes(16), STORED)])
archive("enormous.pt", [("a/data.pkl", state_dict([1 << 60], [1]), STORED), ("a/data/0", bytes(16), STORED)])
archive("outside.pt", [("a/data.pkl", plain, STORED), ("a/data/../../../0", bytes(16), STORED)])
archive("bomb.pt", [("a/data.pkl", plain, STORED), ("a/data/0", bytes(4 << 20), DEFLATED)])
archive("bomb_of_opcodes.pt", [("a/data.pkl", b"\x80\x02" + b"(" * (1 << 20) + b".", DEFLATED), ("a/data/0", bytes(16), STORED)])
with open("os_system.pt", "wb") as file:
    file.write(b"cos\nsystem\n(S'touch executed'\ntR.")


def safetensors(name, entries, data):
    header = json.dumps(entries).encode()
    with open(name, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)


entry = {"dtype": "F32", "shape": [2]}
safetensors("overlapping.safetensors", {"a": {**entry, "data_offsets": [0, 8]}, "b": {**entry, "data_offsets": [4, 12]}}, bytes(12))
safetensors("enormous.safetensors", {"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 8]}}, bytes(8))
with open("long_header.safetensors", "wb") as file:
    file.write(struct.pack("<Q", 1 << 40) + b"{}")
