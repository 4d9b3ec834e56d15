"""The microscope: a ledger as a page, where each completion is text and each token has its account.

A page is one file without a network. Its texts and numbers lie in it as JSON, which is data and
never markup or script: the page's own script (`microscope*.js`) shows them as text alone, and its
policy lets no other script run. Arrays are whole, so that a number on the page is the ledger's.
"""

import base64
import gzip
import html
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from jaxdyn.errors import JaxdynError
from jaxdyn.report.ledger_file import SavedLedger
from jaxdyn.report.policy import content_policy
from jaxdyn.storage.files import write_files

PAGE_BYTES = 4_900_000
PAGE_TOKENS = 8192
"""What a page holds at most: of a file that opens at once. One completion is never divided."""

PUSHES = 4
"""Of a token's influences, how many are named on either side; the others are added up."""

_SOURCES = (
    "microscope.html",
    "microscope.css",
    "microscope_ledger.js",
    "microscope_figures.js",
    "microscope_token.js",
    "microscope.js",
)


@dataclass(frozen=True)
class Influence:
    """What each of U training completions of one step did to M sites of a ledger.

    Attributes:
      rows: [M], which sites: indices into the ledger's N.
      contributions: {quantity: {component: [M, U]}}, to the change of each site's quantity.
      texts, prompts: the training completions and their prompts [U].
      advantages: [U].
      about: a sentence on the step and on what the contributions add up to.
    """

    rows: np.ndarray
    contributions: dict[str, dict[str, np.ndarray]]
    texts: np.ndarray
    prompts: np.ndarray
    advantages: np.ndarray
    about: str = ""


def write_microscope(
    saved: SavedLedger, path: Path, influence: Influence | None = None
) -> list[Path]:
    """Write the pages of `microscope_pages`; raises JaxdynError if one cannot be written."""
    pages = microscope_pages(saved, path, influence)
    write_files(pages)
    return list(pages)


def microscope_pages(
    saved: SavedLedger, path: Path, influence: Influence | None = None
) -> dict[Path, str]:
    """The page at `path`, and those of the completions that it has no room for beside it.

    Further pages are named after the first: `ledger.html`, `ledger-2.html`, … All are linked.

    Raises:
      JaxdynError: if the ledger has no sites.
    """
    if not len(saved.rows):
        raise JaxdynError("a ledger of no sites has nothing to show: wanted at least 1, got 0")
    order = np.lexsort((saved.positions, saved.rows))
    texts = np.split(order, np.flatnonzero(np.diff(saved.rows[order])) + 1)
    common = {
        "about": saved.about,
        "names": [str(name) for name in saved.names],
        "totals": _totals(saved),
        "tokens": len(order),
        "completions": len(texts),
    }
    pages = list(_pages(saved, influence, texts))
    paths = [path] + [path.with_stem(f"{path.stem}-{n}") for n in range(2, len(pages) + 1)]
    counts = np.cumsum([0] + [len(page["texts"]) for page in pages])
    links = [
        {"file": p.name, "first": int(first) + 1, "last": int(last)}
        for p, first, last in zip(paths, counts[:-1], counts[1:], strict=True)
    ]
    return {
        target: _page({**common, "pages": links, "page": n, **page}, saved.names)
        for n, (target, page) in enumerate(zip(paths, pages, strict=True))
    }


def _pages(
    saved: SavedLedger, influence: Influence | None, texts: list[np.ndarray]
) -> Iterator[dict[str, Any]]:
    """The data of each page: all of the texts if they fit, or of equal parts of them in turn."""
    tokens = sum(map(len, texts))
    page = _content(saved, influence, texts) if tokens <= PAGE_TOKENS or len(texts) == 1 else None
    size = len(_json(page)) / PAGE_BYTES if page else tokens / PAGE_TOKENS
    if page and (size <= 1 or len(texts) == 1):
        yield page
        return
    each = math.ceil(len(texts) / max(2, math.ceil(size)))
    for start in range(0, len(texts), each):
        yield from _pages(saved, influence, texts[start : start + each])


def _content(
    saved: SavedLedger, influence: Influence | None, texts: list[np.ndarray]
) -> dict[str, Any]:
    """What the script reads: the n sites of some texts, in their order, and their strings once."""
    sites = np.concatenate(texts)
    rows = np.array([saved.rows[text[0]] for text in texts])
    ends = np.cumsum([len(text) for text in texts])
    strings = _Strings()
    at = lambda tree, index, axis: _map(tree, lambda x: _packed(np.take(x, index, axis=axis)))
    of_sites = lambda tree: at(tree, sites, 1)
    data = {
        "texts": [
            {"row": int(row), "start": int(end) - len(text), "end": int(end)}
            for row, end, text in zip(rows, ends, texts, strict=True)
        ],
        "prompts": strings.of(saved.prompts[rows]),
        "pieces": strings.of(saved.pieces[sites]),
        "targets": _packed(saved.targets[sites]),
        "nodes": at(saved.nodes, rows, 1),
        "values": of_sites(saved.values),
        "parts": of_sites(saved.parts),
        "by_layer": at(saved.by_layer, rows, 1),
        "by_token": at(saved.by_token, sites, 2),
        "alternatives": _packed(saved.alternatives[sites]),
        "alternative_pieces": strings.of(saved.alternative_pieces[sites]),
        "alternative_values": of_sites(saved.alternative_values),
        "alternative_parts": of_sites(saved.alternative_parts),
        "influence": influence and _pushes(influence, sites, strings),
    }
    return data | {"strings": strings.all}


