"""A ledger in a file: one .npz with every account, the texts it is of, and what it says."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn.errors import JaxdynError
from jaxdyn.report.archive import Forms, packed_archive, read_archive, require_arrays, require_forms
from jaxdyn.storage.files import write_file

FORMAT = "jaxdyn ledger 1"
WHAT = "a ledger file"

FORMS: Forms = {
    "names": ("U", "checkpoints"),
    "rows": ("iu", "N"),
    "nodes": ("iu", "segments B"),
    "parts/*/*": ("f", "segments N"),
    "values/*": ("f", "checkpoints N"),
    "tokens": ("iu", "B T"),
    "mask": ("b", "B T"),
    **{name: ("iu", "N") for name in ("positions", "targets")},
    "is_prompt": ("b", "N"),
    "prompts": ("U", "B"),
    "pieces": ("U", "N"),
    "by_layer/*/*": ("f", "segments B (layers)"),
    "by_token/*": ("f", "segments layers N"),
    "alternatives": ("iu", "N A"),
    "alternative_pieces": ("U", "N A"),
    "alternative_values": ("f", "checkpoints N A"),
    "alternative_parts/*": ("f", "segments N A"),
}


@dataclasses.dataclass(frozen=True)
class SavedLedger:
    """What the changes between K + 1 checkpoints did at N sites in B texts, as `jaxdyn ledger`
    writes it.

    Segment k leads from checkpoint k to checkpoint k + 1. Log-probs, entropies and KL are in nats.

    Attributes:
      tokens, mask: the texts as token ids [B, T], and which slots hold one.
      rows, positions, targets, is_prompt: the sites [N]: which text, which slot, the id predicted
        there (it lies in the next slot), and whether it is the first after the prompt.
      prompts: the texts' prompts [B]. A completion's text is its sites' `pieces` one after another.
      pieces: what each site's target reads as, [N]; together they give the completion's text.
      names: the checkpoints [K + 1].
      nodes: [K, B], how many nodes the quadrature took for each text.
      values: {quantity: [K + 1, N]}, at every checkpoint.
      parts: {quantity: {component: [K, N]}}, of its change.
      by_layer: {quantity: {kind: [K, B, L]}}, summed over a text's sites; L is 1 for what is not in
        a layer ("classifier", "embedding", "final_norm"). Or empty.
      by_token: {quantity: [K, L + 2, N]}, of each site: of the embedding, every layer, the final
        norm; they add up to the gradient component. Or empty.
      alternatives: [N, A], ids of tokens that were or have become likely, by their change.
      alternative_pieces: [N, A], what they read as.
      alternative_values: [K + 1, N, A], log π of each.
      alternative_parts: {component: [K, N, A]}, of its change.
      about: which models and prompts, with which options, and what it adds up to.
    """

    tokens: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    is_prompt: np.ndarray
    prompts: np.ndarray
    pieces: np.ndarray
    names: np.ndarray
    nodes: np.ndarray
    alternatives: np.ndarray
    alternative_pieces: np.ndarray
    alternative_values: np.ndarray
    alternative_parts: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    parts: dict[str, dict[str, np.ndarray]]
    about: dict[str, Any]
    by_layer: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    by_token: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def change(self, quantity: str) -> np.ndarray:
        """What really changed over each segment, [K, N]."""
        return np.diff(self.values[quantity].astype(np.float64), axis=0)

    def residual(self, quantity: str) -> np.ndarray:
        """The parts' sum less the change, [K, N]: what the quadrature missed."""
        return sum(self.parts[quantity].values()) - self.change(quantity)

    def write(self, path: Path) -> None:
        """Write all of it; see `packed`."""
        write_file(path, self.packed())

    def packed(self) -> bytes:
        """All of it as one compressed .npz, without pickles; a tree's names join by "/"."""
        arrays: dict[str, np.ndarray] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "about":
                arrays |= _flat(field.name, value)
        return packed_archive(FORMAT, self.about, arrays)


def load_ledger(path: str | Path) -> SavedLedger:
    """Read a ledger file again.

    Raises:
      JaxdynError: if it cannot be read, or is not a whole ledger file.
    """
    arrays, about = read_archive(path, WHAT, (FORMAT,))
    sizes = require_forms(path, arrays, FORMS)
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *above, last = name.split("/")
        branch: Any = tree
        for step in above:
            branch = branch.setdefault(step, {}) if isinstance(branch, dict) else None
        if not isinstance(branch, dict):
            raise JaxdynError(f"{path} is not a whole ledger file: it has {name} twice")
        branch[last] = x
    optional = ("about", "by_layer", "by_token")
    fields = [f.name for f in dataclasses.fields(SavedLedger)]
    require_arrays(path, WHAT, [name for name in fields if name not in optional], tree)
    known = {name: tree[name] for name in fields if name in tree}
    if sizes["checkpoints"] != sizes["segments"] + 1:
        raise JaxdynError(
            f"{path}: {sizes['checkpoints']} checkpoints have one segment less between them, got "
            f"{sizes['segments']}"
        )
    if lost := [name for name in known["parts"] if name not in known["values"]]:
        raise JaxdynError(f"{path} is not a whole ledger file: it has no values/{lost[0]}")
    return SavedLedger(**known, about=about)


def _flat(name: str, tree: Any) -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {name: np.asarray(tree)}
    return {
        whole: x
        for key, branch in tree.items()
        for whole, x in _flat(f"{name}/{key}", branch).items()
    }


def summarize_ledger(saved: SavedLedger) -> dict[str, Any]:
    """What a ledger adds up to, from its first checkpoint to its last.

    Of every quantity: the mean `change` a site and its two components; each component's share of
    the changes, Σ part · change / Σ change² over sites (they add up to 1 with the residual's), with
    a 95 % interval from 1000 resamplings of whole texts; the residual's rms relative to the
    change's rms, and the largest number of nodes.
    """
    rows = saved.rows
    texts = np.unique(rows)
    draws = np.random.default_rng(0).integers(0, len(texts), (1000, len(texts)))
    of_text = lambda x: np.bincount(np.searchsorted(texts, rows), x, len(texts))
    quantities = {}
    for name, parts in saved.parts.items():
        change, residual = saved.change(name).sum(axis=0), saved.residual(name).sum(axis=0)
        squares = of_text(change**2)
        found: dict[str, Any] = {"change": float(change.mean())}
        for part, x in parts.items():
            along = of_text(x.sum(axis=0) * change)
            shares = _ratio(along[draws].sum(axis=1), squares[draws].sum(axis=1))
            found[part] = float(x.sum(axis=0).mean())
            found[f"{part}_share"] = float(_ratio(along.sum(), squares.sum()))
            found[f"{part}_share_interval"] = np.quantile(shares, (0.025, 0.975)).tolist()
        rms = lambda x: np.sqrt(np.mean(np.square(x)))
        found["residual"] = float(_ratio(rms(residual), rms(change)))
        quantities[name] = found
    return {
        "checkpoints": saved.names.tolist(),
        "texts": len(texts),
        "sites": len(rows),
        "nodes": int(saved.nodes.max()),
        "quantities": quantities,
        "about": saved.about,
    }


def _ratio(x: Any, y: Any) -> Any:
    return np.divide(x, y, out=np.zeros_like(np.asarray(x, float)), where=np.asarray(y) > 0)
