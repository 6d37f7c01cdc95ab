"""Cases of bad tensors: missing, of another dtype or shape, with bad values."""

import math

import ml_dtypes
import numpy as np

from jax_nvfp4_moe.checkpoint import (
    ConfigError,
    MissingInputScaleError,
    ScaleError,
    TensorError,
    UnsupportedCheckpointError,
)
from tests.support.checkpoints import E, H
from tests.support.fuzz.cases import EITHER, case, name_of, on_tensors
from tests.support.fuzz.files import ITEMSIZE, PARTS

PROJECTION = "model.layers.1.mlp.experts.3.{}_proj"  # whose tensors are spoilt
UP = PROJECTION.format("up")
ROUTER = "model.layers.0.mlp.gate.weight"


def on_tensor(name, change):
    def spoil(tensors):
        tensors[name] = change(*tensors[name])

    return on_tensors(spoil)


def with_dtype(dtype):
    def change(_, shape, content):
        size = math.prod(shape) * ITEMSIZE[dtype]
        return dtype, shape, (content * 8)[:size]

    return change


def with_shape(of):
    def change(dtype, shape, content):
        shape = of(shape)
        size = math.prod(shape) * ITEMSIZE[dtype]
        return dtype, shape, (content * (1 + size // len(content)))[:size]

    return change


def with_float(value):
    return lambda dtype, shape, _: (dtype, shape, np.float32(value).tobytes())


def with_byte(byte):
    return lambda dtype, shape, content: (dtype, shape, content[:9] + bytes([byte]) + content[10:])


def with_extra(name, dtype, *shape):
    content = bytes(math.prod(shape) * ITEMSIZE[dtype])
    return on_tensors(lambda tensors: tensors.update({name: (dtype, shape, content)}))


MATRIX_SHAPES = {
    "a-row-less": lambda s: (s[0] - 1, s[1]),
    "a-column-less": lambda s: (s[0], s[1] - 1),
    "thrice-the-rows": lambda s: (3 * s[0], s[1]),
    "transposed": lambda s: s[::-1],
    "flat": lambda s: (s[0] * s[1],),
    "axis-before": lambda s: (1, *s),
    "axis-after": lambda s: (*s, 1),
    "no-rows": lambda s: (0, s[1]),
    "scalar": lambda s: (),
    "padded-to-128": lambda s: (128, -(-s[1] // 4) * 4),
}
SCALAR_SHAPES = {"two": (2,), "none": (0,), "matrix": (1, 1), "cube": (1, 1, 1), "experts": (E,)}
NOT_SCALES = [0.0, -0.0, -0.02, math.nan, math.inf, -math.inf, 1e-40]


def tensor_cases(kind):
    data, blocks, *scalars = PARTS[kind]
    for role in ("gate", "up", "down"):
        for part in PARTS[kind]:
            name = f"{PROJECTION.format(role)}.{part}"
            error = MissingInputScaleError if part == scalars[1] else TensorError
            case(
                f"without-{role}-{part}",
                on_tensors(lambda tensors, name=name: tensors.pop(name)),
                error,
                kind,
            )
    for part, name in ((data, f"{PROJECTION.format('down')}.{data}"), (blocks, f"{UP}.{blocks}")):
        for title, shape in MATRIX_SHAPES.items():
            case(f"{part}-{title}", on_tensor(name, with_shape(shape)), TensorError, kind)
    for part in scalars:
        for title, shape in SCALAR_SHAPES.items():
            change = with_shape(lambda _, shape=shape: shape)
            case(f"{part}-{title}", on_tensor(f"{UP}.{part}", change), TensorError, kind)
        for value in NOT_SCALES:
            case(f"{part}-{value}", on_tensor(f"{UP}.{part}", with_float(value)), ScaleError, kind)
    one_byte = ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "F32")
    four_bytes = ("I32", "U32", "F64", "BF16", "F16", "F8_E4M3")
    for part, own, dtypes in [
        (data, "U8", one_byte),
        (blocks, "F8_E4M3", one_byte),
        (scalars[0], "F32", four_bytes),
        (scalars[1], "F32", four_bytes),
    ]:
        for dtype in dtypes:
            if dtype != own:
                spoil = on_tensor(f"{UP}.{part}", with_dtype(dtype))
                case(f"{part}-as-{dtype}", spoil, TensorError, kind)
    for byte in (0x7F, 0xFF, 0xB8, 0x81, 0xFE, 0x00, 0x80):
        case(
            f"block-scale-{byte:#x}", on_tensor(f"{UP}.{blocks}", with_byte(byte)), ScaleError, kind
        )
    extra = f"{UP}.pre_quant_scale", "F32", H
    case("leftover", with_extra(*extra), UnsupportedCheckpointError, kind)


def router_cases():
    for value in (math.nan, math.inf, -math.inf):
        content = np.full((E, H), value, ml_dtypes.bfloat16).tobytes()
        spoil = on_tensor(ROUTER, lambda dtype, shape, _, content=content: (dtype, shape, content))
        case(f"router-{value}", spoil, TensorError)
    for dtype in ("I16", "F64", "U8"):
        case(f"router-as-{dtype}", on_tensor(ROUTER, with_dtype(dtype)), TensorError)
    for title, shape in MATRIX_SHAPES.items():
        case(f"router-{title}", on_tensor(ROUTER, with_shape(shape)), TensorError)
    case("router-missing", on_tensors(lambda tensors: tensors.pop(ROUTER)), TensorError)


def other_tensor_cases():
    for name, dtype, outcome in [
        ("counts", "I64", TensorError),
        ("sums", "F64", TensorError),
        ("waves", "C64", TensorError),
        (name_of(0, 0, "up", "bias"), "F32", TensorError),
        (name_of(0, E, "up", "weight_scale"), "F8_E4M3", TensorError),
        (name_of(0, E, "up", "weight"), "U8", UnsupportedCheckpointError),
        (name_of(0, 0, "up", "weight\u0441scale"), "U8", UnsupportedCheckpointError),
        (name_of(0, 0, "up", ""), "U8", UnsupportedCheckpointError),
        ("model.layers." + "9" * 5000 + ".x", "U8", EITHER),
        ("model.layers.\u0662.x", "U8", EITHER),
        ("\u0000\u2028\U0001f600", "U8", EITHER),
        ("", "U8", EITHER),
    ]:
        case(f"extra-{ascii(name)[:60]}-{dtype}", with_extra(name, dtype, 4), outcome)
    for layer in range(2):

        def drop(tensors, start=f"model.layers.{layer}."):
            for name in [name for name in tensors if name.startswith(start)]:
                del tensors[name]

        case(f"without-layer-{layer}", on_tensors(drop), ConfigError)
    case("no-tensors", on_tensors(dict.clear), ConfigError)
