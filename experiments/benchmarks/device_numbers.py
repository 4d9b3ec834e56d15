r"""Every quantity on the device beside float64 on the host, with the error that its dtype explains.

Errors are of whole arrays, ‖x − x64‖ / ‖x64‖. A rounding to a precision of unit u has a relative
error of rms u/√3, and independent ones in series add in squares. A layer has six products in
series (of queries, keys and values, scores, their sum of values, the output, the feed-forward's
two) and six more roundings (two norms, the softmax, the activation, two sums of the residual
stream). Of a product the two factors are rounded to u_in, the result to u_out, and the sum's n
terms in turn to u_sum: that is n/2 roundings, as partial sums grow from 0. So of L layers,

    σ² = L (6 (2 u_in² + n/2 u_sum²) + 12 u_out²) / 3,     tolerance = 3 √(passes) σ,

with n the feed-forward's width; a forward pass is one, forward and backward, with the gradient
itself, are three, and what contracts two gradients has six.

    bfloat16    u_in = u_out = 2⁻⁸, sums in float32
    float32     u_out = u_sum = 2⁻²⁴; u_in is what a product on this device is seen to have: 2⁻¹¹
                where it rounds to TF32, 2⁻⁸ where to bfloat16

Estimates (the trace by probes, a kernel by sketches) draw other signs in float64: they are held to
the exact kernel in float64 within five of their own standard errors, plus that tolerance.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import engine
import jax
import jax.numpy as jnp
import numpy as np
from peers.protocol import Shape

from jaxdyn import kernels
from jaxdyn.dynamics import ledger, propagate, sites_from_rollout
from jaxdyn.models import LanguageModel
from jaxdyn.optim import OptimConfig, make_optimizer, trainable
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import generate
from jaxdyn.train import TrainState, UpdateBatch, update
from jaxdyn.train.policy import policy_logps
from jaxdyn.train.sharing import Sequences, batch_features, sequences_of
from jaxdyn.types import PromptBatch, Rollout

DTYPES = ("float32", "bfloat16")
SHAPE = Shape(4, 256, 1024, 4, 2048, 4, 2, 12, 12)
OPTIMIZER = OptimConfig(max_grad_norm=0.0)
RAGGED = 128
"""Slots of the completions that end early: enough that packing them saves some."""


def measure(shape: Shape) -> dict[str, Any]:
    """Errors and tolerances by dtype and quantity; SystemExit where one is above its tolerance."""
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    model = engine.model_of(shape, "gpt_neox")
    with jax.default_device(host):
        params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))
        given = {"params": params, **problem(shape, params)}
        with jax.enable_x64(True):
            wide = model_in(model, "float64"), jax.tree.map(jnp.asarray, in_float64(given))
            exact = {name: one.find(*wide) for name, one in QUANTITIES.items() if one.own}
    found = {}
    for dtype in DTYPES:
        with jax.default_device(device):
            narrow = model_in(model, dtype), jax.tree.map(jnp.asarray, given)
            units = roundoff(dtype)
            got = {n: one.find(*narrow) for n, one in QUANTITIES.items() if dtype in one.dtypes}
        if "decoding" in got:
            got["decoding"], ids = got["decoding"]
            with jax.default_device(host), jax.enable_x64(True):
                exact["decoding"] = log_probs(*wide, ids)
        found[dtype] = {"units": units, "quantities": compare(got, exact, shape, units)}
    report(found)
    return {"shape": dataclasses.asdict(shape), "dtypes": found}


def model_in(model: LanguageModel, dtype: str) -> LanguageModel:
    return dataclasses.replace(model, dtype=jnp.dtype(dtype).type)


def in_float64(tree: Any) -> Any:
    """The same numbers in float64."""
    wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
    return jax.tree.map(wide, tree)


# -- the quantities ---------------------------------------------------------------------------


def problem(shape: Shape, params: Any) -> dict[str, Any]:
    """Completions of random tokens, a change of the parameters, a field of logits."""
    rng = np.random.default_rng(0)
    rows, vocab = shape.rows, shape.vocab
    ids = lambda rows, slots: rng.integers(0, vocab, (rows, slots)).astype(np.int32)
    rollout = Rollout(
        prompt_ids=np.repeat(ids(shape.prompts, shape.prompt_length), shape.generations, axis=0),
        prompt_mask=np.ones((rows, shape.prompt_length), bool),
        completion_ids=ids(rows, shape.completion_length),
        completion_mask=np.ones((rows, shape.completion_length), bool),
        per_token_logps=np.zeros((rows, shape.completion_length), np.float32),
    )
    lengths = rng.integers(1, RAGGED // 2, (rows, 1))
    ragged = dataclasses.replace(
        rollout,
        completion_ids=ids(rows, RAGGED),
        completion_mask=np.arange(RAGGED) < lengths,
        per_token_logps=np.zeros((rows, RAGGED), np.float32),
    )
    noise = lambda x: (0.01 * np.std(x) * rng.standard_normal(x.shape)).astype(np.float32)
    sites, delta = sites_from_rollout(rollout, 1, 0), jax.tree.map(noise, params)
    return {
        "rollout": rollout,
        "ragged": ragged,
        "generations": np.int32(shape.generations),
        "sites": jax.tree.map(np.asarray, sites),
        "delta": delta,
        "moved": jax.tree.map(np.add, jax.tree.map(np.asarray, params), delta),
        "field": rng.standard_normal((len(sites.targets), vocab)).astype(np.float32),
        "advantages": rng.standard_normal(rows).astype(np.float32),
    }


def log_probs(model: LanguageModel, given: dict[str, Any], ids: Any = None) -> np.ndarray:
    """Of the rollout's completions, or of others in their place."""
    rollout = given["rollout"]
    if ids is not None:
        rollout = dataclasses.replace(rollout, completion_ids=jnp.asarray(ids))
    return policy_logps(model, given["params"], rollout, np.float32(1))


