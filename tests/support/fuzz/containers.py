"""Cases of bad files: the index, shards, headers, and random bytes."""

import json
import math

import numpy as np

from jax_nvfp4_moe.checkpoint import (
    ConfigError,
    ShardError,
    TensorError,
)
from tests.support.checkpoints import H
from tests.support.fuzz.cases import EITHER, case, name_of, replaced
from tests.support.fuzz.files import BASES, INDEX, ONE, Special, split, with_header


def on_index(change):
    def spoil(files):
        index = json.loads(files[INDEX])
        found = change(index["weight_map"])
        files[INDEX] = json.dumps(index if found is None else found).encode()

    return spoil


def index_cases():
    first, second, _ = (name for name in BASES["shards"] if name.endswith("safetensors"))
    for name, outcome in {
        "../x.safetensors": ShardError,
        "../../../../../etc/passwd": ShardError,
        "/etc/passwd": ShardError,
        "/x.safetensors": ShardError,
        "a/x.safetensors": ShardError,
        "./x.safetensors": ShardError,
        "..\\x.safetensors": ShardError,
        "C:\\x.safetensors": ShardError,
        "~/x.safetensors": ShardError,
        "": ShardError,
        ".": ShardError,
        "..": ShardError,
        "config.json": ShardError,
        INDEX: ShardError,
        "x.safetensors": ShardError,
        "x.safetensors ": ShardError,
        "\u202e.safetensors": ShardError,
        "\x00.safetensors": ShardError,
        "\ud800.safetensors": ShardError,
        "x" * 300 + ".safetensors": ShardError,
        "x" * 5000 + ".safetensors": ShardError,
        second: TensorError,
    }.items():
        spoil = on_index(lambda places, name=name: places.update({"lm_head.weight": name}))
        case(f"index-{ascii(name)[:60]}-{len(name)}", spoil, outcome, "shards")
    for value in (None, 5, 1.5, True, [first], {"file": first}):
        spoil = on_index(lambda places, value=value: places.update({"lm_head.weight": value}))
        case(f"index-value-{value}", spoil, ConfigError, "shards")
    for title, found in {
        "list": [],
        "no-map": {},
        "null-map": {"weight_map": None},
        "list-map": {"weight_map": [first]},
        "string-map": {"weight_map": first},
        "number": 5,
    }.items():
        case(f"index-{title}", on_index(lambda _, found=found: found), ConfigError, "shards")
    good = BASES["shards"][INDEX]
    for title, content in {
        "empty": b"",
        "garbage": bytes(range(256)),
        "cut": good[:-2],
        "nan": b"NaN",
        "deep": b'{"weight_map": ' + b"[" * 10**5,
        "deep-in-map": b'{"weight_map": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}",
        "twice": good.replace(b'"weight_map": {', b'"weight_map": {"lm_head.weight": "x", '),
        "two-maps": good[:-1] + b', "weight_map": {}}',
        "folder": Special("folder"),
        "huge": Special("size", 1 << 33),
    }.items():
        case(f"index-{title}", replaced(INDEX, content), ConfigError, "shards")
    case("index-empty-map", on_index(dict.clear), ConfigError, "shards")
    expert = name_of(1, 3, "up", "weight")
    case(
        "index-without-a-matrix", on_index(lambda p: p.pop(expert) and None), TensorError, "shards"
    )
    case("index-without-a-norm", on_index(lambda p: p.pop("model.norm.weight") and None), EITHER,
         "shards")  # fmt: skip
    case("index-with-a-ghost", on_index(lambda p: p.update(ghost=first)), TensorError, "shards")
    for title, content in {
        "missing": None,
        "empty": b"",
        "folder": Special("folder"),
        "link-to-itself": Special("link", first),
        "link-to-nothing": Special("link", "nothing"),
        "link-to-config": Special("link", "config.json"),
        "fifo": Special("fifo"),
        "zeros": Special("size", 1 << 20),
        "many-zeros": Special("size", 1 << 40),
    }.items():
        case(f"shard-{title}", replaced(first, content), ShardError, "shards")
    case("shard-link-to-another", replaced(first, Special("link", second)), TensorError, "shards")
    case("shard-is-another", replaced(first, BASES["shards"][second]), TensorError, "shards")
    case("index-link-to-itself", replaced(INDEX, Special("link", INDEX)), EITHER, "shards")

    case("no-files", replaced(ONE, None), ShardError)
    for title, content in {
        "copy": BASES["modelopt"][ONE],
        "empty": b"",
        "folder": Special("folder"),
        "link-to-nothing": Special("link", "nothing"),
    }.items():
        case(f"second-file-{title}", replaced("other.safetensors", content), ShardError)


