"""What bfloat16 costs in accuracy: every quantity against float64, beside float32.

Claims (sequences that the model samples itself, so that tokens are as frequent as they are):
  passes     features and logits are off by one or two percent.
  gradients  of a supervised and of a group-relative loss, by kind of parameter and path: off by no
             more in the tables, whose rows add thousands of cotangents up, than in the matrices.
  kernels    log-prob, update and trace kernel, and Δ log π to first order, at sites of the samples.
  probe      the change that an update of 1e-5 a parameter really makes at the sites, as a run
             measures it, against float64; and what a pass in the run's own bfloat16 would see.
  frozen     log-probs of weights held in bfloat16 (`model.frozen_dtype`), computing in either.
Command:  python experiments/benchmarks/precision.py SUITE ... --model DIRECTORY
          for the suite `kernels`, whose traces are exact, with --length 32 --sites 4
Time:     ten minutes on two cores for a model of 260 thousand parameters.
Expected: tables on the screen, results/precision_SUITE.json. An error is ‖x − x₆₄‖ / ‖x₆₄‖ unless
          it says nats.
"""

import argparse
import dataclasses
import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxdyn import kernels
from jaxdyn.dynamics import measure_update, propagate, sites_from_rollout
from jaxdyn.models import LanguageModel, llama, load_pretrained
from jaxdyn.models.held import held
from jaxdyn.rl import token_statistics
from jaxdyn.rollout import generate
from jaxdyn.train.policy import completion_statistics
from jaxdyn.train.sharing import completion_features
from jaxdyn.types import Params, PromptBatch, Rollout, Sites, View

