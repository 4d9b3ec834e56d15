"""Tunix: GRPO steps, or its sampler alone, on a random Llama of any shape.

The learner pulls a batch only after the update before it, so the data set's iterator is where a
step begins and ends. Sampler and learner are those of google-tunix 0.1.7; Python and packages:

    python3.11 -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
"""

import importlib.metadata
import os

from protocol import BEGIN, END, PAD, Runner, even_words, random_prompts

runner = Runner()
os.environ.setdefault("WANDB_MODE", "disabled")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.generate import sampler as sampler_lib  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.rl import rl_cluster  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout import base_rollout  # noqa: E402

shape = runner.shape
CACHE = shape.slots + max(16, shape.prompt_length + 1)  # it pads prompts to powers of two
mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


class Words:
    """The tokenizer: word w17 is token 17."""

    def encode(self, text, **_):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(f"w{int(i)}" for i in ids)

    def bos_id(self):
        return BEGIN

    def eos_id(self):
        return END

    def pad_id(self):
        return PAD


def random_model():
    """A Llama with its parameters on the mesh, in the shape's dtype."""
    config = llama.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        embed_dim=shape.width,
        hidden_dim=shape.mlp,
        num_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        num_kv_heads=shape.heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=False,
    )

    @nnx.jit
    def build():
        model = llama.Llama3(config, rngs=nnx.Rngs(0))
        state = jax.tree.map(lambda x: x.astype(shape.dtype), nnx.state(model))
        specs = nnx.get_partition_spec(state)
        nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
        return model

    with mesh:
        return build(), config


def weights(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def generate(model, config):
    """Every generation is a prompt of its own: the sampler knows no groups."""
    cache = sampler_lib.CacheConfig(
        cache_size=CACHE,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = sampler_lib.Sampler(model, Words(), cache)
    prompts = [p for p in random_prompts(shape, shape.prompts) for _ in range(shape.generations)]
    for turn in runner.turns():
        sampler(
            prompts,
            max_generation_steps=shape.completion_length,
            max_prompt_length=shape.prompt_length,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            seed=turn,
            return_logprobs=True,
        )


def learn(model):
    reference, _ = random_model()
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-6),
        eval_every_n_steps=10**9,
        max_steps=10**9,
        mini_batch_size=shape.prompts,
        train_micro_batch_size=shape.prompts,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=shape.completion_length,
        max_prompt_length=shape.prompt_length,
        kv_cache_size=CACHE,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        return_logprobs=True,
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=reference,
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=training,
            rollout_config=rollout,
        ),
    )
    arrays_of = lambda result: [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)]
    finished = lambda result: jax.block_until_ready(arrays_of(result))
    cluster.generate = runner.timed("generate", cluster.generate, finished)
    cluster.get_ref_per_token_logps = runner.timed(
        "reference", cluster.get_ref_per_token_logps, finished
    )
    updated = lambda _: jax.block_until_ready(weights(cluster.actor_trainer.model))
    cluster.update_actor = runner.timed("update", cluster.update_actor, updated)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=even_words,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=shape.generations, num_iterations=1, beta=0.04, epsilon=0.2
        ),
    )
    batches = (
        {"prompts": np.array(random_prompts(shape, shape.prompts, seed=turn))}
        for turn in runner.turns()
    )
    learner.train(batches)


def main():
    model, config = random_model()
    runner.ready(
        versions={name: importlib.metadata.version(name) for name in ("google-tunix", "jax")},
        device=jax.devices()[0].device_kind,
        parameters=sum(x.size for x in weights(model)),
    )
    with mesh:
        generate(model, config) if runner.task == "generate" else learn(model)


if __name__ == "__main__":
    main()
