"""What enters the programs of a run on a mesh: shapes and shardings of arrays that are not made."""

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
from jaxdyn.models import LanguageModel, ModelConfig
from jaxdyn.models.held import held
from jaxdyn.optim import make_optimizer, trainable
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.sharing import completions_together
from jaxdyn.types import Branches


def batch_of(arrays: dict[str, Any]) -> UpdateBatch:
    """The batch of `Setting.batch`'s arrays, of which a pair are the masks of rows that branch."""
    mask = arrays["mask"]
    return UpdateBatch(**{**arrays, "mask": Branches(*mask) if isinstance(mask, tuple) else mask})


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model of `config`, in a run's compute dtype, and the run's batches, on a mesh.

    `scorer` is the reward model's shape, which lies there in `reward.model.dtype` all the while.
    """

    config: ModelConfig
    run: RunConfig
    mesh: Mesh
    scorer: ModelConfig | None = None

    @functools.cached_property
    def model(self) -> LanguageModel:
        dtype = jnp.dtype(self.run.model.dtype).type
        return shard_model(LanguageModel(self.config, dtype, self.run.model.remat), self.mesh)

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
        """What a run keeps on its devices beside the policy: moments, and models that stay."""
        return {"optimizer": self.moments, "reference": self.kept, "reward model": self.scoring}

    @functools.cached_property
    def scorer_model(self) -> LanguageModel | None:
        """The reward model, if the run has one."""
        if self.scorer is None:
            return None
        dtype = jnp.dtype(self.run.reward.model.dtype).type
        return shard_model(LanguageModel(self.scorer, dtype), self.mesh)

    @functools.cached_property
    def scoring(self) -> Any:
        """Its parameters."""
        if self.scorer_model is None:
            return {}
        params = jax.eval_shape(self.scorer_model.init, jax.random.key(0))
        stay = lambda tree: held(tree, self.run.reward.model.dtype)
        return self.place({**params, "backbone": jax.eval_shape(stay, params["backbone"])})

    @functools.cached_property
    def kept(self) -> Any:
        """The reference policy, if the run has one."""
        if not self.run.loss.beta:
            return {}
        dtype = self.run.model.frozen_dtype
        return self.place(jax.eval_shape(lambda view: held(view, dtype), self.view))
