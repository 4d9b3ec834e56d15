"""jaxdyn's side of the RL benchmarks: a task in memory at any shape, and what its programs cost."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from jax.extend import core as jax_core
from peers.protocol import BEGIN, END, PAD, WORDS, Shape, even_words, random_prompts

from jaxdyn.config import RunConfig
from jaxdyn.data import Tokenizer
from jaxdyn.models import LanguageModel, gpt_neox, llama, load_pretrained
from jaxdyn.models.decoder import Remat
from jaxdyn.optim import OptimConfig, Stage, StageName, make_optimizer
from jaxdyn.rewards import RewardConfig, make_reward
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig, step_key
from jaxdyn.sections import TrainConfig
from jaxdyn.train import TrainState, UpdateBatch, fresh_state, update
from jaxdyn.train.experience import examples_of, gather_experience
from jaxdyn.train.sharing import completions_together
from jaxdyn.train.step import make_batch, split_state, take_step
from jaxdyn.train.task import Task
from jaxdyn.types import Branches

REWARD = RewardConfig(functions=(f"{even_words.__module__}:even_words",))


def model_of(shape: Shape, architecture: str, remat: Remat = "dots") -> LanguageModel:
    """The decoder that the peers build, untied."""
    families = {"gpt_neox": gpt_neox, "llama": functools.partial(llama, norm_eps=1e-5)}
    sizes = (shape.vocab, shape.width, shape.layers, shape.heads, shape.mlp, max(512, shape.slots))
    config = families[architecture](*sizes)
    return LanguageModel(config, jnp.dtype(shape.dtype).type, remat)


def tokenizer_of(shape: Shape) -> Tokenizer:
    """One token a word: w17 is token 17."""
    special = {PAD: "<pad>", BEGIN: "<s>", END: "</s>"}
    words = {special.get(i, f"w{i}"): i for i in range(shape.vocab)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=f"w{WORDS}"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special.values()))
    return Tokenizer(backend, PAD, (END,), BEGIN)


def task_of(shape: Shape, architecture: str, remat: Remat = "dots", **train: Any) -> Task:
    """Random parameters or the shape's model, prompts of random words, and the peers' reward."""
    if shape.model:
        model, params = load_pretrained(shape.model, dtype=jnp.dtype(shape.dtype).type)
        model = dataclasses.replace(model, remat=remat)
        require_sizes(shape, model)
    else:
        model = model_of(shape, architecture, remat)
        params = jax.jit(model.init)(jax.random.key(0))
    examples = [{"prompt": prompt} for prompt in random_prompts(shape, 2048)]
    return Task(
        model=model,
        params=params,
        tokenizer=tokenizer_of(shape),
        config=config_of(shape, **train),
        train=examples,
        test=examples[:32],
        reward=make_reward(REWARD),
    )


def require_sizes(shape: Shape, model: LanguageModel) -> None:
    """SystemExit where the shape is not that of its model, by which it would be reported."""
    c = model.config
    found = (c.num_layers, c.width, c.mlp_width, c.num_heads, c.vocab_size)
    wanted = (shape.layers, shape.width, shape.mlp, shape.heads, shape.vocab)
    if found != wanted:
        raise SystemExit(
            f"layers, width, mlp, heads and vocab of {shape.model} are {found}; the shape says "
            f"{wanted}: give --shape, or --layers and so on"
        )


def config_of(shape: Shape, **train: Any) -> RunConfig:
    """GRPO with a reference, AdamW: what the peers are told too."""
    return RunConfig(
        reward=REWARD,
        sampling=SamplingConfig(max_completion_length=shape.completion_length),
        loss=LossConfig(beta=0.04),
        optim=OptimConfig(learning_rate=1e-6),
        train=TrainConfig(
            num_prompts=shape.prompts,
            num_generations=shape.generations,
            max_prompt_length=shape.prompt_length,
            **train,
        ),
    )


def state_of(task: Task, stage: StageName) -> TrainState:
    """The state in which a stage begins, where a run has it."""
    return task.layout.place(fresh_state(task.model, task.params, task.config.optim, stage))


class Problem:
    """A task, a rollout batch of it with harvested features, and what either stage does with it."""

    def __init__(self, shape: Shape, architecture: str, remat: Remat, microbatches: int):
        self.task = task_of(shape, architecture, remat, microbatches=microbatches)
        key, examples = step_key(0, "rollout", 0), examples_of(self.task, 0)
        self.experience = gather_experience(
            self.task, self.task.params, examples, key, shape.generations, harvest=True
        )

    def update(self, name: StageName) -> tuple[Any, tuple, dict[str, Any]]:
        """The jitted update, its arguments, its static arguments."""
        stage, state = Stage(name, 0, 1), state_of(self.task, name)
        batch, features = make_batch(self.task, state, stage, self.experience, 0)
        state, frozen = split_state(self.task, state, stage)
        if name == "classifier":
            frozen.pop("backbone")
        arguments = (state, frozen, batch, features, jnp.float32(1e-6), jnp.float32(1.0))
        return update, arguments, static_of(self.task.model, self.task.config)

    def steps(self, name: StageName) -> Callable[[], TrainState]:
        """A function that takes one step of the stage after another."""
        state, stage = state_of(self.task, name), Stage(name, 0, 10**6)
        numbers = itertools.count()

        def step():
            nonlocal state
            state = take_step(self.task, state, stage, next(numbers)).state
            return state

        return step


def static_of(model: LanguageModel, config: RunConfig) -> dict[str, Any]:
    """The static arguments of `update`."""
    return {
        "model": model,
        "loss": config.loss,
        "optim": config.optim.rule,
        "microbatches": config.train.microbatches,
        "max_completion_length": config.sampling.max_completion_length,
    }


def updater(function: Any, arguments: tuple, static: dict[str, Any]) -> Callable[[], Any]:
    """A function that does one update after another, for each donates its state."""
    state, *rest = arguments

    def once():
        nonlocal state
        state, metrics = function(state, *rest, **static)
        return state, metrics

    return once


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says that a program costs, in flops and bytes."""

    flops: float
    product_flops: float
    peak_bytes: float
    argument_bytes: float
    temporary_bytes: float


