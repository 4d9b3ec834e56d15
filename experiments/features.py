"""Do features vary little from site to site?

Claim (Tomihari 2026, arXiv 2601.04670, the table of prompts' inner products): features of different
prompts are alike, inner products positive, so that the representation component copies an update
everywhere. But all prompts of a chat template end in the same tokens, and all of our story openings
in a full stop, which alone makes features alike. So pairs of sites of different prompts are told
apart: prompts' ends; inside completions, by whether the token before and the place are the same.
Against it the same model with random weights, which for the anagram model is the one before SFT.

Verdict:   "vary little" if sites inside completions with another token before them and at another
           place have a mean cosine above 1/2, its interval over prompts being on that side for
           every base model; "alike at prompts" if more than 0.95 of the prompts' pairs are
           positive, in the same way. With --runs also whether RL made them more alike, over seeds.
Command:   python experiments/features.py --model DIRECTORY --name NAME [--prompts FILE.jsonl]
Time:      half a minute for a small model, two minutes for 135 million parameters (--size small).
Expected:  mean cosines of prompts' ends 0.9 (stories) and 0.35 (anagrams); after other tokens and
           at other places 0.22 and 0.02, and 0 to 0.1 with random weights.
"""

import functools
from argparse import Namespace
from typing import Any

import frame
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, of_size
from inference import bootstrap, sign_flip
from subject import Subject, base_models, experience, parser, seeds_of, subjects

from jaxdyn.dynamics import sites_from_rollout
from jaxdyn.kernels import debiased_cka, effective_rank, participation_ratio, spectrum
from jaxdyn.train import open_run
from jaxdyn.types import Model, Params, Sites

CLAIM = "Features vary little: an update at one site is copied to all others by their alikeness"
SIZES = {"toy": (6, 3), "small": (24, 6), "full": (64, 6)}
"""Prompts, and sites inside each one's completion."""

KINDS = {
    "prompts": "prompts' ends",
    "both": "same token before, same place",
    "token": "same token before, another place",
    "place": "another token before, same place",
    "neither": "another token before, another place",
}
"""Kinds of pairs of sites, always of different prompts; all but the first inside completions."""

ARMS = ("sft", "joint", "classifier_first")
DRAWS = 1000
FEW = 50
"""Pairs below which a kind is not drawn."""


@functools.partial(jax.jit, static_argnums=0)
def by_layer(model: Model, backbone: Params, sites: Sites) -> jax.Array:
    """What each layer's attention reads at the sites, and φ, [L + 1, N, D]."""
    phi, inputs, _ = model.opened(backbone, sites.tokens, sites.mask)
    reads = inputs["layers"]["attention"]["query"]
    every = jnp.concatenate([reads, phi[None]])
    return every[:, sites.rows, sites.positions]


def kinds_of(sites: Sites) -> dict[str, np.ndarray]:
    """Which pairs [N, N] are of each kind."""
    rows, places, first = (np.asarray(x) for x in (sites.rows, sites.positions, sites.is_prompt))
    before = np.asarray(sites.tokens)[rows, places]
    alike = lambda x: x[:, None] == x[None]
    token, place, apart = alike(before), alike(places), ~alike(rows)
    inside = apart & ~first[:, None] & ~first[None]
    return {
        "prompts": apart & first[:, None] & first[None],
        "both": inside & token & place,
        "token": inside & token & ~place,
        "place": inside & ~token & place,
        "neither": inside & ~token & ~place,
    }


def weighted(values: np.ndarray, chosen: np.ndarray, rows: np.ndarray, weights: np.ndarray):
    """Means of `values` over `chosen` pairs with prompts counted `weights` [K, P] times, [K].

    A pair counts as often as the product of its prompts' counts.
    """
    member = np.zeros((weights.shape[1], len(rows)))
    member[rows, np.arange(len(rows))] = 1
    total = member @ np.where(chosen, values, 0) @ member.T
    count = member @ chosen.astype(float) @ member.T
    of = lambda matrix: np.einsum("kp,pq,kq->k", weights, matrix, weights, optimize=True)
    with np.errstate(invalid="ignore"):
        return of(total) / of(count)


