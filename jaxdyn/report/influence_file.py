"""An update's account in a file: one .npz with who moved whom, the texts, and all else it did."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn import COMPONENTS
from jaxdyn.report.archive import Forms, packed_archive, read_archive, require_arrays, require_forms
from jaxdyn.storage.files import write_file

FORMAT = "jaxdyn influence 1"
WHAT = "an influence file"

FUNCTIONS = ("log_prob", "entropy")
"""The first axis of the arrays: log π of the site's token, and the entropy H, in nats."""

COLUMNS = ("clipping", "momentum", "decay", "critic")
"""What else an update adds to the sites, beside the completions."""

FORMS: Forms = {
    "contexts": ("U", "O"),
    "group": ("iu", "U"),
    **{name: ("f", "2 O U") for name in COMPONENTS},
    **{name: ("f", "3 2 O") for name in (*COLUMNS, "itself")},
    **{name: ("f", "2 O") for name in ("first_order", "actual")},
    "tokens": ("iu", "B T"),
    "mask": ("b", "B T"),
    **{name: ("iu", "O") for name in ("rows", "positions", "targets")},
    **{name: ("iu", "O") for name in ("site_completion", "site_slot", "site_group")},
    "is_prompt": ("b", "O"),
    "target_texts": ("U", "O"),
    **{name: ("U", "U") for name in ("prompts", "completions")},
    "completion_ids": ("iu", "U C"),
    "completion_mask": ("b", "U C"),
    "weights": ("f", "U C 2"),
    "rewards": ("f", "U"),
    "by_token": ("f", "3 2 O M"),
    "places": ("iu", "M 2"),
    "earlier": ("f", "3 2 O P U"),
    "earlier_steps": ("iu", "P"),
    **{name: ("U", "P U") for name in ("earlier_prompts", "earlier_completions")},
}

_UPDATE = (*COLUMNS, "first_order", "actual")
_EARLIER = ("earlier", "earlier_steps", "earlier_prompts", "earlier_completions")
_OPTIONAL = (*_UPDATE, "itself", "by_token", "places", "rewards", *_EARLIER)


@dataclasses.dataclass(frozen=True)
class SavedInfluence:
    """What U completions did to O sites, as `jaxdyn influence` writes it.

    Attributes:
      representation, gradient, cross: by component [2, O, U]; they add up to `total`. Of an update
        of a run in nats; else in nats per unit of learning rate.
      clipping, momentum, decay, critic: the update's other columns, by component, [3, 2, O].
      first_order: along the update as it was applied, and actual: the whole change, [2, O]. These
        six are None where no update was taken.
      tokens, mask: the sites' sequences [B, T], and which slots hold a token.
      rows, positions, targets, is_prompt: the sites: which sequence, which slot, the token's id,
        whether it is the first after the prompt, [O].
      contexts, target_texts: what comes before each site (its end), and its token, [O].
      site_completion, site_slot: which completion, and which slot of it, a site is; else -1, [O].
      site_group: whose prompt it shares; -1 where no completion has its prompt, [O].
      group: the prompt of each completion, numbered from 0, [U].
      prompts, completions, advantages, rewards: of the completions, [U] (advantages also [U, C]).
      completion_ids, completion_mask: their tokens [U, C].
      weights: ∂loss/∂ log π and ∂loss/∂H of these, [U, C, 2], before the first inner epoch.
      itself: what a site's own token did to it, [3, 2, O]; 0 where the site is no completion's.
      by_token: of single tokens `places` (completion, slot) [M, 2], by component [3, 2, O, M].
      earlier: of the momentum, what the completions of earlier batches did, by component
        [3, 2, O, B, U]; earlier_steps: the batches' steps [B], and earlier_prompts and
        earlier_completions [B, U]. What momentum there is beside them is older (or a critic's).
      about: what was computed, of which model, with which options.
    """

    representation: np.ndarray
    gradient: np.ndarray
    cross: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    is_prompt: np.ndarray
    contexts: np.ndarray
    target_texts: np.ndarray
    site_completion: np.ndarray
    site_slot: np.ndarray
    site_group: np.ndarray
    group: np.ndarray
    prompts: np.ndarray
    completions: np.ndarray
    advantages: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray
    weights: np.ndarray
    about: dict[str, Any]
    clipping: np.ndarray | None = None
    momentum: np.ndarray | None = None
    decay: np.ndarray | None = None
    critic: np.ndarray | None = None
    first_order: np.ndarray | None = None
    actual: np.ndarray | None = None
    itself: np.ndarray | None = None
    by_token: np.ndarray | None = None
    places: np.ndarray | None = None
    rewards: np.ndarray | None = None
    earlier: np.ndarray | None = None
    earlier_steps: np.ndarray | None = None
    earlier_prompts: np.ndarray | None = None
    earlier_completions: np.ndarray | None = None

    @property
    def components(self) -> np.ndarray:
        """[3, 2, O, U]."""
        return np.stack([getattr(self, name) for name in COMPONENTS])

    @property
    def total(self) -> np.ndarray:
        return self.representation + self.gradient + self.cross

    @property
    def others(self) -> dict[str, np.ndarray]:
        """The update's other columns, by component [3, 2, O]."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: x for name, x in found.items() if x is not None}

    @property
    def by_batch(self) -> dict[str, np.ndarray]:
        """The momentum by the step of the batch it came from, and the rest of it, [3, 2, O]."""
        if self.earlier is None or self.earlier_steps is None or self.momentum is None:
            return {}
        each = np.moveaxis(self.earlier.sum(axis=-1), -1, 0)
        found = dict(zip([f"momentum_of_{n}" for n in self.earlier_steps], each, strict=True))
        return found | {"momentum_older": self.momentum - each.sum(axis=0)}

    @property
    def residual(self) -> np.ndarray | None:
        """First order less all columns, [2, O]: what rounding left."""
        if self.first_order is None:
            return None
        columns = sum(x.sum(axis=0) for x in self.others.values())
        return self.first_order - self.total.sum(axis=-1) - columns

    @property
    def second_order(self) -> np.ndarray | None:
        """The actual change less its first order, [2, O]."""
        if self.first_order is None or self.actual is None:
            return None
        return self.actual - self.first_order

    def write(self, path: Path) -> None:
        """Write all of it; see `packed`."""
        write_file(path, self.packed())

    def packed(self) -> bytes:
        """All of it as one compressed .npz, without pickles."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        about = fields.pop("about")
        return packed_archive(
            FORMAT, about, {name: x for name, x in fields.items() if x is not None}
        )


def load_influence(path: str | Path) -> SavedInfluence:
    """Read an influence file again.

    Raises:
      JaxdynError: if it cannot be read, or is not a whole influence file.
    """
    arrays, about = read_archive(path, WHAT, (FORMAT,))
    wanted = [f.name for f in dataclasses.fields(SavedInfluence) if f.name != "about"]
    require_arrays(path, WHAT, [name for name in wanted if name not in _OPTIONAL], arrays)
    require_forms(path, arrays, FORMS)
    return SavedInfluence(**{n: arrays[n] for n in wanted if n in arrays}, about=about)
