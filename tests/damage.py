"""Ways to damage a file, by kind and drawn from a seed: what its readers must refuse in one line.

A way is a function of a random generator and a file's content; those of a format know the format.
"""

import gzip
import io
import json
import zipfile

import numpy as np

DEEP = 60_000
HOSTILE = (
    *(None, True, False, -1, 0, 1.5, 10**30, -(10**30), 10**400, 2**31, 2**63, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "0", "a\0b", "\ud800", "x" * 3000, "../../etc"),
    *([], [[]], {}, {"": 0}, ["a"], [-1], [1.5], [None], [10**30], {"a": {"b": [1]}}, "__import__"),
)
"""Values where others belong."""


def one(rng, choices):
    """One of some choices."""
    return choices[int(rng.integers(len(choices)))]


# -- of bytes -------------------------------------------------------------------------------------


def cut(rng, content):
    return content[: int(rng.integers(len(content) + 1))]


def emptied(rng, content):
    return b""


def flipped(rng, content):
    """A few bits turned."""
    changed = bytearray(content)
    for place in rng.integers(len(content), size=int(rng.integers(1, 6))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def overwritten(rng, content):
    """A stretch of it random, or zero."""
    start = int(rng.integers(len(content)))
    stop = min(len(content), start + int(rng.integers(1, 64)))
    new = bytes(stop - start) if rng.random() < 0.5 else rng.bytes(stop - start)
    return content[:start] + new + content[stop:]


def grown(rng, content):
    """More at a place than there should be."""
    start = int(rng.integers(len(content) + 1))
    return content[:start] + rng.bytes(int(rng.integers(1, 64))) + content[start:]


def doubled(rng, content):
    return content + content


def random_bytes(rng, content):
    return rng.bytes(int(rng.integers(1, 200)))


def spliced(rng, content):
    """Brackets, quotes and numbers that are none, somewhere."""
    words = (b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000, b"NaN", b"1e999", b"\\u0000", b"\xff\xfe")
    start = int(rng.integers(len(content) + 1))
    return content[:start] + one(rng, words) + content[start:]


BYTES = (cut, emptied, flipped, overwritten, grown, doubled, random_bytes, spliced)


# -- of JSON --------------------------------------------------------------------------------------


def places(tree, above=()):
    """Every path into a tree of objects and lists."""
    inner = tree.items() if isinstance(tree, dict) else ()
    for key, value in enumerate(tree) if isinstance(tree, list) else inner:
        yield (*above, key)
        yield from places(value, (*above, key))


def replaced(tree, path, value):
    """The tree with another value at a path; without it, where that is `replaced` itself."""
    head, *rest = path
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        changed[head] = replaced(tree[head], rest, value)
    elif value is replaced:
        del changed[head]
    else:
        changed[head] = value
    return changed


def as_json(tree):
    """JSON as no library would refuse to write it: half characters, NaN, long integers."""
    return json.dumps(tree).encode()


def hostile_value(rng, content):
    """One or two values of another kind, or out of any range."""
    tree = json.loads(content)
    for _ in range(int(rng.integers(1, 3))):
        if not (found := list(places(tree))):
            return as_json(one(rng, HOSTILE))
        tree = replaced(tree, one(rng, found), one(rng, HOSTILE))
    return as_json(tree)


def missing_value(rng, content):
    tree = json.loads(content)
    found = list(places(tree))
    return as_json(replaced(tree, one(rng, found), replaced) if found else [])


def swapped_values(rng, content):
    """The value of one field in the place of another's."""
    tree = json.loads(content)
    found = list(places(tree))
    if not found:
        return b"0"
    source = tree
    for key in one(rng, found):
        source = source[key]
    return as_json(replaced(tree, one(rng, found), source))


def hostile_whole(rng, content):
    return as_json(one(rng, HOSTILE))


JSON = (hostile_value, hostile_value, missing_value, swapped_values, hostile_whole)


def of_lines(way):
    """A way of JSON, for one line of many."""

    def damage(rng, content):
        lines = content.split(b"\n")
        full = [place for place, line in enumerate(lines) if line.strip()]
        if not full:
            return b"x"
        place = one(rng, full)
        try:
            lines[place] = way(rng, lines[place])
        except ValueError:  # what the line held was damaged before
            lines[place] = b"{"
        return b"\n".join(lines)

    damage.__name__ = f"line_{way.__name__}"
    return damage


LINES = tuple(map(of_lines, (*JSON, cut, flipped, spliced)))


# -- of .npz --------------------------------------------------------------------------------------


def _rewritten(rng, content, change):
    with np.load(io.BytesIO(content), allow_pickle=False) as saved:
        arrays = dict(saved)
    change(arrays, one(rng, list(arrays)))
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def array_missing(rng, content):
    return _rewritten(rng, content, lambda arrays, name: arrays.pop(name))


def array_of_another_kind(rng, content):
    """An array of another shape, dtype or content; among them objects, which want pickles."""
    kinds = (
        *(np.float32(1), np.zeros(0), np.zeros((1, 1, 1, 1, 1)), np.zeros(3, "datetime64[s]")),
        *(np.full((2, 2), np.nan), np.array(["x"]), np.array([{}], object), np.zeros(2, complex)),
        *(np.array("{"), np.array('{"format": 3}'), np.zeros(2, [("a", "i4")]), np.array(b"\xff")),
    )
    return _rewritten(rng, content, lambda arrays, name: arrays.update({name: one(rng, kinds)}))


def arrays_swapped(rng, content):
    def change(arrays, name):
        other = one(rng, list(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]

    return _rewritten(rng, content, change)


def bomb(rng, content, size=2**30):
    """Few bytes that unpack to a gigabyte."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)}
    packed = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
    with packed as archive, archive.open("a.npy", "w") as array:
        np.lib.format.write_array_header_1_0(array, header)
        for _ in range(size // 2**20):
            array.write(bytes(2**20))
    return file.getvalue()


def header_of_more(rng, content):
    """A header that promises more numbers than there are."""
    shape = one(rng, ((2**40,), (2**62, 2**62), (-1,), (2**31, 0), ("a",), (10**30,)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        with np.load(io.BytesIO(content), allow_pickle=False) as saved:
            names = saved.files
        for name in names:
            head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
            body = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(16)
            archive.writestr(f"{name}.npy", body)
    return file.getvalue()


NPZ = (array_missing, array_of_another_kind, arrays_swapped, header_of_more)


# -- of safetensors -------------------------------------------------------------------------------


def huge_header(rng, content):
    return (8 * 10**13).to_bytes(8, "little") + content[8:]


def _with_header(content, change):
    size = int.from_bytes(content[:8], "little")
    head = change(json.loads(content[8 : 8 + size]))
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def hostile_header(rng, content):
    return _with_header(content, lambda head: json.loads(hostile_value(rng, as_json(head))))


def tensor_of_another_type(rng, content):
    def change(head):
        name = one(rng, [name for name in head if name != "__metadata__"])
        return head | {name: head[name] | {"dtype": one(rng, ("I32", "U32", "F8", "BOOL", "F99"))}}

    return _with_header(content, change)


def weights_not_finite(rng, content):
    """A number of the weights NaN or infinite."""
    size = int.from_bytes(content[:8], "little")
    count = (len(content) - 8 - size) // 4
    place = 8 + size + 4 * int(rng.integers(count))
    bad = np.float32(one(rng, (np.nan, np.inf, -np.inf))).tobytes()
    return content[:place] + bad + content[place + 4 :]


SAFETENSORS = (huge_header, hostile_header, tensor_of_another_type, weights_not_finite)
MUST_REFUSE = (huge_header, tensor_of_another_type, weights_not_finite, emptied, random_bytes, bomb)
"""Whatever the file is, none of these is harmless."""


def gzipped(way):
    """A way, of what a .gz holds."""

    def damage(rng, content):
        return gzip.compress(way(rng, gzip.decompress(content)), mtime=0)

    damage.__name__ = f"gz_{way.__name__}"
    return damage
