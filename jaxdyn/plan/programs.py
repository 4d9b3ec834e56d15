"""The programs of a run, as they are compiled for a mesh: shapes and shardings, no arrays.

rollout       a step's completions: prefill and all decoding steps
prefill       its prompts' pass alone
decode        one of its steps, the last, with full caches
reward        a batch of completions scored by the reward model, if there is one
reference     per-token log-probs of the batch under another policy
stage 1       the update of the classifier from harvested features, if it has a matrix of its own
stage 2       the update of all parameters
propagation   what an applied update does at the probe's sites
factors, kernel   one tile of the empirical NTK: of rows, and of rows against others
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdyn.distributed.mesh import ROWS
from jaxdyn.dynamics import propagate, site_state
from jaxdyn.dynamics.precision import in_float32
from jaxdyn.kernels.gram import contract, factorize
from jaxdyn.kernels.rows import Rows
from jaxdyn.optim import trainable
from jaxdyn.plan.demand import Program
from jaxdyn.plan.inputs import Inputs, batch_of
from jaxdyn.rollout import generate
from jaxdyn.rollout.generate import cache_sizes
from jaxdyn.rollout.sampling import sample_token
from jaxdyn.train.policy import policy_logps
from jaxdyn.train.scorer import jitted_scores
from jaxdyn.train.state import TrainState
from jaxdyn.train.update import update
from jaxdyn.types import KVCache, PromptBatch, Sites

WORKSPACE = 2**27
"""Bytes of a block of a kernel's products on an accelerator (`jaxdyn.kernels.blocks`)."""

CACHE = "cache"
"""The role of keys and values, which grow with the batch."""


@dataclasses.dataclass(frozen=True)
class Setting(Inputs):
    """The programs of a model and a run on a mesh."""

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
        roles = {"parameters": self.view, CACHE: self.caches}
        return Program("rollout", lower, roles, self.beside, cache_sizes(completion)[0])

    def prefill(self) -> Program:
        backbone, prompts = self.view["backbone"], list(self.prompts.values())
        lower = lambda: jax.jit(self.model.prefill).lower(backbone, *prompts)
        held = {**self.beside, "parameters": self.view["classifier"]}
        return Program("prefill", lower, {"parameters": backbone}, held)

    def decode(self) -> Program:
        """As in a rollout in a loop, before which the weights are rounded once."""
        steps = self.slots[1]

        @functools.partial(jax.jit, donate_argnums=2)
        def loop(view, prompt, cache, token, mask, key):
            view = self.model.rounded(view)

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
        roles = {"parameters": self.view, CACHE: self.caches}
        return Program("decode", lower, roles, self.beside, steps=steps)

    def reference(self) -> Program:
        measure = jax.jit(
            lambda view, batch, temperature: policy_logps(
                self.model, view, batch_of(batch), temperature
            )
        )
        lower = lambda: measure.lower(self.kept, self.batch, self.number)
        beside = {**self.beside, "parameters": self.view}
        del beside["reference"]
        return Program("reference", lower, {"reference": self.kept}, beside)

    def update(self, stage: str) -> Program:
        """The update of the "classifier" stage or of the "joint" one."""
        run = self.run
        moving, frozen = trainable(run.optim, stage, self.params)  # type: ignore[arg-type]
        opt_state, features = self.optimizer(moving), None
        beside = {"reference": self.kept, "reward model": self.scoring}
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

    @property
    def scored(self) -> int:
        """Sequences that the reward model scores at a time."""
        return min(self.run.reward.model.batch_size, self.rows)

    @property
    def batches(self) -> int:
        """How often it does in a step."""
        return -(-self.rows // self.scored) if self.scorer else 0

    def reward(self) -> Program:
        """One batch, of as many tokens as the policy's longest sequence."""
        rows = self.sequences(self.scored, sum(self.slots), "tokens", "mask")
        assert self.scorer_model is not None
        turns = None if self.scorer_model.config.gating is None else self.by_rows(self.scored)
        given = *rows.values(), turns
        lower = lambda: jitted_scores.lower(self.scorer_model, self.scoring, *given)
        held = {**self.beside, "parameters": self.view}
        del held["reward model"]
        return Program("reward", lower, {"reward model": self.scoring}, held)

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

    def step(self) -> list[Program]:
        """Those of which a joint step's time is made (`jaxdyn.plan.meshes`)."""
        reward = [self.reward()] if self.scorer else []
        return [self.prefill(), self.decode(), *reward, self.update("joint")]

    def programs(self) -> list[Program]:
        """All of them."""
        *rollout, update = self.step()
        return [
            self.rollout(),
            *rollout,
            *([self.reference()] if self.run.loss.beta else []),
            *([] if self.config.tied else [self.update("classifier")]),
            update,
            self.propagation(),
            self.factors(),
            self.kernel(),
        ]
