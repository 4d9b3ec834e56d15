"""Tiny runs whose adapters move, with the rest of the model frozen or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flax.traverse_util import flatten_dict
from test_resume import Killed, assert_same_run, at_call

from jaxdyn.commands.kernel_options import KernelOptions
from jaxdyn.commands.kernel_subject import open_subject
from jaxdyn.config import RunConfig
from jaxdyn.grammar import load_config
from jaxdyn.kernels import log_prob_kernel
from jaxdyn.models import LoraConfig, has_adapters, load_pretrained
from jaxdyn.train import analyze, export, loop, open_run, run_rl
from jaxdyn.train.task import load_model
from jaxdyn.types import JaxdynError, Sites

pytestmark = pytest.mark.slow


def lora_config(root, output, backbone, classifier, **changes):
    """Joint training, and before it a classifier stage where a classifier can move alone."""
    changes = {
        "lora": LoraConfig(rank=2, alpha=4.0),
        "optim__backbone": backbone,
        "optim__classifier": classifier,
        "optim__schedule": "joint" if classifier == "frozen" else "classifier_first",
        "train__steps": 3,
        **changes,
    }
    return tiny_runs.rl_config(root, output, **changes)


def end_of(run):
    """A run's model, its parameters at the start and at the end."""
    with open_run(run) as saved:
        return saved.loaded.model, saved.loaded.params, saved.state().params


@pytest.fixture(scope="module")
def both_run(root):
    return run_rl(lora_config(root, "lora-lora", "lora", "lora"))


@pytest.mark.parametrize(
    ("backbone", "classifier"),
    [("lora", "frozen"), ("lora", "lora"), ("lora", "full")],
)
def test_what_is_labelled_moves_and_nothing_else(root, backbone, classifier, request):
    if (backbone, classifier) == ("lora", "lora"):
        run = request.getfixturevalue("both_run")
    else:
        name = f"{backbone}-{classifier}"
        run = run_rl(lora_config(root, name, backbone, classifier))
    _, start, end = end_of(run)
    start, end = flatten_dict(start), flatten_dict(end)
    moved = {path for path, leaf in start.items() if np.any(leaf != end[path])}
    adapters = {path for path in start if path[-1] in ("lora_a", "lora_b")}
    modes = {"backbone": backbone, "classifier": classifier}
    assert moved == {
        path
        for path in start
        if modes[path[0]] == "full" or (modes[path[0]] == "lora" and path in adapters)
    }

    lines = tiny_runs.lines(run, "dynamics.jsonl")[1:]
    assert [line["cfrl/stage"] for line in lines] == [1] * (len(lines) - 3) + [2] * 3
    for line in lines:
        shares = [line[f"share/{part}"] for part in ("representation", "gradient", "cross")]
        np.testing.assert_allclose(sum(shares), 1, atol=1e-5)
        # Steps of 3e-3: the first order is nearly all.
        assert line["delta/correlation"] > 0.9
        if line["cfrl/stage"] == 1 or backbone == "frozen":
            assert (shares[0], line["features/drift/norm_mean"]) == (1.0, 0.0)
        elif classifier == "frozen":
            assert shares[1] == 1.0
    assert (lines[-1]["delta/gradient/rms"] > 0) == (backbone != "frozen")
    assert (lines[-1]["delta/representation/rms"] > 0) == (classifier != "frozen")


def test_killed_and_started_again(root, both_run, tmp_path, monkeypatch):
    config = lora_config(root, str(tmp_path / "run"), "lora", "lora")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setitem(loop.STEPS, "rl", at_call(5, loop.STEPS["rl"]))
        run_rl(config)
    assert_same_run(run_rl(config), both_run)
    assert load_config(RunConfig, both_run / "config.json").lora == config.lora


