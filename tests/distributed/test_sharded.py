"""Every program on every mesh of 8 devices against one device, in float64; and what travels."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracles
import pytest

from jaxdyn import kernels
from jaxdyn.distributed import Layout, make_mesh, one_device, shard_model
from jaxdyn.dynamics import ledger, measure_state, measure_update, site_state
from jaxdyn.kernels import streams
from jaxdyn.kernels.gram import factorize, row_bytes
from jaxdyn.kernels.rows import site_rows
from jaxdyn.models import LanguageModel, LoraConfig, add_adapters, gpt_neox
from jaxdyn.optim import OptimConfig, make_optimizer, trainable
from jaxdyn.rl import ImportanceConfig, LossConfig
from jaxdyn.rollout import generate
from jaxdyn.sections import MeshConfig
from jaxdyn.train import TrainState, UpdateBatch, update
from jaxdyn.train.pmap import pmap_update, require_copies
from jaxdyn.train.policy import policy_logps
from jaxdyn.types import JaxdynError, PromptBatch, Sites

PROMPTS, GENERATIONS, SLOTS, LENGTH = 8, 2, 6, 5
NEOX = gpt_neox(vocab_size=64, width=32, num_layers=2, num_heads=8, rotary_fraction=0.5)
CONFIGS = {
    "untied": NEOX,
    # Sizes that the axes do not divide: 61 tokens; tied, shared keys, gated, no biases, more norms,
    # and what later families have: layers of two kinds, embeddings and scores scaled.
    "odd": dataclasses.replace(
        NEOX,
        tied=True,
        vocab_size=61,
        gated_mlp=True,
        norm="zero_centered_rms",
        parallel_residual=False,
        qkv_bias=False,
        query_key_norm="head",
        norm_placement="both",
        scaled_embedding=True,
        attention_scalar=3,
        window=4,
        windowed=(True, False),
        window_rotary_base=100.0,
        rotated=(True, False),
    ),
}
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.01)
LOSS = LossConfig(beta=0.04, importance=ImportanceConfig(1.1))


pytestmark = pytest.mark.usefixtures("x64")


def layout_of(sizes):
    return Layout(make_mesh(MeshConfig(*sizes, devices=int(np.prod(sizes)))))


def on_host(tree):
    """What the host lays out on a mesh, a device would by a program for every shape."""
    return jax.tree.map(np.array, tree)


@functools.cache
def problem(name):
    config = CONFIGS[name]
    return LanguageModel(config, jnp.float64), on_host(oracles.drawn(config, jnp.float64))


def placed(name, sizes):
    model, params = problem(name)
    layout = one_device() if sizes is None else layout_of(sizes)
    if sizes is not None:
        model = shard_model(model, layout.mesh)
    return model, layout, layout.place(params)


def prompts():
    ids = np.random.default_rng(0).integers(0, 61, (PROMPTS, SLOTS)).astype(np.int32)
    return PromptBatch(
        jnp.asarray(ids), jnp.arange(SLOTS)[None] >= jnp.arange(PROMPTS)[:, None] % 3
    )


def batch_of(vocab):
    rng = np.random.default_rng(1)
    rows = PROMPTS * GENERATIONS
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, SLOTS + LENGTH)), jnp.int32)
    lengths = rng.integers(1, LENGTH + 1, (rows, 1))
    ends = np.arange(SLOTS + LENGTH)[None] < SLOTS + lengths
    mask = jnp.asarray(ends)
    names = ("ref_per_token_logps", "sampler_per_token_logps")
    rest = {name: jnp.asarray(rng.normal(-4, 0.3, (rows, LENGTH))) for name in names}
    return UpdateBatch(
        tokens, mask, tokens[:, SLOTS:], mask[:, SLOTS:], jnp.asarray(rng.normal(size=rows)), **rest
    )


def fresh_state(model, layout, params, stage):
    moving, frozen = trainable(OPTIM, stage, on_host(params))
    state = TrainState(moving, make_optimizer(OPTIM).init(moving))
    if model.config.tied:
        zeros = np.zeros(params["backbone"]["embed"]["embedding"].shape)
        state = state.replace(head_moment=zeros, head_share=zeros)
    return layout.place(on_host(state)), {} if stage == "classifier" else frozen


def static(model):
    return {"model": model, "loss": LOSS, "optim": OPTIM.rule, "microbatches": 2}


def two_updates(model, layout, params, stage, take=update):
    state, frozen = fresh_state(model, layout, params, stage)
    batch = layout.rows(batch_of(model.config.vocab_size))
    features = None
    if stage == "classifier":
        drawn = np.random.default_rng(2).normal(size=(len(batch.tokens), LENGTH, 32))
        features = layout.rows(drawn)
    for _ in range(2):
        numbers = (np.float64(1e-2), np.float64(1.0))
        state, metrics = take(state, frozen, batch, features, *numbers, **static(model))
    return state, metrics


def sites_of(layout, vocab):
    batch = batch_of(vocab)
    n = jnp.arange(8, dtype=jnp.int32)
    at = jnp.full(8, SLOTS - 1, jnp.int32)
    return layout.rows(
        Sites(batch.tokens[:8], batch.mask[:8], n, at, batch.tokens[:8, SLOTS], n % 2 == 0)
    )


@functools.cache
def on_one_device(name):
    return everything(name, None)


def everything(name, sizes):
    """Rollout, reference, both updates, state and propagation at probe sites."""
    model, layout, params = placed(name, sizes)
    view, vocab = model.view(params), model.config.vocab_size
    found = {}
    stages = ("joint",) if model.config.tied else ("joint", "classifier")
    for stage in stages:
        state, metrics = two_updates(model, layout, params, stage)
        found[stage] = (state.params, metrics)
        if stage == "joint":
            after, share = model.view(state.params), state.head_share
    found["rollout"] = generate(
        model,
        view,
        layout.rows(prompts()),
        layout.everywhere(jax.random.key(2)),
        num_generations=GENERATIONS,
        max_completion_length=LENGTH,
        stop_ids=(3,),
        harvest=True,
        support=True,
        top_p=0.9,
    )
    batch = layout.rows(batch_of(vocab))
    found["reference"] = policy_logps(model, view, batch, np.float64(0.7))
    sites = sites_of(layout, vocab)
    start = site_state(model, view, sites)
    found["state"] = measure_state(model, after, sites, start, start)
    found["propagation"] = measure_update(model, view, after, sites, share)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("untied", (2, 1, 4)), ("odd", (1, 4, 2))],
)
def test_a_mesh_changes_nothing(name, sizes):
    """All three axes at once are below."""
    found, wanted = everything(name, sizes), on_one_device(name)
    assert found.keys() == wanted.keys()
    for leaf, x in found.items():
        np.testing.assert_allclose(x, wanted[leaf], rtol=1e-9, atol=1e-9, err_msg=leaf)


def test_pmap_takes_the_same_update():
    model, params = problem("untied")
    layout = layout_of((4, 1, 1))
    alone = two_updates(model, one_device(), one_device().place(params), "joint")
    for given in (model, shard_model(model, layout.mesh)):
        take = functools.partial(pmap_update, layout)
        state, metrics = two_updates(given, layout, layout.place(params), "joint", take)
        for x, y in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-9)


def test_pmap_refuses_a_mesh_that_divides_parameters():
    with pytest.raises(JaxdynError, match=r"mesh.fsdp and mesh.tensor must be 1, got 2 and 2"):
        require_copies(layout_of((2, 2, 2)).mesh)
    require_copies(layout_of((8, 1, 1)).mesh)


def test_adapters_on_a_mesh():
    """The classifier's and the body's, whose ranks no axis divides."""
    config = LoraConfig(rank=3, alpha=6.0)
    results = []
    for layout in (one_device(), layout_of((2, 2, 2))):
        model, params = problem("untied")
        model, params = add_adapters(
            model, params, config, jax.random.key(1), backbone=True, classifier=True
        )
        if layout.mesh.size > 1:
            model = shard_model(model, layout.mesh)
        optim = dataclasses.replace(OPTIM, backbone="lora", classifier="lora")
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        moving, frozen = trainable(optim, "joint", params)
        state = TrainState(moving, make_optimizer(optim).init(moving))
        state, frozen = layout.place(on_host(state)), layout.place(frozen)
        batch = layout.rows(batch_of(64))
        numbers = (np.float64(1e-2), np.float64(1.0))
        results.append(update(state, frozen, batch, None, *numbers, **static(model)))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normed", ["head", "projection"])
def test_norms_inside_attention_on_a_mesh(normed):
    """The backbone opened, whose norms of queries and keys are divided as the heads are."""
    config = dataclasses.replace(CONFIGS["odd"], num_kv_heads=4, query_key_norm=normed)
    model = LanguageModel(config, jnp.float64)
    backbone = on_host(oracles.drawn(config, jnp.float64)["backbone"])
    batch = batch_of(61)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, backbone, tokens, mask):
        phi, inputs, pull = model.opened(backbone, tokens, mask)
        return phi, inputs, pull(jnp.sin(jnp.arange(phi.size)).reshape(phi.shape))

    layout = layout_of((2, 2, 2))
    alone = run(model, backbone, batch.tokens, batch.mask)
    rows = [layout.rows(x) for x in (batch.tokens, batch.mask)]
    there = run(
        shard_model(model, layout.mesh), layout.place({"backbone": backbone})["backbone"], *rows
    )
    slots = (SLOTS + LENGTH) * (8 if normed == "head" else 1)
    assert alone[1]["layers"]["attention"]["query_norm"].shape[:3] == (2, len(batch.tokens), slots)
    for x, y in zip(*map(jax.tree.leaves, (there, alone)), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_kernels_on_a_mesh_whose_budget_is_each_devices_and_whose_rows_are_shared():
    """Where one device makes tiles of two rows, a row on each of four does; so a whole pass is as
    large as its share says, by the compiler's account."""
    tiles, results = [], []
    for sizes in (None, (2, 2, 2)):
        model, _, params = placed("untied", sizes)
        sites = sites_of(one_device(), 64)
        slots, rows = sites.tokens.shape[1], model.row_shards
        held, working = row_bytes(model, slots, 1, 1)
        done: list[tuple[int, int]] = []
        found = kernels.log_prob_kernel(
            model,
            params,
            sites,
            method="gram",
            memory_budget=2 * (2 * held + working),
            progress=lambda *at, done=done: done.append(at),
        )
        tiles.append(done[-1][1])
        probes = {"num_probes": 2, "key": jax.random.key(0)}
        others = jax.tree.map(lambda x: x[:6], sites)
        results.append([found, kernels.trace_kernel(model, params, sites, others, **probes)])
    count = len(sites.rows)
    strips = [count, -(-count // 4)]
    assert tiles == [n * (n + 1) // 2 for n in strips]
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-9)

    of_sites = site_rows(model, sites, "sites").take(0, rows)
    lowered = factorize.lower(model, model.view(params), None, of_sites)
    account = lowered.compile().memory_analysis()
    assert account.output_size_in_bytes + account.temp_size_in_bytes <= held + working


def test_streams_on_a_mesh():
    """A layer opened at a time, in layers of two kinds: as on one device."""
    results = []
    for sizes in (None, (2, 2, 2)):
        model, _, params = placed("odd", sizes)
        rows = site_rows(model, sites_of(one_device(), model.config.vocab_size), "sites").take(0, 8)
        view = model.view(params)
        side = streams.Side(view, None, streams.stream(model, view, None, rows))
        results.append(
            streams.contract_streams(model, side, side, tied=True, biased=False, workspace=2**20)
        )
    alone, there = results
    for kind, x in alone.items():
        np.testing.assert_allclose(np.asarray(there[kind]), np.asarray(x), rtol=1e-9, atol=1e-9)


def test_a_ledger_on_a_mesh():
    results = []
    for sizes in (None, (2, 2, 2)):
        model, layout, params = placed("odd", sizes)
        moved = jax.tree.map(
            lambda x: x + 0.01 * np.cos(np.arange(x.size)).reshape(x.shape), on_host(params)
        )
        moved = layout.place(moved)
        sites = jax.tree.map(lambda x: x[:6], sites_of(one_device(), model.config.vocab_size))
        options = {"by_layer": ("log_prob",), "tolerance": 1e-3}
        results.append(vars(ledger(model, [params, moved], sites, **options)))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-9)


# -- what travels -------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-gather|all-to-all)(-start)?\(")


def gathered(program):
    """The largest array, in numbers, that a compiled program gathers."""
    sizes = [0]
    for shapes, *_ in COLLECTIVE.findall(program.as_text()):
        for dimensions in re.findall(r"\[([\d,]+)\]", shapes):
            sizes.append(int(np.prod([int(n) for n in dimensions.split(",")])))
    return max(sizes)


def zeros_of(config):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), oracles.shapes_of(config))


