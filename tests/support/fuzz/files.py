"""Good checkpoints as the bytes of their files, which cases spoil."""

import dataclasses
import json
import os

import numpy as np

from tests.support.checkpoints import made

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
PARTS = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "encode": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}
PARTS["shards"] = PARTS["modelopt"]
ITEMSIZE = {
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "I16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "C64"), 8),
}
DTYPES = {
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "bfloat16": "BF16",
    "float32": "F32",
}  # the dtypes of the good checkpoints


@dataclasses.dataclass(frozen=True)
class Special:
    """Something in a file's place: a "link" to a name, a "folder", a "fifo", "size" zeros."""

    kind: str
    value: object = None


def header_bytes(entries):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return raw + b" " * (-len(raw) % 8)


def with_header(entries, data, length=None):
    """A safetensors file with any header, and its true length or another one."""
    raw = header_bytes(entries)
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def split(raw):
    """A file's header, as JSON has it, and its data."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def unpacked(raw):
    """The tensors of a safetensors file: names to (dtype, shape, bytes)."""
    entries, data = split(raw)
    entries.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }


def packed(tensors):
    """The inverse of `unpacked`."""
    entries, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    return with_header(entries, data)


def base(kind):
    """The files of a good checkpoint: "modelopt", "encode", or "shards", which has an index."""
    written = made(np.random.default_rng(7), encode=kind == "encode")
    tensors = {
        name: (DTYPES[tensor.dtype.name], tensor.shape, tensor.tobytes())
        for name, tensor in sorted(written.tensors.items())
    }
    files = {"config.json": json.dumps(written.config).encode()}
    if kind != "shards":
        return {**files, ONE: packed(tensors)}
    shards = {f"model-{n + 1:05d}-of-00003.safetensors": list(tensors)[n::3] for n in range(3)}
    for file, names in shards.items():
        files[file] = packed({name: tensors[name] for name in names})
    places = {name: file for file, names in shards.items() for name in names}
    return {**files, INDEX: json.dumps({"weight_map": places}).encode()}


BASES = {kind: base(kind) for kind in ("modelopt", "encode", "shards")}


def put(path, files):
    path.mkdir()
    for name, content in files.items():
        file = path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content.kind == "link":
            file.symlink_to(content.value)
        elif content.kind == "folder":
            file.mkdir()
        elif content.kind == "fifo":
            os.mkfifo(file)
        else:
            file.touch()
            os.truncate(file, content.value)
