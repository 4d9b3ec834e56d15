"""The programs of a run, as they are compiled for a mesh: shapes and shardings, no arrays.

rollout       a step's completions: prefill and all decoding steps
prefill       its prompts' pass alone
decode        one of its steps, the last, with full caches
reference     per-token log-probs of the batch under another policy
stage 1       the update of the classifier from harvested features, if it has a matrix of its own
stage 2       the update of all parameters
propagation   what an applied update does at the probe's sites
factors, kernel   one tile of the empirical NTK: of rows, and of rows against others
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdyn.config import RunConfig
from jaxdyn.distributed import Layout, shard_model
from jaxdyn.distributed.mesh import ROWS
from jaxdyn.distributed.rules import fitting
from jaxdyn.dynamics import propagate, site_state
from jaxdyn.dynamics.precision import in_float32
from jaxdyn.kernels.gram import contract, factorize
from jaxdyn.kernels.rows import Rows
from jaxdyn.models import LanguageModel, ModelConfig
from jaxdyn.optim import make_optimizer, trainable
from jaxdyn.plan.demand import Program
from jaxdyn.rollout import generate
from jaxdyn.rollout.generate import cache_sizes
from jaxdyn.rollout.sampling import sample_token
from jaxdyn.train.frozen import held
from jaxdyn.train.policy import UpdateBatch, policy_logps
from jaxdyn.train.sharing import completions_together
from jaxdyn.train.state import TrainState
from jaxdyn.train.update import update
from jaxdyn.types import Branches, KVCache, PromptBatch, Sites

WORKSPACE = 2**27
"""Bytes of a block of a kernel's products on an accelerator (`jaxdyn.kernels.blocks`)."""


