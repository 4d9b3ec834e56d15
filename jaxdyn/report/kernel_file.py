"""A kernel in a file: one .npz with the matrices, the sites they lie between, and what they are."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn import COMPONENTS
from jaxdyn.report.archive import Forms, packed_archive, read_archive, require_arrays, require_forms
from jaxdyn.storage.files import write_file

FORMAT = "jaxdyn kernel 2"
WHAT = "a kernel file"
WITHOUT_STATISTICS = "jaxdyn kernel 1"

FORMS: Forms = {
    "contexts": ("U", "N"),
    **{name: ("f", "N N") for name in (*COMPONENTS, "standard_error")},
    "part_*": ("f", "(layers) N N"),
    "tokens": ("iu", "B T"),
    "mask": ("b", "B T"),
    **{name: ("iu", "M") for name in ("rows", "positions", "targets")},
    "is_prompt": ("b", "M"),
    "features": ("f", "N D"),
    "target_texts": ("U", "N"),
    **{name: ("U", "B") for name in ("prompts", "completions")},
    "spectrum/*": ("f", "(eigenvalues)"),
}

_PART = "part_"
_OPTIONAL = ("standard_error", "features")


@dataclasses.dataclass(frozen=True)
class SavedKernel:
    """A kernel between N places in B texts, by component, as `jaxdyn kernel` writes it.

    Attributes:
      representation, gradient, cross: [N, N]; they add up to `total`.
      parts: the gradient component by kind of parameter and layer, {kind: [L, N, N]}; or empty.
      standard_error: of the total [N, N], where the kernel is an estimate.
      tokens, mask: the texts as token ids [B, T], and which slots hold one.
      rows, positions, targets, is_prompt: the M sites: which text, which slot, the id predicted
        there, and whether it is the first after the prompt. M = N; but between whole completions
        place n is text n, all of its sites together.
      features: φ at the sites [N, D]; none between whole completions.
      contexts, target_texts: what each place follows on (its end), and what is predicted, [N].
      prompts, completions: the texts [B]; a completion is empty where none was given.
      about: what was computed, of which model, with which options: see `jaxdyn.commands.kernel`.
      statistics: spectra, effective ranks, shares and the features' cosines, by names with a slash:
        see `jaxdyn.kernels.summarize`. A file of the first format has none.
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
    prompts: np.ndarray
    completions: np.ndarray
    about: dict[str, Any]
    parts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    standard_error: np.ndarray | None = None
    features: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> np.ndarray:
        return self.representation + self.gradient + self.cross

    def write(self, path: Path) -> None:
        """Write all of it; see `packed`."""
        write_file(path, self.packed())

    def packed(self) -> bytes:
        """All of it as one compressed .npz, without pickles."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {_PART + kind: x for kind, x in fields.pop("parts").items()}
        about = fields.pop("about")
        fields |= {"total": self.total, **parts, **fields.pop("statistics")}
        return packed_archive(
            FORMAT, about, {name: x for name, x in fields.items() if x is not None}
        )


def load_kernel(path: str | Path) -> SavedKernel:
    """Read a kernel file again.

    Raises:
      JaxdynError: if it cannot be read, or is not a whole kernel file.
    """
    arrays, about = read_archive(path, WHAT, (FORMAT, WITHOUT_STATISTICS))
    parts = {n.removeprefix(_PART): x for n, x in arrays.items() if n.startswith(_PART)}
    statistics = {n: x for n, x in arrays.items() if "/" in n}
    apart = ("about", "parts", "statistics")
    wanted = [f.name for f in dataclasses.fields(SavedKernel) if f.name not in apart]
    require_arrays(path, WHAT, [name for name in wanted if name not in _OPTIONAL], arrays)
    require_forms(path, arrays, FORMS)
    known = {name: arrays[name] for name in wanted if name in arrays}
    return SavedKernel(**known, parts=parts, statistics=statistics, about=about)