def decoded(model: LanguageModel, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of sampled tokens as decoding finds them, and the tokens."""
    rollout = given["rollout"]
    drawn = generate(
        model,
        given["params"],
        PromptBatch(rollout.prompt_ids, rollout.prompt_mask),
        jax.random.key(3),
        num_generations=1,
        max_completion_length=rollout.completion_ids.shape[1],
    )
    return drawn.per_token_logps, np.asarray(drawn.completion_ids)


def gradient(
    model: LanguageModel,
    given: dict[str, Any],
    stage: Any,
    name: str = "rollout",
    together: bool = False,
) -> np.ndarray:
    """Of the stage's objective: Adam's first moment after one update is (1 − b₁) of it.

    A row is a completion or, `together`, a prompt and its completions, packed where they end early.
    """
    rollout = given[name]
    rows = Sequences(rollout.tokens, rollout.mask, rollout.completion_ids, rollout.completion_mask)
    if together:
        rows = sequences_of(rollout, int(given["generations"]))
    batch = UpdateBatch(**vars(rows), advantages=given["advantages"])
    moving, frozen = trainable(OPTIMIZER, stage, jax.tree.map(jnp.copy, given["params"]))
    state, features = TrainState(moving, make_optimizer(OPTIMIZER).init(moving)), None
    if stage == "classifier":
        features = batch_features(model, frozen.pop("backbone"), rollout)
    static = {"model": model, "loss": LossConfig(), "optim": OPTIMIZER.rule}
    numbers = np.float32(1e-6), np.float32(1)
    state, _ = update(state, frozen, batch, features, *numbers, **static)
    moments = jax.tree.leaves([part[0].mu for part in state.opt_state[1].values()])
    return np.concatenate([np.asarray(x).ravel() for x in moments])


def parts(x: Any) -> np.ndarray:
    """The components of an untied model."""
    return np.stack([x.representation, x.gradient])


def account(model: LanguageModel, given: dict[str, Any]) -> np.ndarray:
    """A ledger's of log π, by component."""
    found = ledger(model, iter([given["params"], given["moved"]]), given["sites"])
    return np.stack([found.parts["log_prob"][part] for part in ("representation", "gradient")])


def kernel(function: Any, *more: str, **options: Any) -> Any:
    """A kernel of the sites."""
    return lambda model, given: parts(
        function(model, given["params"], given["sites"], *(given[name] for name in more), **options)
    )


def estimate(kernel: Any) -> tuple[np.ndarray, np.ndarray]:
    """The total, and its standard error."""
    return np.asarray(kernel.total), np.asarray(kernel.standard_error)


def probed(model: LanguageModel, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    options = {"num_probes": 8, "key": jax.random.key(4)}
    return estimate(kernels.trace_kernel(model, given["params"], given["sites"], **options))


def sketched(model: LanguageModel, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    key = jax.random.key(5)
    sketch = kernels.sketch_gradients(model, given["params"], given["sites"], key)
    return estimate(kernels.sketch_kernel(sketch))


@dataclasses.dataclass(frozen=True)
class Quantity:
    """How it is found from a model and `problem`, and in how many passes.

    Attributes:
      of: what a random one estimates, or is compared with at what was drawn; of rows together,
        the same of each alone.
      dtypes: those in which it is computed.
    """

    passes: int
    find: Callable[[LanguageModel, dict[str, Any]], Any]
    of: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    @property
    def own(self) -> bool:
        """Whether float64's is found in the same way."""
        return not self.of


moved_logits = jax.jit(propagate, static_argnums=0)
QUANTITIES = {
    "features": Quantity(1, lambda m, x: batch_features(m, x["params"]["backbone"], x["rollout"])),
    "log-probs": Quantity(1, log_probs),
    "decoding": Quantity(1, decoded, "decoding"),
    "stage 1 gradient": Quantity(3, functools.partial(gradient, stage="classifier")),
    "stage 2 gradient": Quantity(3, functools.partial(gradient, stage="joint")),
    "ragged gradient": Quantity(3, functools.partial(gradient, stage="joint", name="ragged")),
    "shared prompts": Quantity(
        3, functools.partial(gradient, stage="joint", together=True), "stage 2 gradient"
    ),
    "packed rows": Quantity(
        3,
        functools.partial(gradient, stage="joint", name="ragged", together=True),
        "ragged gradient",
    ),
    "propagation": Quantity(
        3, lambda m, x: parts(moved_logits(m, x["params"], x["delta"], x["sites"]))
    ),
    "ledger": Quantity(3, account, dtypes=("float32",)),  # of float32 passes, whatever trained
    "operator": Quantity(6, kernel(kernels.apply_kernel, "field")),
    "log-prob kernel": Quantity(6, kernel(kernels.log_prob_kernel, method="gram")),
    "trace kernel": Quantity(6, kernel(kernels.trace_kernel)),
    "trace by probes": Quantity(6, probed, "trace kernel"),
    "sketch": Quantity(6, sketched, "log-prob kernel"),
}


# -- errors and tolerances --------------------------------------------------------------------


def roundoff(dtype: str) -> dict[str, float]:
    """u of a product's factors, of its sum, and of its result, on the default device."""
    if dtype == "bfloat16":
        return {"factors": 2.0**-8, "sum": 2.0**-24, "result": 2.0**-8}
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 256, 256)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.linalg.norm(np.asarray(jnp.asarray(a) @ jnp.asarray(b)) - exact)
    # Both factors rounded: u √(2/3) of the result; the nearest of what devices do.
    seen = error / np.linalg.norm(exact) / np.sqrt(2 / 3)
    units = [2.0**-24, 2.0**-11, 2.0**-8]
    nearest = min(units, key=lambda u: abs(np.log(max(seen, 1e-12) / u)))
    return {"factors": nearest, "sum": 2.0**-24, "result": 2.0**-24}


def tolerance(shape: Shape, units: dict[str, float], passes: int) -> float:
    """The largest relative error that rounding explains; see the module."""
    product = 2 * units["factors"] ** 2 + shape.mlp / 2 * units["sum"] ** 2
    variance = shape.layers * (6 * product + 12 * units["result"] ** 2) / 3
    return 3 * float(np.sqrt(passes * variance))


def compare(got: dict, exact: dict, shape: Shape, units: dict) -> dict[str, dict[str, float]]:
    """Errors beside their tolerances."""
    found = {}
    for name, value in got.items():
        one = QUANTITIES[name]
        allowed, truth = tolerance(shape, units, one.passes), np.asarray(exact[one.of or name])
        if isinstance(value, tuple):  # an estimate
            value, deviation = value
            truth = truth.sum(axis=0)
            gap = np.abs(value - truth) - allowed * np.abs(truth)
            found[name] = {"error": float(np.max(gap / deviation)), "tolerance": 5.0}
        else:
            gap = np.linalg.norm(np.asarray(value, np.float64) - truth)
            found[name] = {"error": float(gap / np.linalg.norm(truth)), "tolerance": allowed}
    return found


def report(found: dict[str, Any]) -> None:
    """The table; SystemExit for what is above its tolerance."""
    print(f"\n{'error beside float64':<24}" + "".join(f"{dtype:>24}" for dtype in found))
    for name in QUANTITIES:
        cells = []
        for of_dtype in found.values():
            one = of_dtype["quantities"].get(name)
            cells.append(f"{one['error']:.2e} of {one['tolerance']:.2e}" if one else "")
        print(f"{name:<24}" + "".join(f"{cell:>24}" for cell in cells))
    for dtype, of_dtype in found.items():
        for name, one in of_dtype["quantities"].items():
            if not one["error"] <= one["tolerance"]:
                raise SystemExit(
                    f"{name} in {dtype}: error {one['error']:.3g}, above the "
                    f"{one['tolerance']:.3g} that rounding explains"
                )