def batch_of(arrays: dict[str, Any]) -> UpdateBatch:
    """The batch of `Setting.batch`'s arrays, of which a pair are the masks of rows that branch."""
    mask = arrays["mask"]
    return UpdateBatch(**{**arrays, "mask": Branches(*mask) if isinstance(mask, tuple) else mask})


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model of `config`, in a run's compute dtype, and the run's batches, on a mesh."""

    config: ModelConfig
    run: RunConfig
    mesh: Mesh

    @functools.cached_property
    def model(self) -> LanguageModel:
        dtype = jnp.dtype(self.run.model.dtype).type
        return shard_model(LanguageModel(self.config, dtype, self.run.model.remat), self.mesh)

    # -- what enters the programs ---------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.run.train.num_prompts * self.run.train.num_generations

    @property
    def slots(self) -> tuple[int, int]:
        """A prompt's and a completion's."""
        return self.run.train.max_prompt_length, self.run.sampling.max_completion_length

    def lay(self, axes: P, tree: Any) -> Any:
        """Shapes of arrays that lie along `axes`, as far as these divide them."""

        def one(x):
            sharding = NamedSharding(self.mesh, fitting(axes, x.shape, self.mesh))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, tree)

    def by_rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array of which a device has some rows."""
        return self.lay(P(ROWS), jax.ShapeDtypeStruct(shape, dtype))

    def sequences(self, rows: int, slots: int, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Ids and the mask of a batch, by the names of the two."""
        ids, mask = names
        return {ids: self.by_rows(rows, slots), mask: self.by_rows(rows, slots, dtype=bool)}

    @property
    def number(self) -> jax.ShapeDtypeStruct:
        return self.lay(P(), jax.ShapeDtypeStruct((), jnp.float32))

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        return self.lay(P(), jax.eval_shape(jax.random.key, 0))

    def place(self, tree: Any) -> Any:
        """Parameters, or anything like them."""
        return Layout(self.mesh).shapes(tree)

    @functools.cached_property
    def params(self) -> Any:
        return self.place(jax.eval_shape(self.model.init, jax.random.key(0)))

    @functools.cached_property
    def view(self) -> Any:
        return self.place(jax.eval_shape(self.model.view, self.params))

    @property
    def caches(self) -> tuple[Any, Any]:
        """Keys and values of the prompts' slots, and of all slots of their completions."""
        c, rows = self.config, (self.run.train.num_prompts, self.rows)

        def one(rows, slots):
            shape = c.num_layers, rows, c.num_kv_heads, slots, c.head_dim
            return self.lay(P(None, ROWS, "tensor"), jax.ShapeDtypeStruct(shape, self.model.dtype))

        prompt, completion = map(one, rows, self.slots)
        return (prompt, prompt), (completion, completion)

    @property
    def prompts(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.sequences(
            self.run.train.num_prompts, self.slots[0], "prompt_ids", "prompt_mask"
        )

    @property
    def batch(self) -> dict[str, Any]:
        """The update's, in rows that share their prompt as a run's do (`batch_of`)."""
        of_tokens = self.by_rows(self.rows, self.slots[1], dtype=jnp.float32)
        train, (prompt, completion) = self.run.train, self.slots
        parts = train.microbatches * self.model.row_shards
        together = completions_together(self.slots, train.num_prompts, train.num_generations, parts)
        rows = self.sequences(
            self.rows // together, prompt + together * completion, "tokens", "mask"
        )
        if together > 1:
            of_mask = lambda *slots: self.by_rows(self.rows // together, *slots, dtype=bool)
            rows["mask"] = of_mask(prompt), of_mask(together, completion)  # type: ignore[assignment]
        return {
            **rows,
            **self.sequences(self.rows, self.slots[1], "completion_ids", "completion_mask"),
            "advantages": self.by_rows(self.rows, dtype=jnp.float32),
            **({"ref_per_token_logps": of_tokens} if self.run.loss.beta else {}),
            "sampler_per_token_logps": of_tokens,
        }

    @functools.cached_property
    def moments(self) -> Any:
        """The optimizer's state in joint training."""
        return self.optimizer(trainable(self.run.optim, "joint", self.params)[0])

    def optimizer(self, moving: Any) -> Any:
        return self.place(jax.eval_shape(make_optimizer(self.run.optim).init, moving))

    @property
    def beside(self) -> dict[str, Any]:
        """What a run keeps on its devices beside the policy: moments, and the reference policy."""
        return {"optimizer": self.moments, "reference": self.kept}

    @functools.cached_property
    def kept(self) -> Any:
        """The reference policy, if the run has one."""
        if not self.run.loss.beta:
            return {}
        dtype = self.run.model.frozen_dtype
        return self.place(jax.eval_shape(lambda view: held(view, dtype), self.view))

    # -- the programs ---------------------------------------------------------------------------

    def rollout(self) -> Program:
        completion = self.slots[1]

        @jax.jit
        def draw(view, prompts, key):
            return generate(
                self.model,
                view,
                PromptBatch(**prompts),
                key,
                num_generations=self.run.train.num_generations,
                max_completion_length=completion,
            )

        lower = lambda: draw.lower(self.view, self.prompts, self.key)
        roles = {"parameters": self.view, "cache": self.caches}
        return Program("rollout", lower, roles, self.beside, cache_sizes(completion)[0])

    def prefill(self) -> Program:
        backbone, prompts = self.view["backbone"], list(self.prompts.values())
        lower = lambda: jax.jit(self.model.prefill).lower(backbone, *prompts)
        held = {**self.beside, "parameters": self.view["classifier"]}
        return Program("prefill", lower, {"parameters": backbone}, held)

    def decode(self) -> Program:
        """As in a rollout in a loop, before which the compiler converts weights once."""
        steps = self.slots[1]

        @functools.partial(jax.jit, donate_argnums=2)
        def loop(view, prompt, cache, token, mask, key):
            def step(slot, state):
                token, logps, cache = state
                features, cache = self.model.decode(
                    view["backbone"], token, token, KVCache(*prompt), cache, mask, slot
                )
                logits = self.model.logits(view["classifier"], features)
                one, none = jnp.float32(1), jnp.int32(0)
                token, logp = sample_token(jax.random.fold_in(key, slot), logits, one, none, one)
                return token, logps + logp, cache

            return jax.lax.fori_loop(0, steps, step, (token, jnp.zeros(self.rows), KVCache(*cache)))

        token = self.by_rows(self.rows)
        mask = self.by_rows(self.rows, sum(self.slots), dtype=bool)
        lower = lambda: loop.lower(self.view, *self.caches, token, mask, self.key)
        roles = {"parameters": self.view, "cache": self.caches}
        return Program("decode", lower, roles, self.beside, steps=steps)

    def reference(self) -> Program:
        measure = jax.jit(
            lambda view, batch, temperature: policy_logps(
                self.model, view, batch_of(batch), temperature
            )
        )
        lower = lambda: measure.lower(self.kept, self.batch, self.number)
        beside = {"parameters": self.view, "optimizer": self.moments}
        return Program("reference", lower, {"reference": self.kept}, beside)

    def update(self, stage: str) -> Program:
        """The update of the "classifier" stage or of the "joint" one."""
        run = self.run
        moving, frozen = trainable(run.optim, stage, self.params)  # type: ignore[arg-type]
        opt_state, features = self.optimizer(moving), None
        beside = {"reference": self.kept}
        if stage == "classifier":
            beside["parameters"] = frozen["backbone"]
            frozen = {part: tree for part, tree in frozen.items() if part != "backbone"}
            shape = (self.rows, self.slots[1], self.config.width)
            features = self.by_rows(*shape, dtype=self.model.dtype)
        state = TrainState(moving, opt_state)
        if self.config.tied and stage == "joint":
            head = self.view["classifier"]["weight"]
            table = self.place({"head_moment": head, "head_share": head})
            state = state.replace(**table)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, frozen, batch, features, rate, temperature):
            return update(
                state,
                frozen,
                batch_of(batch),
                features,
                rate,
                temperature,
                model=self.model,
                loss=run.loss,
                optim=run.optim.rule,
                microbatches=run.train.microbatches,
                max_completion_length=run.sampling.max_completion_length,
            )

        lower = lambda: step.lower(state, frozen, self.batch, features, self.number, self.number)
        name = "stage 1" if stage == "classifier" else "stage 2"
        roles = {
            "parameters": (moving, frozen),
            "optimizer": (opt_state, state.head_moment, state.head_share),
        }
        return Program(name, lower, roles, beside)

    def propagation(self) -> Program:
        probe = self.run.probe
        rows, slots = probe.num_prompts, sum(self.slots)
        count = rows * (1 + probe.sites_per_completion)
        sites = {
            **self.sequences(rows, slots, "tokens", "mask"),
            **{name: self.by_rows(count) for name in ("rows", "positions", "targets")},
            "is_prompt": self.by_rows(count, dtype=bool),
        }

        @jax.jit
        def measure(before, after, sites):
            places, delta = Sites(**sites), jax.tree.map(jnp.subtract, after, before)
            share = delta["classifier"]["weight"] if self.config.tied else None
            state = site_state(self.model, after, places)
            return state, propagate(in_float32(self.model), before, delta, places, share)

        lower = lambda: measure.lower(self.view, self.view, sites)
        return Program("propagation", lower, {"parameters": (self.view, self.view)}, self.beside)

    def tile(self) -> Rows:
        """Rows of a kernel: a sequence for every part of a batch."""
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        one, weights = self.by_rows(rows, 1), self.by_rows(rows, 1, dtype=jnp.float32)
        whole = self.sequences(rows, sum(self.slots), "tokens", "mask")
        return Rows(**whole, positions=one, targets=one, weights=weights)

    def factors(self) -> Program:
        lower = lambda: factorize.lower(self.model, self.view, None, self.tile())
        return Program("factors", lower, {"parameters": self.view})

    def kernel(self) -> Program:
        make = functools.partial(factorize, self.model)
        found = jax.eval_shape(make, self.view, None, self.tile())
        body = self.lay(P(None, ROWS), found[:-2])  # by layers and rows
        held = type(found)(*body, *self.lay(P(ROWS), found[-2:]))
        model = {"tied": self.config.tied, "biased": self.config.classifier_bias}
        lower = lambda: contract.lower(self.view, None, held, held, **model, workspace=WORKSPACE)
        return Program("kernel", lower, {"parameters": self.view, "factors": (held, held)})

    def programs(self) -> list[Program]:
        """All of them."""
        return [
            self.rollout(),
            self.prefill(),
            self.decode(),
            *([self.reference()] if self.run.loss.beta else []),
            *([] if self.config.tied else [self.update("classifier")]),
            self.update("joint"),
            self.propagation(),
            self.factors(),
            self.kernel(),
        ]