def _pushes(influence: Influence, sites: np.ndarray, strings: "_Strings") -> dict[str, Any]:
    """Of each site that has influences the strongest either way, by their sum over components.

    For each quantity: who [m, P], the amounts {component: [m, P]}, P ≤ 2 PUSHES of U in falling
    order, and what all others did together {component: [m]}.
    """
    place = {int(site): n for n, site in enumerate(sites)}
    kept = [m for m, site in enumerate(influence.rows) if int(site) in place]
    count = len(influence.texts)
    ranks = np.arange(count)
    ends = (ranks < PUSHES) | (ranks >= count - PUSHES)
    quantities = {}
    for quantity, parts in influence.contributions.items():
        parts = {name: np.asarray(x, np.float64)[kept] for name, x in parts.items()}
        falling = np.argsort(-sum(parts.values()), axis=1, kind="stable")
        who, rest = falling[:, ends], falling[:, ~ends]
        take = lambda index, tree=parts: {
            name: np.take_along_axis(x, index, axis=1) for name, x in tree.items()
        }
        quantities[quantity] = {
            "who": _packed(who),
            "parts": _map(take(who), _packed),
            "others": _map(take(rest), lambda x: _packed(x.sum(axis=1))),
        }
    return {
        "sites": [place[int(influence.rows[m])] for m in kept],
        "quantities": quantities,
        "texts": strings.of(influence.texts),
        "prompts": strings.of(influence.prompts),
        "advantages": _packed(np.asarray(influence.advantages, np.float64)),
        "about": influence.about,
    }


def _totals(saved: SavedLedger) -> dict[str, Any]:
    """Sums over all sites, of each segment [K]: of the change and of its parts."""
    sums = lambda x: _packed(np.sum(x, axis=1, dtype=np.float64))
    return {
        quantity: {
            "change": sums(np.diff(saved.values[quantity].astype(np.float64), axis=0)),
            "parts": _map(parts, sums),
        }
        for quantity, parts in saved.parts.items()
    }


class _Strings:
    """Strings kept once, and named by their places."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def of(self, texts: np.ndarray) -> dict[str, Any]:
        places = [self._places.setdefault(str(t), len(self._places)) for t in np.ravel(texts)]
        return _packed(np.reshape(places, np.shape(texts)))

    @property
    def all(self) -> list[str]:
        return list(self._places)


def _map(tree: Any, f: Any) -> Any:
    return {k: _map(v, f) for k, v in tree.items()} if isinstance(tree, dict) else f(tree)


def _packed(x: Any) -> dict[str, Any]:
    """An array as text: its little-endian bytes, all first ones first, compressed, in base64.

    A float's sign and exponent say less than their bytes hold, which shows where they lie together.
    """
    x = np.asarray(x)
    kind = "int32" if x.dtype.kind in "iub" else "float64" if x.dtype == np.float64 else "float32"
    x = np.ascontiguousarray(x, np.dtype(kind).newbyteorder("<"))
    planes = np.frombuffer(x.tobytes(), np.uint8).reshape(-1, x.itemsize).T.tobytes()
    data = base64.b64encode(gzip.compress(planes, compresslevel=6, mtime=0)).decode()
    return {"kind": kind, "shape": list(x.shape), "data": data}


def _json(data: Any) -> str:
    """JSON that can lie in a script element: ASCII, without what HTML would read as its own."""
    text = json.dumps(_plain(data), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _plain(x: Any) -> Any:
    """What JSON has; anything else, as a nan, as it reads."""
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if x is None or isinstance(x, str | int) or (isinstance(x, float) and math.isfinite(x)):
        return x
    return str(x)


def _page(data: dict[str, Any], names: np.ndarray) -> str:
    folder = importlib.resources.files("jaxdyn.report")
    template, style, *scripts = (folder.joinpath(name).read_text("utf-8") for name in _SOURCES)
    script = "\n".join(scripts)
    return Template(template).substitute(
        title=html.escape(f"{names[0]} → {names[-1]}: the microscope"),
        policy=content_policy(style, script),
        style=style,
        script=script,
        data=_json(data),
    )