def compiled(function, *arguments, **static):
    """The program; JAX puts what are no arrays into our types on the way."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return function.lower(*arguments, **static).compile()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("normed", ["head", "projection"])
def test_norms_inside_attention_gather_no_heads(normed):
    """Where heads are divided, so are their norms: no more is gathered than without them."""
    layout = layout_of((1, 1, 8))

    def gathers(query_key_norm):
        config = dataclasses.replace(CONFIGS["odd"], query_key_norm=query_key_norm)
        model = shard_model(LanguageModel(config), layout.mesh)
        params = layout.place(zeros_of(config))
        batch = layout.rows(batch_of(61))
        program = compiled(jax.jit(model.features), params["backbone"], batch.tokens, batch.mask)
        return len(COLLECTIVE.findall(program.as_text()))

    assert gathers(normed) == gathers("none") > 0


WIDE = gpt_neox(vocab_size=4096, width=64, num_layers=6, num_heads=8, rotary_fraction=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_no_program_gathers_a_parameter_or_logits(sizes):
    """A layer's weights are gathered one layer at a time; W, stacks of layers and logits never."""
    model, layout = LanguageModel(WIDE), layout_of(sizes)
    model = shard_model(model, layout.mesh)
    params = layout.place(zeros_of(WIDE))
    view = model.view(params)
    batch, sites = layout.rows(batch_of(4096)), sites_of(layout, 4096)
    numbers = (np.float32(1e-2), np.float32(1.0))
    rows = PROMPTS * GENERATIONS
    classifier, logits = 4096 * 64, rows * LENGTH * 4096
    layer, activations = 4 * 64 * 64, rows * (SLOTS + LENGTH) * 64

    programs, held = {}, {}
    for stage in ("joint", "classifier"):
        state, frozen = fresh_state(model, layout, params, stage)
        features = layout.rows(jnp.zeros((rows, LENGTH, 64))) if stage == "classifier" else None
        arguments = (state, frozen, batch, features, *numbers)
        programs[stage] = compiled(update, *arguments, **static(model))
        held[stage] = sum(x.nbytes for x in jax.tree.leaves(state))
    programs["reference"] = compiled(policy_logps, model, view, batch, numbers[1])
    programs["sites"] = compiled(site_state, model, view, sites)
    for name, program in programs.items():
        most = gathered(program)
        assert most <= max(layer, activations), (name, most)
        assert most < min(classifier, logits) / 8, name
    # Per device: a share of the state, and no room for one whole gradient.
    ways = sizes[1] * sizes[2]
    for stage in ("joint", "classifier"):
        memory = programs[stage].memory_analysis()
        assert memory.argument_size_in_bytes < 1.1 * held[stage] / ways
    assert programs["classifier"].memory_analysis().temp_size_in_bytes < 4 * classifier
