"""jaxdyn: RL steps, or `generate` alone, on a random model of any shape.

python jaxdyn_worker.py SHAPE step|generate llama|gpt_neox [remat]
"""

import sys

from peers.protocol import END, Runner, random_prompts

runner = Runner()

import engine  # noqa: E402
import jax  # noqa: E402

from jaxdyn.data import encode_prompts  # noqa: E402
from jaxdyn.optim import Stage  # noqa: E402
from jaxdyn.rollout import generate, step_key  # noqa: E402
from jaxdyn.train.step import take_step  # noqa: E402


def sample(shape, task):
    prompts = encode_prompts(
        task.tokenizer, random_prompts(shape, shape.prompts), shape.prompt_length
    )
    for turn in runner.turns():
        rollout = generate(
            task.model,
            task.params,
            prompts,
            step_key(0, "rollout", turn),
            num_generations=shape.generations,
            max_completion_length=shape.completion_length,
            stop_ids=(END,),
        )
        jax.block_until_ready(rollout)


def learn(shape, task):
    state, joint = engine.state_of(task, "joint"), Stage("joint", 0, 10**6)
    for turn in runner.turns():
        state, metrics, *_ = take_step(task, state, joint, turn)
        parts = {"generate": "rollout", "reference": "reference", "update": "update"}
        runner.parts = {part: metrics[f"time/{name}"] for part, name in parts.items()}


def main():
    task = engine.task_of(runner.shape, *sys.argv[3:])
    runner.ready(
        versions={"jax": jax.__version__},
        device=jax.devices()[0].device_kind,
        parameters=sum(x.size for x in jax.tree.leaves(task.params)),
    )
    (sample if runner.task == "generate" else learn)(runner.shape, task)


if __name__ == "__main__":
    main()
