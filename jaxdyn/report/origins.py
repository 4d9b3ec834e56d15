"""Where an update's effect at a site came from, and how much of it cancelled.

The origins of a site's change are disjoint and sum to all completions' contributions:

    itself      its own token, where the site is one of a completion's
    completion  the rest of its completion
    group       the other completions of its prompt
    other       the completions of other prompts
"""

from typing import Any

import numpy as np

from jaxdyn import COMPONENTS
from jaxdyn.report.influence_file import FUNCTIONS, SavedInfluence

ORIGINS = ("itself", "completion", "group", "other")
SIGNS = ("positive", "zero", "negative")


def by_origin(saved: SavedInfluence) -> dict[str, np.ndarray]:
    """The completions' contributions by origin, {origin: [3, 2, O]}."""
    members = np.arange(len(saved.group))[None]
    own = saved.site_completion[:, None] == members
    group = (saved.site_group[:, None] == saved.group[None]) & ~own
    over = lambda which: np.einsum("ptou,ou->pto", saved.components, which)
    itself = np.zeros(saved.components.shape[:3]) if saved.itself is None else saved.itself
    return {
        "itself": itself,
        "completion": over(own) - itself,
        "group": over(group),
        "other": over(~own & ~group),
    }


def completion_signs(saved: SavedInfluence) -> np.ndarray:
    """The sign of each completion's advantage, or of the sum of its tokens' ones, [U]."""
    advantages = saved.advantages
    if advantages.ndim == 2:
        advantages = np.where(saved.completion_mask, advantages, 0).sum(axis=1)
    return np.sign(advantages)


def by_sign(saved: SavedInfluence) -> dict[str, np.ndarray]:
    """The completions' contributions by the sign of the advantage, {sign: [3, 2, O]}."""
    signs = completion_signs(saved)
    names = zip((1, 0, -1), SIGNS, strict=True)
    return {name: saved.components[..., signs == sign].sum(axis=-1) for sign, name in names}


def cancellation(contributions: np.ndarray) -> np.ndarray:
    """Σ_o (Σ_u K_ou)² / Σ_ou K_ou² of [..., O, U]: U where all push alike, 1 where they are
    independent, 0 where they cancel; NaN where nothing pushes."""
    whole = (contributions.sum(axis=-1) ** 2).sum(axis=-1)
    apart = (contributions**2).sum(axis=(-1, -2))
    return np.divide(whole, apart, out=np.full_like(whole, np.nan), where=apart > 0)


def summarize_influence(saved: SavedInfluence) -> dict[str, Any]:
    """Means over the sites, in nats, by what moved them and by component; and root mean squares.

    Of log π and of H: {"mean": {column: {component: x}}, "rms": {column: x}, "cancellation":
    {component: x}}. Columns are the origins, the signs of the advantages, and of an update what
    else there is. What is not defined is left out.
    """
    columns = {**by_origin(saved), **{f"advantage_{k}": x for k, x in by_sign(saved).items()}}
    columns |= {**saved.others, **saved.by_batch}
    ends = {"completions": saved.total.sum(axis=-1)}
    for name in ("first_order", "residual", "second_order", "actual"):
        if (x := getattr(saved, name)) is not None:
            ends[name] = x
    rms = lambda x: float(np.sqrt(np.mean(x**2)))
    found: dict[str, Any] = {}
    for number, function in enumerate(FUNCTIONS):
        means: dict[str, Any] = {}
        for name, x in columns.items():
            means[name] = {part: float(x[i, number].mean()) for i, part in enumerate(COMPONENTS)}
            means[name]["total"] = float(x[:, number].sum(axis=0).mean())
        means |= {name: {"total": float(x[number].mean())} for name, x in ends.items()}
        sizes = {name: rms(x[:, number].sum(axis=0)) for name, x in columns.items()}
        sizes |= {name: rms(x[number]) for name, x in ends.items()}
        cancelled = {
            part: float(x)
            for part, x in zip(
                (*COMPONENTS, "total"),
                cancellation(np.stack([*saved.components[:, number], saved.total[number]])),
                strict=True,
            )
            if np.isfinite(x)
        }
        found[function] = {"mean": means, "rms": sizes, "cancellation": cancelled}
    return found
