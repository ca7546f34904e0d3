"""Ways to spoil a file: its bytes, its JSON, a safetensors header, a zip archive. All draw from a given random.Random.

A mutation returns bytes; it may by chance leave the file as it was.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 8, 63, 127, 255, 256, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1,
           (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, -(1 << 31), -(1 << 63)]
VALUES: list[Any] = [
    None, True, False, *NUMBERS, 0.5, -0.0, 1e308, 1e-308, float("nan"), float("inf"), -float("inf"), 1e-5, "", "a", "\x00",
    "../outside.safetensors", "/etc/passwd", "..", ".", "a/b", "model.safetensors", "\ud800", "\u202e", "\x1b[2J", "é" * 40,
    "F32", "BF16", "F8_E4M3", "I64", "BOOL", "float32", "llama", "memory_mosaics_v1", "memory_mosaics_v2", "linear", "llama3",
    [], {}, [0], [0, 0], [[]], {"a": 1}, [1, 2, 3], "x" * 300, ["x"] * 50, {"content": "a"}, {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3"}, {"type": "linear", "factor": 0}, "__metadata__", "<0x00>", "<|endoftext|>", "ByteLevel", "BPE",
]
NAMES = ["", "a", "__metadata__", "dtype", "shape", "data_offsets", "weight_map", "metadata", "files", "model_type", "vocab_size",
         "hidden_size", "head_dim", "v1", "rope_scaling", "rope_parameters", "quantization_config", "auto_map", "bytes", "sha256",
         "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "\x00", "\ud800", "bos_token", "tokenizer_file"]


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """One to four changes anywhere, blind to what the bytes mean."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        kind = draw.randrange(8)
        at = draw.randrange(len(content) + 1)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(content):
            content[at] = draw.choice((0, 1, 127, 128, 255, ord("/"), ord('"'), ord("{"), draw.randrange(256)))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = draw.randbytes(draw.choice((1, 2, 8, 100)))
        elif kind == 4:
            del content[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 5:
            piece = content[at : at + draw.choice((1, 8, 64, 400))]
            place = draw.randrange(len(content) + 1)
            content[place:place] = piece
        elif kind == 6:
            number = draw.choice(NUMBERS) & ((1 << 64) - 1)
            word = struct.pack("<Q", number)[: draw.choice((2, 4, 8))]
            content[at : at + len(word)] = word
        else:
            content += bytes(draw.choice((1, 3, 4096)))
    return bytes(content)


def mutate_json(draw: random.Random, data: bytes) -> bytes:
    """Changes of the structure; now and then of the text, where JSON's own rules are at stake."""
    if draw.random() < 0.12:
        return _mutate_text(draw, data)
    try:
        value = json.loads(data)
    except ValueError:
        return mutate_bytes(draw, data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _mutate_value(draw, value)
    return json.dumps(value).encode("utf-8")


def _mutate_value(draw: random.Random, value: Any) -> Any:
    """A copy with one node changed."""
    nodes = list(_nodes(value))
    parent, key = draw.choice(nodes)
    if parent is None:
        return draw.choice((value, [value], draw.choice(VALUES))) if draw.random() < 0.2 else _grow(draw, value)
    kind = draw.randrange(7)
    if kind <= 2:
        parent[key] = _near(draw, parent[key]) if draw.random() < 0.5 else _fresh(draw.choice(VALUES))
    elif kind == 3:
        del parent[key]
    elif kind == 4:
        other_parent, other = draw.choice(nodes)
        if other_parent is not None and _has(other_parent, other) and _has(parent, key):
            parent[key] = json.loads(json.dumps(other_parent[other]))
    elif kind == 5 and isinstance(parent, dict):
        parent[draw.choice((draw.choice(NAMES), str(key) + "x", str(key).upper()))] = parent.pop(key)
    else:
        parent[key] = [parent[key]] if draw.random() < 0.5 else {"content": parent[key]}
    return value


def _near(draw: random.Random, value: Any) -> Any:
    """A value of the same kind, a little off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, value * 2, -value, value // 2, float(value), str(value), value + (1 << 32)))
    if isinstance(value, float):
        return draw.choice((value * 2, -value, value // 1, value * 1e30))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), value[::-1], value + "\x00", "../" + value, value * 3))
    if isinstance(value, list) and value:
        return draw.choice((value[:-1], value + value[:1], value[::-1], value * 2, [value]))
    return draw.choice(VALUES)


def _grow(draw: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        value[draw.choice(NAMES)] = _fresh(draw.choice(VALUES))
    elif isinstance(value, list):
        value.insert(draw.randrange(len(value) + 1), _fresh(draw.choice(VALUES)))
    return value


def _fresh(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, (list, dict)) else value


def _has(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def _nodes(value: Any, parent: Any = None, key: Any = None, budget: int = 4000):
    """(parent, key) of every node of a JSON value, the root as (None, None)."""
    waiting = [(value, parent, key)]
    while waiting and budget:
        value, parent, key = waiting.pop()
        budget -= 1
        yield parent, key
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting.extend((child, value, name) for name, child in items)


def _mutate_text(draw: random.Random, data: bytes) -> bytes:
    kind = draw.randrange(9)
    at = data.find(b"{") + 1
    if kind == 0:  # a key twice
        first = data[at : data.find(b",", at)]
        return data[:at] + first + b"," + data[at:]
    if kind == 1:
        depth = draw.choice((50, 2000, 200_000))
        return data[:at] + b'"deep":' + b"[" * depth + b"]" * depth + b"," + data[at:]
    if kind == 2:
        return data[:at] + b'"long":' + b"9" * draw.choice((400, 5000, 100_000)) + b"," + data[at:]
    if kind == 3:
        return b"\xef\xbb\xbf" + data
    if kind == 4:
        return data.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-32", "latin-1")), "replace")
    if kind == 5:
        return data.replace(b'"', b"'", draw.choice((1, 2, 1000)))
    if kind == 6:
        return data[:at] + b'"odd":' + draw.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"01", b"nul")) + b"," + data[at:]
    if kind == 7:
        return data + draw.choice((b" ", b"\n{}", b"\x00", data))
    return data[:at] + b'"\\ud800\\u0000":"\\udfff",' + data[at:]


def mutate_safetensors(draw: random.Random, data: bytes) -> bytes:
    """The header's JSON, its length, or the bytes."""
    kind = draw.random()
    if kind < 0.25 or len(data) < 8:
        return mutate_bytes(draw, data)
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if kind < 0.35:
        wrong = draw.choice((length + 1, length - 1, length * 2, *[number & ((1 << 64) - 1) for number in NUMBERS]))
        return struct.pack("<Q", wrong & ((1 << 64) - 1)) + header + rest
    if kind < 0.5:
        header = _move_spans(draw, header)
    else:
        header = mutate_json(draw, header)
    if draw.random() < 0.1:
        rest = rest[: draw.randrange(len(rest) + 1)] + bytes(draw.choice((0, 0, 1, 64)))
    return struct.pack("<Q", len(header)) + header + rest


def _move_spans(draw: random.Random, header: bytes) -> bytes:
    """Offsets and shapes that are plausible by themselves: shifted, swapped, overlapping."""
    values = json.loads(header)
    entries = [entry for name, entry in values.items() if name != "__metadata__"]
    one, two = draw.choice(entries), draw.choice(entries)
    kind = draw.randrange(5)
    if kind == 0:
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    elif kind == 1:
        one["shape"] = draw.choice((one["shape"][::-1], [1, *one["shape"]], one["shape"] + [1], one["shape"] + [0], [0], []))
    elif kind == 2:
        step = draw.choice((-4, -1, 1, 4, 1 << 40))
        one["data_offsets"] = [offset + step for offset in one["data_offsets"]]
    elif kind == 3:
        one["dtype"] = draw.choice(("F64", "F32", "F16", "BF16", "I32", "U8", "F8_E5M2", "F4", "f32"))
    else:
        one["data_offsets"] = list(two["data_offsets"])
    return json.dumps(values).encode()


def mutate_torch(draw: random.Random, data: bytes) -> bytes:
    """A .pt: its bytes, its members, or the pickle within, with checksums that are right again."""
    if draw.random() < 0.25:
        return mutate_bytes(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    kind = draw.random()
    if kind < 0.7:
        members = [(name, _mutate_pickle(draw, body) if name.endswith("data.pkl") else body) for name, body in members]
    else:
        place = draw.randrange(len(members))
        name, body = members[place]
        action = draw.randrange(6)
        if action == 0:
            del members[place]
        elif action == 1:
            members.append((name, body))
        elif action == 2:
            members[place] = (draw.choice((name + "x", "../" + name, "/" + name, name.upper(), "a/code/x.py", "")), body)
        elif action == 3:
            members[place] = (name, mutate_bytes(draw, body))
        elif action == 4:
            members[place] = (name, b"")
        else:
            members.insert(0, (draw.choice(("archive/constants.pkl", "archive/.data/serialization_id", "x/y")), draw.randbytes(20)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body)
    return out.getvalue()


_WORDS = [b"torch._utils", b"_rebuild_tensor_v2", b"collections", b"OrderedDict", b"FloatStorage", b"storage", b"torch", b"cpu",
          b"model_args", b"model", b"n_head", b"n_embd", b"n_layer", b"block_size", b"vocab_size", b"bias", b"pmem_count", b"weight"]
_OTHER_WORDS = [b"os", b"system", b"builtins", b"eval", b"posix", b"_rebuild_parameter", b"HalfStorage", b"BoolStorage", b"UntypedStorage",
                b"cuda:0", b"meta", b"", b"dict", b"torch.nn", b"Parameter", b"BoolTensor", b"getattr", b"_rebuild_sparse_tensor"]


def _mutate_pickle(draw: random.Random, program: bytes) -> bytes:
    kind = draw.randrange(4)
    if kind == 0:
        return mutate_bytes(draw, program)
    if kind == 1:  # a word for another, in place: GLOBAL's are lines, text has its length in front
        old, new = draw.choice(_WORDS), draw.choice(_WORDS + _OTHER_WORDS)
        if draw.random() < 0.5:
            return program.replace(old + b"\n", new + b"\n", 1)
        return program.replace(struct.pack("<I", len(old)) + old, struct.pack("<I", len(new)) + new, draw.choice((1, 1000)))
    if kind == 2:  # a small number for another: sizes, strides, offsets, storage lengths, settings
        places = [i for i in range(len(program) - 1) if program[i : i + 1] in (b"K", b"M", b"J")]
        at = draw.choice(places)
        wide = {b"K": 1, b"M": 2, b"J": 4}[program[at : at + 1]]
        number = draw.choice(NUMBERS)
        if draw.random() < 0.5:
            word = struct.pack("<q", number & ((1 << 31) - 1))[:4]
            return program[:at] + b"J" + word + program[at + 1 + wide :]
        long = number.to_bytes(16, "little", signed=True).rstrip(b"\x00") + b"\x00" if number >= 0 else b"\xff"
        return program[:at] + b"\x8a" + bytes([len(long)]) + long + program[at + 1 + wide :]
    at = draw.randrange(2, len(program))  # an instruction more
    extra = draw.choice((b"N", b"0", b"2", b"]", b"}", b")", b"(", b"t", b"R", b"b", b"Q", b"s", b"u", b"e", b"q\x01", b"h\x00", b"h\x05",
                         b"cos\nsystem\n", b"c__builtin__\nbytearray\n", b"ctorch\nFloatStorage\n", b"\x81", b"\x93", b"i", b"\x8c\x01a"))
    return program[:at] + extra + program[at:]
