"""Damage to files, by a random generator: bits, cuts, hostile headers and JSON, wrong kinds of files."""

import copy
import json

HOSTILE = (
    *(
        -1,
        0,
        1,
        2,
        3,
        7,
        31,
        33,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64,
        10**9,
        10**12,
        10**30,
        -(2**63),
    ),
    *(
        0.5,
        -0.0,
        1e30,
        float("nan"),
        float("inf"),
        True,
        False,
        None,
        "",
        "x",
        "\0",
        "\ud800",
        "../x",
        "/dev/zero",
    ),
    *(
        [],
        {},
        [[]],
        [0],
        {"a": 1},
        {"rank": 1},
        [1] * 50,
        ["a", 1],
        "float32",
        "bfloat16",
        "int8",
        "gpt2",
    ),
)
"""Values for any place of a JSON file."""
DTYPES = (
    *(
        "BF16",
        "F16",
        "F32",
        "F64",
        "I8",
        "U8",
        "I16",
        "U16",
        "I32",
        "U32",
        "I64",
        "U64",
        "BOOL",
        "C64",
    ),
    *("F8_E4M3", "F8_E5M2", "F4", "bf16", "", "X", None, 3, ["BF16"], {}),
)


def flip(content, rng, begin=0, end=None):
    """Some bits of bytes from ``begin`` to ``end`` turned."""
    content = bytearray(content)
    end = len(content) if end is None else min(end, len(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 16)) if end > begin else 0):
        content[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(content)


def places(value, found=None):
    """Every (container, key) inside a JSON value."""
    found = [] if found is None else found
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(items):
        found.append((value, key))
        places(inner, found)
    return found


def change_value(content, rng, keep=None):
    """One value of JSON text replaced, left out, renamed or doubled; ``keep`` limits the places by their key."""
    value = json.loads(content)
    some = [place for place in places(value) if keep is None or place[1] in keep]
    if not some:
        return content
    holder, key = rng.choice(some)
    how = rng.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice((key + "x", key[:-1], key.upper(), "", "model", "__metadata__"))] = (
            holder.pop(key)
        )
    elif how == 2 and isinstance(holder, dict):
        other, from_there = rng.choice(some)
        holder[key] = copy.deepcopy(other[from_there])
    elif how == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] += rng.choice((-1, 1, 8, -8))
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(value).encode()


def nested(rng, size):
    """JSON that is ``size`` bytes of nothing but depth."""
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    depth = max(1, size // (len(opening) + len(closing)) - 1)
    return (opening * depth + rng.choice(("", "1")) + closing * rng.choice((0, depth))).encode()


def doubled(content, rng):
    """JSON text of an object in which a key is there twice, with two values."""
    value = json.loads(content)
    name = rng.choice(list(value))
    return (
        content.rstrip()[:-1]
        + f", {json.dumps(name)}: {json.dumps(rng.choice(list(value.values())))}}}".encode()
    )


def split(content):
    """Header and data of a safetensors file."""
    begin = 8 + int.from_bytes(content[:8], "little")
    return content[8:begin], content[begin:]


def joined(header, data):
    return len(header).to_bytes(8, "little") + header + data


def headers(content, rng):
    """A safetensors file whose header is changed, with the length that is right for it."""
    header, data = split(content)
    how = rng.randrange(10)
    if how < 2:
        header = flip(header, rng)
    elif how == 2:
        header = change_value(header, rng)
    elif how == 3:
        header = nested(rng, rng.choice((100, 5_000, 200_000)))
    elif how == 4:
        header = doubled(header, rng)
    else:
        header = changed_tensor(header, rng, how)
    return joined(header, data)


def changed_tensor(header, rng, how):
    """One tensor of a header with another dtype, shape, place or name."""
    value = json.loads(header)
    one, other = rng.choices(
        [entry for name, entry in value.items() if name != "__metadata__"], k=2
    )
    (begin, end), shape = one["data_offsets"], one["shape"]
    if how == 5:
        one["dtype"] = rng.choice(DTYPES)
    elif how == 6:
        one["shape"] = rng.choice(
            (
                shape[::-1],
                [],
                [*shape, 1],
                [-1, *shape[1:]],
                [2**62, 4],
                shape[:-1],
                [0, *shape],
                other["shape"],
            )
        )
    elif how == 7:
        one["data_offsets"] = rng.choice(
            (
                *(
                    [end, begin],
                    [begin, end - 1],
                    [begin + 1, end],
                    [begin - end, 0],
                    [0, end - begin],
                    [begin],
                ),
                *(
                    [begin, 2**63],
                    [2**64, 2**64 + end - begin],
                    [-(2**63), 0],
                    [begin, float("inf")],
                    [0.0, 1.5],
                ),
            )
        )
    elif how == 8:
        one["data_offsets"] = other["data_offsets"]
    else:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return json.dumps(value).encode()


def lengths(content, rng):
    """A safetensors file that says another length of its header."""
    size = len(content)
    there = size - 8 - len(split(content)[1])
    wrong = (
        0,
        1,
        2,
        there - 1,
        there + 1,
        size - 8,
        size - 7,
        size,
        10**8,
        2**31,
        2**63,
        2**64 - 1,
    )
    return rng.choice(wrong).to_bytes(8, "little") + content[8:]


def payload(content, rng):
    """Bits of the data alone, which a reader can't see unless a number is not finite any more."""
    begin = len(content) - len(split(content)[1])
    if rng.random() < 0.5:
        return flip(content, rng, begin)
    at, fill = (
        rng.randrange(begin, len(content)),
        rng.choice((b"\xff", b"\0", b"\x7f", b"\x80\x7f")),
    )
    many = (fill * 64)[: min(rng.choice((2, 4, 16, 64)), len(content) - at)]
    return content[:at] + many + content[at + len(many) :]


def cut(content, rng):
    """A part of a file, or a file and more."""
    size = len(content)
    if rng.random() < 0.2:
        return content + rng.choice((b"\0", b" ", b"}", b"\0" * 4096, content))
    if content[8:9] == b"{" and rng.random() < 0.5:
        edge = size - len(split(content)[1])
        return content[: max(0, edge + rng.choice((-1, 0, 1)))]
    return content[: rng.choice((0, 1, 7, 8, 9, size // 2, size - 1, rng.randrange(size)))]