TOY = llama(vocab_size=40, width=16, num_layers=2, num_heads=2, mlp_width=24, max_positions=64)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model of float32 parameters, completions that it sampled, and some sites in them."""

    model: LanguageModel
    params: Params
    rollout: Rollout
    sites: Sites

    def computing(self, dtype: str) -> tuple[LanguageModel, Params]:
        """The model in `dtype`, with parameters of float32, or of float64 for float64."""
        wanted = jnp.dtype(dtype).type
        params = self.params
        if dtype == "float64":
            params = jax.tree.map(lambda x: x.astype(wanted), params)
        return dataclasses.replace(self.model, dtype=wanted), params

    def by_dtype(self, quantity: Any) -> dict[str, dict[str, float]]:
        """Errors by the names of what `quantity(model, params)` returns, and by dtype."""
        exact = quantity(*self.computing("float64"))
        found: dict[str, dict[str, float]] = {name: {} for name in exact}
        for dtype in DTYPES:
            for name, x in quantity(*self.computing(dtype)).items():
                found[name][dtype] = error_of(name, x, exact[name])
        return found


def error_of(name: str, x: Any, exact: Any) -> float:
    """Relative, or the root mean square in nats, over all leaves."""
    flat = lambda tree: np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    )
    off, size = flat(x) - flat(exact), flat(exact)
    scale = np.sqrt(size.size) if "nats" in name else np.linalg.norm(size)
    return float(np.linalg.norm(off) / scale)


def problem(given: argparse.Namespace) -> Problem:
    """Completions of the text's begin, and the sites of every completion's start and inside."""
    if given.model:
        model, params = load_pretrained(given.model)
    else:
        model = LanguageModel(TOY)
        params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))
    start = np.full((given.prompts, 1), given.begin, np.int32)
    prompts = PromptBatch(jnp.asarray(start), jnp.ones(start.shape, bool))
    rollout = generate(
        model,
        params,
        prompts,
        jax.random.key(0),
        num_generations=given.generations,
        max_completion_length=given.length,
    )
    few = jax.tree.map(lambda x: x[: given.sites], dataclasses.replace(rollout, features=None))
    sites = sites_from_rollout(few, 2, 0)
    return Problem(model, params, rollout, sites)


# -- the quantities ------------------------------------------------------------------------------


def passes(p: Problem) -> dict:
    def quantity(model, params):
        view = model.view(params)

        @jax.jit
        def run(view):
            phi = completion_features(model, view["backbone"], p.rollout)
            logits = model.logits(view["classifier"], phi)
            found = token_statistics(logits, p.rollout.completion_ids)
            centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
            here = p.rollout.completion_mask
            keep = lambda x: jnp.where(here.reshape(*here.shape, *[1] * (x.ndim - 2)), x, 0)
            return {
                "features": keep(phi),
                "logits less their mean": keep(centred),
                "log π, nats": keep(found.logps),
                "entropy, nats": keep(found.entropy),
            }

        return run(view)

    return p.by_dtype(quantity)


def gradients(p: Problem) -> dict:
    rng = np.random.default_rng(1)
    rows = p.rollout.completion_ids.shape[0]
    draws = rng.normal(size=(rows // 8, 8)) if rows % 8 == 0 else rng.normal(size=(1, rows))
    advantages = (draws - draws.mean(1, keepdims=True)).reshape(-1, 1)

    def quantity(model, params):
        @functools.partial(jax.jit, static_argnums=1)
        def gradient(view, supervised):
            def loss(view):
                phi = completion_features(model, view["backbone"], p.rollout)
                ids, mask = p.rollout.completion_ids, p.rollout.completion_mask
                found = completion_statistics(model, view["classifier"], phi, ids, 1.0)
                weight = 1.0 if supervised else jnp.asarray(advantages, found.logps.dtype)
                return -jnp.sum(jnp.where(mask, weight * found.logps, 0)) / jnp.sum(mask)

            return jax.grad(loss)(view)

        found: dict[str, dict] = {}
        for supervised, loss in ((True, "supervised"), (False, "group-relative")):
            for path, x in flatten_dict(gradient(View(model.view(params)), supervised)).items():
                kind = "classifier" if path[0] == "classifier" else path[-1]
                found.setdefault(f"{loss}: {kind}", {})["/".join(path)] = x
        return found

    return p.by_dtype(quantity)


def kernel_quantities(p: Problem) -> dict:
    rng = np.random.default_rng(2)
    delta = jax.tree.map(lambda x: 1e-5 * rng.choice([-1, 1], x.shape), p.params)
    part = lambda found: {
        name: x
        for name in ("representation", "gradient", "cross")
        if (x := getattr(found, name)).any()
    }

    def quantity(model, params):
        shaped = jax.tree.map(lambda x, d: jnp.asarray(d, x.dtype), params, delta)
        log_prob = part(kernels.log_prob_kernel(model, params, p.sites))
        trace = part(kernels.trace_kernel(model, params, p.sites))
        first = part(jax.jit(lambda: propagate(model, params, shaped, p.sites))())
        return {
            **{f"log-prob kernel: {name}": x for name, x in log_prob.items()},
            **{f"trace kernel: {name}": x for name, x in trace.items()},
            **{f"Δ log π to first order: {name}": x for name, x in first.items()},
        }

    return p.by_dtype(quantity)


def probe(p: Problem) -> dict:
    rng = np.random.default_rng(3)
    sign = lambda x: jnp.asarray(rng.choice([-1e-5, 1e-5], x.shape), jnp.float32)
    after = jax.tree.map(lambda x: x + sign(x), p.params)
    picked = jnp.arange(len(p.sites.targets)), p.sites.targets

    @functools.partial(jax.jit, static_argnums=0)
    def log_probs(model, params):
        view = model.view(params)
        features = model.features(view["backbone"], p.sites.tokens, p.sites.mask)
        phi = features[p.sites.rows, p.sites.positions]
        return jax.nn.log_softmax(model.logits(view["classifier"], phi))[picked]

    def change(dtype):
        model, before = p.computing(dtype)
        moved = jax.tree.map(lambda x, like: x.astype(like.dtype), after, before)
        return np.asarray(log_probs(model, moved) - log_probs(model, before), np.float64)

    exact = change("float64")
    found = {}
    for dtype in DTYPES:
        measured = measure_update(p.computing(dtype)[0], p.params, after, p.sites)
        own = change(dtype)
        found[dtype] = {
            "of a pass in it": float(np.corrcoef(own, exact)[0, 1]),
            "as measured": float(np.corrcoef(measured.arrays["actual"], exact)[0, 1]),
            "predicted against measured": measured.scalars["delta/correlation"],
        }
    return {name: {d: found[d][name] for d in DTYPES} for name in found["float32"]}


def frozen(p: Problem) -> dict:
    small = held(p.params, "bfloat16")

    @functools.partial(jax.jit, static_argnums=0)
    def log_probs(model, params):
        view = model.view(params)
        phi = completion_features(model, view["backbone"], p.rollout)
        return jax.nn.log_softmax(model.logits(view["classifier"], phi))

    here = np.asarray(p.rollout.completion_mask)
    ids = np.asarray(p.rollout.completion_ids)[..., None]
    found: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        model, params = p.computing(dtype)
        whole, rounded = (np.asarray(log_probs(model, x), np.float64) for x in (params, small))
        of_tokens = np.take_along_axis(rounded - whole, ids, -1)[..., 0][here]
        kl = np.sum(np.exp(whole) * (whole - rounded), axis=-1)[here]
        for name, x in (
            ("log π of the tokens, rms, nats", np.sqrt(np.mean(of_tokens**2))),
            ("the largest, nats", np.abs(of_tokens).max()),
            ("its mean, nats", np.mean(of_tokens)),
            ("KL, mean, nats", kl.mean()),
        ):
            found.setdefault(name, {})[dtype] = float(x)
    return found


SUITES = {
    "passes": passes,
    "gradients": gradients,
    "kernels": kernel_quantities,
    "probe": probe,
    "frozen": frozen,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--model", help="a Hugging Face directory; without it a random toy")
    parser.add_argument("--begin", type=int, default=1, help="the token that begins a text")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--sites", type=int, default=16, help="completions that have sites")
    harness.add_output(parser)
    given = parser.parse_args(arguments)
    with jax.enable_x64(True):
        chosen = problem(given)
        tokens = np.asarray(chosen.rollout.completion_ids)[
            np.asarray(chosen.rollout.completion_mask)
        ]
        about = {
            "model": bool(given.model),
            "parameters": sum(x.size for x in jax.tree.leaves(chosen.params)),
            "tokens": int(tokens.size),
            "most_frequent": int(np.bincount(tokens).max()),
        }
        for suite in harness.known(given.suites, SUITES):
            found = SUITES[suite](chosen)
            print(f"\n{suite}: {about}")
            print(f"{'':<44}" + "".join(f"{dtype:>12}" for dtype in DTYPES))
            for name, errors in found.items():
                print(f"{name:<44}" + "".join(f"{errors[dtype]:>12.2g}" for dtype in DTYPES))
            harness.write(given.output, f"precision_{suite}", {**about, "errors": found})


if __name__ == "__main__":
    main()
