"""What a report says of a kernel between N places, as numbers by name."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdyn.hosts import host_memory
from jaxdyn.kernels.statistics import effective_rank, share, spectrum
from jaxdyn.types import COMPONENTS


def summarize(
    kernel: Mapping[str, Any], parts: Mapping[str, Any] | None = None, features: Any = None
) -> dict[str, np.ndarray]:
    """Spectra, shares and the features' cosines, in float64 on the host.

    Args:
      kernel: [N, N] by component.
      parts: the gradient component by kind of parameter and layer, {kind: [L, N, N]}.
      features: φ at the N places, [N, D].

    Returns:
      Arrays by name; a component that is zero everywhere has none.
      spectrum/{name} [N] and effective_rank/{name}: of "total" and of each component.
      share/{component} [3]: ⟨part, total⟩ / ⟨total, total⟩ over all pairs, over the places with
        themselves and over two places; share_by_layer/{kind} [L]: over all pairs.
      features/cosines [N (N − 1) / 2]: of every two places, NaN where a feature is zero.
    """
    with host_memory(), jax.enable_x64(True):
        wide = lambda x: np.asarray(x, np.float64)
        matrices = {name: wide(kernel[name]) for name in COMPONENTS}
        total = functools.reduce(np.add, matrices.values())
        on = np.eye(len(total), dtype=bool)
        groups = np.ones_like(on), on, ~on
        found: dict[str, Any] = {}
        for name, matrix in {"total": total, **matrices}.items():
            if not matrix.any():
                continue
            found[f"spectrum/{name}"] = spectrum(matrix)
            found[f"effective_rank/{name}"] = effective_rank(found[f"spectrum/{name}"])
            if name != "total":
                found[f"share/{name}"] = [
                    share(matrix[among], total[among]) if among.any() else np.nan
                    for among in groups
                ]
        for kind, stack in (parts or {}).items():
            found[f"share_by_layer/{kind}"] = [share(wide(x), total) for x in stack]
        if features is not None:
            phi = wide(features)
            unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
            found["features/cosines"] = (unit @ unit.T)[np.triu_indices(len(phi), k=1)]
        return {name: np.asarray(x, np.float64) for name, x in found.items()}