def cost_of(function: Any, arguments: tuple, static: dict[str, Any]) -> Cost:
    """A jitted function's flops and its peak memory: arguments + temporaries + results not donated.

    The compiler counts the body of a scan once; the matrix products of the further trips, counted
    in the jaxpr, are added. `product_flops` has the products alone, all trips.
    """
    traced = function.trace(*arguments, **static)
    lowered = traced.lower()
    compiled = lowered.compile()
    once, all_trips = (products(traced.jaxpr, trips) for trips in (False, True))
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(
        flops=lowered.cost_analysis()["flops"] + all_trips - once,
        product_flops=all_trips,
        peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def joint_update_cost(shape: Shape, architecture: str, remat: Remat, microbatches: int) -> Cost:
    """The joint update's cost from shapes alone: nothing is allocated or run."""
    return cost_of(*joint_update(shape, architecture, remat, microbatches))


def model_flops(shape: Shape, architecture: str) -> float:
    """Flops of the products that a joint update needs, nothing of it twice.

    They are counted in float32, in which attention is a few plain products on every platform.
    """
    wide = dataclasses.replace(shape, dtype="float32")
    function, arguments, static = joint_update(wide, architecture, "none", 1)
    return products(function.trace(*arguments, **static).jaxpr)


def joint_update(shape: Shape, architecture: str, remat: Remat, microbatches: int) -> tuple:
    """The jitted update, its arguments' shapes, its static arguments."""
    model = model_of(shape, architecture, remat)
    config = config_of(shape, microbatches=microbatches)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = TrainState(params, jax.eval_shape(make_optimizer(config.optim).init, params))
    array = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    rows, (prompt, completion) = shape.rows, (shape.prompt_length, shape.completion_length)
    together = completions_together(
        (prompt, completion), shape.prompts, shape.generations, microbatches
    )
    shared = rows // together
    masks = array("bool", shared, prompt), array("bool", shared, together, completion)
    batch = UpdateBatch(
        tokens=array("int32", shared, prompt + together * completion),
        mask=Branches(*masks) if together > 1 else array("bool", rows, shape.slots),
        completion_ids=array("int32", rows, completion),
        completion_mask=array("bool", rows, completion),
        advantages=array("float32", rows),
        ref_per_token_logps=array("float32", rows, completion),
    )
    scalars = array("float32"), array("float32")
    return update, (state, {}, batch, None, *scalars), static_of(model, config)


def products(jaxpr: Any, trips: bool = True) -> float:
    """Flops of a jaxpr's matrix products, 2 M N K each; a scan's body times its `trips`, or once.

    A `while_loop`'s body counts once: its trips are not known.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            inner = math.prod(sizes[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if trips and equation.primitive.name == "scan" else 1
        total += times * sum(
            products(inner, trips) for inner in jax_core.jaxprs_in_params(equation.params)
        )
    return total