def on_header(change):
    """Changes a header as JSON, and keeps its order and the data."""

    def spoil(files):
        entries, data = split(files[ONE])
        found = change(entries)
        files[ONE] = with_header(entries if found is None else found, data)

    return spoil


def on_entry(**changes):
    return on_header(lambda entries: entries["model.embed_tokens.weight"].update(changes))


def header_cases():
    raw_file = BASES["modelopt"][ONE]
    length = int.from_bytes(raw_file[:8], "little")
    for value in (0, 1, 2, 7, length - 8, length - 1, length + 1, length + 8, len(raw_file) - 8,
                  len(raw_file), 99_999_999, 10**8 + 1, 2**31, 2**32 + length, 2**62, 2**63,
                  2**64 - 8, 2**64 - 1):  # fmt: skip
        changed = value.to_bytes(8, "little") + raw_file[8:]
        case(f"header-length-{value}", replaced(ONE, changed), ShardError)
    begin, end = split(raw_file)[0]["model.embed_tokens.weight"]["data_offsets"]
    for title, changes in {
        "negative-shape": {"shape": [-32, -H]},
        "other-shape": {"shape": [32, H + 1]},
        "huge-shape": {"shape": [2**40, H]},
        "overflowing-shape": {"shape": [2**33, 2**33]},
        "overflow-to-right-size": {"shape": [2**60 + 32, H]},
        "float-shape": {"shape": [32.0, H]},
        "text-shape": {"shape": "32"},
        "null-shape": {"shape": None},
        "bool-shape": {"shape": [True, H]},
        "nested-shape": {"shape": [[32], H]},
        "too-big-int": {"shape": [2**64 + 32, H]},
        "reversed-offsets": {"data_offsets": [end, begin]},
        "overlap": {"data_offsets": [begin - 8, end - 8]},
        "overlap-first": {"data_offsets": [0, end - begin]},
        "gap": {"data_offsets": [begin + 8, end + 8]},
        "beyond": {"data_offsets": [begin + len(raw_file), end + len(raw_file)]},
        "far-beyond": {"data_offsets": [2**62, 2**62 + end - begin]},
        "wrapping": {"data_offsets": [2**64 - 8, 2**64 - 8 + end - begin]},
        "negative-offsets": {"data_offsets": [-8, end - begin - 8]},
        "three-offsets": {"data_offsets": [begin, end, end]},
        "one-offset": {"data_offsets": [begin]},
        "null-offsets": {"data_offsets": None},
        "float-offsets": {"data_offsets": [float(begin), float(end)]},
        "nan-offsets": {"data_offsets": [math.nan, end]},
        "unknown-dtype": {"dtype": "F33"},
        "lower-case-dtype": {"dtype": "bf16"},
        "null-dtype": {"dtype": None},
        "number-dtype": {"dtype": 16},
        "wider-dtype": {"dtype": "F32"},
        "narrower-dtype": {"dtype": "U8"},
        "four-bits-too-few": {"dtype": "F4"},
    }.items():
        case(f"header-{title}", on_entry(**changes), ShardError)
    for title, (dtype, shape), outcome in [
        ("four-bits", ("F4", [32, 4 * H]), TensorError),
        ("complex", ("C64", [32, H // 4]), TensorError),
        ("wide", ("I64", [32, H // 4]), TensorError),
        ("rank-20", ("BF16", [1] * 18 + [32, H]), EITHER),
        ("rank-64", ("BF16", [1] * 62 + [32, H]), EITHER),
        ("rank-65", ("BF16", [1] * 63 + [32, H]), TensorError),
        ("rank-1000", ("BF16", [1] * 998 + [32, H]), TensorError),
    ]:
        case(f"header-{title}", on_entry(dtype=dtype, shape=shape), outcome)
    for title, shape, outcome in [
        ("nothing", [0], EITHER),
        ("long-nothing", [0, 2**40], EITHER),
        ("very-long-nothing", [0, 2**62], TensorError),
        ("endless-nothing", [2**63, 0, 2**63], TensorError),
    ]:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        case(f"header-{title}", on_header(lambda e, entry=entry: {"nothing": entry, **e}), outcome)
    for key in ("dtype", "shape", "data_offsets"):
        case(
            f"header-without-{key}",
            on_header(lambda e, key=key: e["model.embed_tokens.weight"].pop(key) and None),
            ShardError,
        )
    for title, value in {
        "null": None,
        "number": 5,
        "string": "BF16",
        "list": ["BF16", [32, H], [begin, end]],
        "empty": {},
        "empty-list": [],
    }.items():
        change = on_header(lambda e, value=value: e.update({"model.embed_tokens.weight": value}))
        case(f"header-entry-{title}", change, ShardError)
    for value in (5, [], "pt", {"format": 5}, {"format": None}, {"format": {}}):
        change = on_header(lambda e, value=value: e.update(__metadata__=value))
        case(f"header-metadata-{value}", change, ShardError)
    data = split(raw_file)[1]
    text = raw_file[8 : 8 + length].rstrip()
    start = text.index(b'"model.embed_tokens.weight"')
    entry = text[start : text.index(b"}", start) + 1]
    for title, header in {
        "empty": b"",
        "object": b"{}",
        "list": b"[]",
        "null": b"null",
        "garbage": bytes(range(256)),
        "byte-order-mark": b"\xef\xbb\xbf" + text,
        "utf-16": text.decode().encode("utf-16"),
        "nul-after": text + b"\x00" * 8,
        "text-after": text + b"{}",
        "comma-after": text[:-1] + b",}",
        "deep": b'{"a":' * 10**4 + b"1" + b"}" * 10**4,
        "twice": b"{" + entry + b"," + text[1:],
        "twice-other": b"{" + entry.replace(b"BF16", b"F16") + b"," + text[1:],
        "escaped-twice": b"{"
        + entry.replace(b"model.embed_", b"\\u006dodel.embed_")
        + b","
        + text[1:],
        "key-twice": text.replace(entry, entry[:-1] + b', "dtype": "BF16"}'),
        "lone-surrogate": text.replace(b"embed_tokens", b"\\ud800_"),
        "control-character": text.replace(b"embed_tokens", b"embed\x01tokens"),
        "infinity": text.replace(str(begin).encode() + b", ", b"Infinity, "),
    }.items():
        case(f"header-{title}", replaced(ONE, with_header(header, data)), ShardError)
    for surplus in (1, 8, 10**6):
        case(f"surplus-{surplus}", replaced(ONE, raw_file + bytes(surplus)), ShardError)
    case("hollow", replaced(ONE, raw_file[:8] + bytes(100)), ShardError)


def random_cases():
    rng = np.random.default_rng(11)
    for kind in ("modelopt", "encode"):
        raw_file = BASES[kind][ONE]
        start = 8 + int.from_bytes(raw_file[:8], "little")
        for size in sorted({*rng.integers(0, len(raw_file), 12).tolist(), 8, start}):
            case(f"truncated-{size}", replaced(ONE, raw_file[:size]), ShardError, kind)
        for where, low, high, count in (("header", 8, start, 40), ("data", start, None, 40)):
            for position in rng.choice(np.arange(low, high or len(raw_file)), count, replace=False):
                changed = bytearray(raw_file)
                changed[position] ^= 1 << int(rng.integers(8))
                spoil = replaced(ONE, bytes(changed))
                case(f"flip-in-{where}-{position}", spoil, EITHER, kind)
        for number in range(6):
            changed = bytearray(raw_file)
            begin = int(rng.integers(start, len(raw_file) - 512))
            changed[begin : begin + 512] = rng.bytes(512)
            case(f"noise-{number}", replaced(ONE, bytes(changed)), EITHER, kind)