def test_export_merges_and_the_analysis_repeats_the_run(both_run, tmp_path):
    model, start, end = end_of(both_run)
    plain, params = load_pretrained(export(both_run, tmp_path / "model"))
    assert not has_adapters(params) and has_adapters(end)
    tokens, mask = jnp.asarray([[3, 1, 4, 2, 5]], jnp.int32), jnp.ones((1, 5), bool)

    def logits(model, params):
        return model.logits(params["classifier"], model.features(params["backbone"], tokens, mask))

    merged, adapted, before = logits(plain, params), logits(model, end), logits(model, start)
    scale = float(jnp.abs(adapted).max())
    # Float32 products of some tens of terms, through one layer.
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-5 * scale)
    assert float(jnp.abs(adapted - before).max()) > 1e-3 * scale

    again = tiny_runs.lines(analyze(both_run, tmp_path / "analysis"), "dynamics.jsonl")
    logged = {line["step"]: line for line in tiny_runs.lines(both_run, "dynamics.jsonl")}
    measured = [line for line in again if "share/gradient" in line]
    assert [line["step"] for line in measured] == [3]  # stage 2's first: three steps a checkpoint
    for line in measured:
        assert line["share/representation"] == logged[line["step"]]["share/representation"]


def test_kernels_of_a_run_are_merged_but_in_adams_metric_of_the_adapters(both_run):
    config = KernelOptions(run=str(both_run), prompts="unread", output="unwritten")
    merged = open_subject(config)
    assert not has_adapters(merged.params) and merged.preconditioner is None
    own = open_subject(KernelOptions(**{**vars(config), "preconditioned": True}))
    p = flatten_dict(own.preconditioner)
    assert all(np.any(x) == (path[-1] in ("lora_a", "lora_b")) for path, x in p.items())
    sites = Sites(
        tokens=jnp.asarray([[3, 1, 4, 2, 5]], jnp.int32),
        mask=jnp.ones((1, 5), bool),
        rows=jnp.zeros(2, jnp.int32),
        positions=jnp.asarray([2, 4], jnp.int32),
        targets=jnp.asarray([2, 3], jnp.int32),
        is_prompt=jnp.asarray([True, False]),
    )
    kernel = log_prob_kernel(own.model, own.params, sites, preconditioner=own.preconditioner)
    assert np.all(np.diag(kernel.representation) > 0) and np.all(np.diag(kernel.gradient) > 0)


def test_what_is_refused(root):
    for backbone, classifier in (("lora", "full"), ("full", "frozen"), ("full", "lora")):
        config = lora_config(root, "no", backbone, classifier, optim__schedule="joint")
        tied = tiny_runs.parts(root, tied=True)["model"]
        with pytest.raises(JaxdynError, match="them in one matrix: train both in full or neither"):
            run_rl(tiny_runs.replaced(config, {"model": tied}))
    assert not (root / "no").exists()


def test_a_tied_model_trains_adapters_in_both_parts(root):
    """Its shared matrix stays; the head's adapter makes the two matrices differ in the export."""
    config = lora_config(root, "tied-lora", "lora", "lora", optim__schedule="joint")
    config = tiny_runs.replaced(config, {"model": tiny_runs.parts(root, tied=True)["model"]})
    run = run_rl(config)
    _, start, end = end_of(run)
    shared = lambda params: params["backbone"]["embed"]["embedding"]
    np.testing.assert_array_equal(shared(start), shared(end))
    plain, params = load_pretrained(export(run, run / "model"))
    assert not plain.config.tied
    assert np.any(np.asarray(params["classifier"]["weight"]) != np.asarray(shared(params)))
    for line in tiny_runs.lines(run, "dynamics.jsonl")[1:]:
        assert line["share/cross"] == 0 and line["delta/correlation"] > 0.9


def test_an_exported_adapter_is_where_another_run_starts(root, both_run, tmp_path):
    """Trained on, to the bit; or added to the weights of a run that trains no adapters."""
    adapter = export(both_run, tmp_path / "adapter", adapter=True)
    _, _, end = end_of(both_run)
    source = dataclasses.replace(tiny_runs.parts(root)["model"], adapter=str(adapter))
    begin = lambda **changes: load_model(
        lora_config(root, "unused", "lora", "lora", model=source, **changes)
    )
    jax.tree.map(np.testing.assert_array_equal, begin().params, end)
    with open_run(both_run) as saved:
        _, merged = saved.policy()
    full = begin(optim__backbone="full", optim__classifier="full").params
    # Float32 sums of a few products, in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), full, merged)
    with pytest.raises(JaxdynError, match="which is no adapter; export it without --adapter"):
        export(
            run_rl(lora_config(root, "lora-full", "lora", "full")), tmp_path / "no", adapter=True
        )