def over_prompts(values: np.ndarray, chosen: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """The mean over the pairs, with a 95 % interval over prompts drawn again."""
    prompts = int(rows.max()) + 1
    drawn = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS)
    found = weighted(values, chosen, rows, drawn.astype(float))
    low, high = np.nanquantile(found, (0.025, 0.975))
    mean = weighted(values, chosen, rows, np.ones((1, prompts)))[0]
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def alikeness(features: np.ndarray, sites: Sites) -> dict[str, Any]:
    """Of one layer's features [N, D]: pairs by kind, and the spectra of both kinds of sites."""
    phi, rows = features.astype(np.float64), np.asarray(sites.rows)
    gram = phi @ phi.T
    size = np.sqrt(np.diagonal(gram))
    cosines = gram / size[:, None] / size[None]
    found: dict[str, Any] = {"pairs": {}, "spectrum": {}}
    for kind, chosen in kinds_of(sites).items():
        if not chosen.any():
            continue
        found["pairs"][kind] = {
            "pairs": int(chosen.sum()) // 2,
            "cosine": over_prompts(cosines, chosen, rows),
            "positive": over_prompts((gram > 0).astype(float), chosen, rows),
            "inner": float(gram[chosen].mean()),
        }
    for name, which in (("prompts", sites.is_prompt), ("completions", ~sites.is_prompt)):
        own = phi[np.asarray(which)]
        centred = own - own.mean(axis=0)
        values = lambda x: spectrum(jnp.asarray(x @ x.T, jnp.float32))
        found["spectrum"][name] = {
            "sites": len(own),
            "square": float((own**2).sum(axis=1).mean()),
            "common": float((own.mean(axis=0) ** 2).sum() / (own**2).sum(axis=1).mean()),
            "effective_rank": float(effective_rank(values(own))),
            "effective_rank_centred": float(effective_rank(values(centred))),
            "participation_centred": float(participation_ratio(values(centred))),
        }
    return found


def measure(model: Model, params: Params, sites: Sites, whole: bool = True) -> list[dict]:
    """`alikeness` of every layer, φ last; or of φ alone."""
    found = np.asarray(by_layer(model, model.view(params)["backbone"], sites))
    return [alikeness(x, sites) for x in (found if whole else found[-1:])]


def of_base(subject: Subject, size: str) -> dict[str, Any]:
    """Of a base model and of one with random weights, at completions of the base model."""
    prompts, inside = of_size(SIZES, size)
    sites = sites_from_rollout(experience(subject, "test", prompts, 1, 0).rollout, inside, 0)
    model = subject.model
    return {
        "model": subject.name,
        "prompts": prompts,
        "sites": len(np.asarray(sites.rows)),
        "trained": measure(model, subject.params, sites),
        "random": measure(model, model.init(jax.random.key(0)), sites),
    }


def of_runs(chosen: Namespace, whom: list[Subject]) -> dict[str, list[dict[str, Any]]]:
    """The features φ before and after each training of some arms, at the same sites."""
    found: dict[str, list[dict[str, Any]]] = {}
    if chosen.runs is None:
        return found
    prompts, inside = of_size(SIZES, chosen.size)
    rollout = experience(whom[0], "test", prompts, 1, 0).rollout
    sites = sites_from_rollout(rollout, inside, 0)
    for arm in (arm for arm in frame.arms(chosen.runs) if arm in ARMS):
        found[arm] = []
        for path in frame.trainings(chosen.runs, arm):
            with open_run(path) as run:
                model, after = run.policy(run.steps[-1])
                pair = run.loaded.params, after
            grams = [np.asarray(by_layer(model, p["backbone"], sites))[-1] for p in pair]
            both = [measure(model, params, sites, whole=False)[0] for params in pair]
            found[arm].append(
                {
                    "seed": path.name,
                    **dict(zip(("before", "after"), both, strict=True)),
                    "cka": float(debiased_cka(*(jnp.asarray(x @ x.T) for x in grams))),
                }
            )
    return found


# -- what it says ---------------------------------------------------------------------------------


def against(line: float, interval: dict[str, float]) -> frame.Ruling:
    """Above a line, below it, or neither."""
    if interval["low"] > line:
        return "supported"
    return "not supported" if interval["high"] < line else "undecided"


