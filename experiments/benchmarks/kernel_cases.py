"""What kernels.py times: a random problem, our kernels of it and neural-tangents'.

Peers run on the same parameters with their layers apart (`unstack`), which is faster for them than
our scanned form, and their rows mapped (`vmap_axes=0`): the fastest of the calls that were tried.
A case is a process: `python kernel_cases.py '{"method": ..., "repeats": ..., sizes}'`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import harness
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The problem's sizes, our memory budget in GiB, and the rows of a tile of `nt.batch`, of which
    8 GB hold two Jacobians of 32."""

    layers: int = 6
    width: int = 512
    vocab: int = 8192
    sites: int = 32
    slots: int = 32
    batch: int = 32
    budget: int = 8

    @property
    def bytes(self) -> int:
        return self.budget * 2**30


def problem(shape: Shape):
    """A GPT-NeoX with random parameters, and one site at the end of each random sequence."""
    import jax
    import jax.numpy as jnp

    from jaxdyn.models import LanguageModel, gpt_neox
    from jaxdyn.types import Sites

    heads = max(1, shape.width // 64)
    model = LanguageModel(gpt_neox(shape.vocab, shape.width, shape.layers, heads))
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.integers(0, shape.vocab, size), jnp.int32)
    sites = Sites(
        tokens=draw(shape.sites, shape.slots),
        mask=jnp.ones((shape.sites, shape.slots), bool),
        rows=jnp.arange(shape.sites, dtype=jnp.int32),
        positions=jnp.full(shape.sites, shape.slots - 1, jnp.int32),
        targets=draw(shape.sites),
        is_prompt=jnp.ones(shape.sites, bool),
    )
    return model, jax.jit(model.init)(jax.random.key(0)), sites


def log_prob(method: str, by_part: bool = False):
    def prepare(shape):
        from jaxdyn.kernels import log_prob_kernel

        model, params, sites = problem(shape)
        options = {"method": method, "memory_budget": shape.bytes, "by_part": by_part}
        return lambda: log_prob_kernel(model, params, sites, **options).total

    return prepare


def trace(num_probes: int | None = None):
    def prepare(shape):
        import jax

        from jaxdyn.kernels import trace_kernel

        model, params, sites = problem(shape)
        options = {"memory_budget": shape.bytes, "mean": True}
        if num_probes:
            options |= {"num_probes": num_probes, "key": jax.random.key(0)}
        return lambda: trace_kernel(model, params, sites, **options).total

    return prepare


def neural_tangents(implementation: str, what: str, batched: bool = False):
    """The kernel of log π of the target, or the trace, by one of neural-tangents' ways."""

    def prepare(shape):
        import jax
        import jax.numpy as jnp

        from jaxdyn.kernels import neural_tangents as adapter

        nt = adapter.load()
        model, params, sites = problem(shape)
        model, params = dataclasses.replace(model, remat="none").unstack(params)
        logits = adapter.ApplyFn(model)

        def log_pi(params, x):
            found = jax.nn.log_softmax(logits(params, x[:, :-1]))
            return jnp.take_along_axis(found, x[:, -1:], axis=1)

        options = {"implementation": nt.NtkImplementation[implementation], "vmap_axes": 0}
        x = adapter.site_prefixes(sites)
        if what == "trace":
            kernel = nt.empirical_ntk_fn(logits, trace_axes=(-1,), **options)
        else:
            kernel = nt.empirical_ntk_fn(log_pi, trace_axes=(), **options)
            x = jnp.concatenate([x, sites.targets[:, None]], axis=1)
        squeezed = lambda k: k.reshape(k.shape[:2])
        if batched:
            # In turn on one device, as ours.
            options = {"batch_size": shape.batch, "device_count": 1, "store_on_device": False}
            tiled = nt.batch(kernel, **options)
            return lambda: squeezed(tiled(x, None, params))
        compiled = jax.jit(lambda params, x: squeezed(kernel(x, None, params)))
        return lambda: compiled(params, x)

    return prepare


def one_pass(shape):
    """Forward and backward once over all sites, for the gradient of their log-probs' sum alone."""
    import jax
    import jax.numpy as jnp

    model, params, sites = problem(shape)

    def total(view):
        phi = model.features(view["backbone"], sites.tokens, sites.mask)
        logits = model.logits(view["classifier"], phi[sites.rows, sites.positions])
        found = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(found, sites.targets[:, None], axis=1).sum()

    gradient = jax.jit(jax.grad(total))
    norm = jax.jit(lambda view: sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient(view))))
    return lambda: norm(model.view(params))[None, None]


def nothing(shape):
    import jax.numpy as jnp

    problem(shape)
    return lambda: jnp.zeros((1, 1))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compute a quantity: `prepare` takes a shape to what is timed.

    Methods of one quantity must agree. `cannot` declares why one may run out of memory or time.
    """

    quantity: str
    prepare: Callable[[Shape], Callable[[], Any]]
    cannot: str = ""


def peer(implementation: str, what: str, batched: bool = False, cannot: str = "") -> Method:
    return Method(what, neural_tangents(implementation, what, batched), cannot)


METHODS = {
    "nothing": Method("nothing", nothing),
    "one pass": Method("pass", one_pass),
    "gram": Method("log-prob", log_prob("gram")),
    "gram by part": Method("log-prob", log_prob("gram", by_part=True)),
    "plain": Method("log-prob", log_prob("plain")),
    "trace": Method("trace", trace()),
    "trace, 64 probes": Method("estimate of the trace", trace(64)),
    "nt contraction": peer("JACOBIAN_CONTRACTION", "log-prob"),
    "nt vector products": peer("NTK_VECTOR_PRODUCTS", "log-prob"),
    "nt structured": peer(
        "STRUCTURED_DERIVATIVES", "log-prob", cannot="it asks for 18 TB at 8192 tokens"
    ),
    "nt.batch contraction": peer("JACOBIAN_CONTRACTION", "log-prob", batched=True),
    "nt trace contraction": peer("JACOBIAN_CONTRACTION", "trace"),
    "nt trace vector products": peer("NTK_VECTOR_PRODUCTS", "trace"),
    "nt trace structured": peer("STRUCTURED_DERIVATIVES", "trace"),
}


def run_case(method: str, repeats: int, **sizes: int) -> dict:
    """Seconds and memory; of the result, the sum and the trace."""
    check = lambda k: [float(np.sum(np.asarray(k, np.float64))), float(np.trace(np.asarray(k)))]
    return harness.measure(METHODS[method].prepare(Shape(**sizes)), repeats, check)


if __name__ == "__main__":
    print(json.dumps(run_case(**json.loads(sys.argv[1]))))