def widest(intervals: list[dict[str, float]]) -> dict[str, float]:
    """The mean over base models, and the interval that holds each one's."""
    return {
        "mean": float(np.mean([x["mean"] for x in intervals])),
        "low": min(x["low"] for x in intervals),
        "high": max(x["high"] for x in intervals),
    }


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows alone."""
    bases = rows["bases"]
    models = len(bases)
    over = f"{bases[0]['prompts']} prompts, {base_models(models)}"
    pairs = [base["trained"][-1]["pairs"] for base in bases]
    found = []
    for claim, kind, what, line in (
        (CLAIM, "neither", "cosine", 0.5),
        ("Inner products of different prompts' features are positive", "prompts", "positive", 0.95),
    ):
        seen = widest([x[kind][what] for x in pairs])
        random = widest([base["random"][-1]["pairs"][kind][what] for base in bases])["mean"]
        label = "mean cosine of φ" if what == "cosine" else "share of ⟨φ, φ'⟩ above 0"
        found.append(
            Verdict(
                claim,
                against(line, seen),
                f"{label}, {KINDS[kind]}",
                *seen.values(),
                over,
                seeds_of(models),
                note=f"With random weights it is {random:z.2f}.",
            )
        )
    for arm, trainings in rows["runs"].items():
        if len(trainings) < 2:
            continue
        gains = [
            t["after"]["pairs"]["neither"]["cosine"]["mean"]
            - t["before"]["pairs"]["neither"]["cosine"]["mean"]
            for t in trainings
        ]
        low, high = bootstrap(gains)
        p = sign_flip(gains)
        interval = {"low": low, "high": high}
        found.append(
            Verdict(
                f"Training ({arm}) makes features more alike",
                against(0.0, interval) if p < 0.05 else "undecided",
                f"change of the mean cosine of φ, {KINDS['neither']}",
                float(np.mean(gains)),
                low,
                high,
                f"{len(gains)} trainings",
                len(gains),
                p,
            )
        )
    return found


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Cosines by layer and kind, trained and random; and effective ranks."""
    figure, (left, right, ranks) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    bases = rows["bases"]
    for axes, weights in ((left, "trained"), (right, "random")):
        for kind, colour in zip(KINDS, COLOURS, strict=False):
            if min(b[weights][-1]["pairs"].get(kind, {"pairs": 0})["pairs"] for b in bases) < FEW:
                continue
            of = lambda x, key, kind=kind: x["pairs"][kind]["cosine"][key]
            lines = np.array(
                [[[of(x, key) for x in b[weights]] for key in ("mean", "low", "high")]
                 for b in bases], float,
            )  # fmt: skip
            mean, low, high = lines[:, 0].mean(0), lines[:, 1].min(0), lines[:, 2].max(0)
            where = np.arange(len(mean))
            axes.plot(where, mean, color=colour, label=KINDS[kind], marker="o", markersize=3)
            axes.fill_between(where, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0, color="0.6", linewidth=0.7)
        axes.set(ylim=(-0.3, 1.05), xlabel="layer that reads them; last: φ")
        axes.set_title("as trained" if weights == "trained" else "with random weights")
    left.set_ylabel("mean cosine of different prompts' features")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
    for kind, colour in (("prompts", COLOURS[0]), ("completions", COLOURS[1])):
        for weights, dashes in (("trained", "-"), ("random", ":")):
            values = np.array(
                [
                    [x["spectrum"][kind]["effective_rank_centred"] for x in b[weights]]
                    for b in bases
                ],
                float,
            )
            sites = bases[0]["trained"][-1]["spectrum"][kind]["sites"]
            ranks.plot(
                values.mean(0), dashes, color=colour, label=f"{kind} ({sites} sites), {weights}"
            )
    ranks.set(xlabel="layer that reads them; last: φ", ylabel="effective rank, centred")
    ranks.set_ylim(0)
    figure.legend(
        *ranks.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8
    )
    figure.suptitle(
        f"{name}: {bases[0]['prompts']} prompts, {bases[0]['sites']} sites, "
        f"{base_models(len(bases))}; bands: 95 % over prompts, widest over models",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], dict[str, Any], plt.Figure]:
    """The answer of one model."""
    whom = subjects(chosen)
    rows = {"bases": [of_base(x, chosen.size) for x in whom], "runs": of_runs(chosen, whom)}
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "features", find)
