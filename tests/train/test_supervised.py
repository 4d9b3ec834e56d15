"""Supervised runs: what the loss counts, and linear probing, alone and before fine-tuning."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.grammar import save_config
from jaxdyn.train import open_run, run_sft
from jaxdyn.train.experience import examples_of
from jaxdyn.types import JaxdynError

FEW = {
    "train__steps": 3,
    "train__checkpoint_every": 1,
    "train__keep_checkpoints": 0,
    "evaluation__every": 0,
    "optim__classifier_steps": 2,
}


def supervised(root, schedule, output=None, **changes):
    """The run's directory; its learning rate stays the same."""
    changes = {**FEW, "optim__schedule": schedule, "optim__decay": "constant", **changes}
    return run_sft(tiny_runs.sft_config(root, output or schedule, **changes)).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("supervised")


@pytest.fixture(scope="module")
def probed(root):
    return supervised(root, "linear_probe")


@pytest.fixture(scope="module")
def tuned(root):
    return supervised(root, "linear_probe_then_finetune")


def parameters(run):
    """By the step that begins with them; those of the start too."""
    with open_run(run) as saved:
        return {0: saved.loaded.params, **{step: saved.policy(step)[1] for step in saved.steps}}


def same(a, b):
    return [bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]


def test_a_linear_probe_moves_the_classifier_alone(probed):
    found = parameters(probed)
    assert list(found) == [0, 1, 2, 3]
    for before, after in zip(range(3), range(1, 4), strict=True):
        assert all(same(found[before]["backbone"], found[after]["backbone"]))
        assert not any(same(found[before]["classifier"], found[after]["classifier"]))
    assert [line.get("cfrl/stage") for line in tiny_runs.lines(probed, "metrics.jsonl")] == [
        *(None, 1, 1, 1)
    ]


def test_fine_tuning_begins_where_the_probe_ends(probed, tuned):
    """Two steps that are the probe's to the bit; at the third the body moves too."""
    alone, found = parameters(probed), parameters(tuned)
    stages = [line.get("cfrl/stage") for line in tiny_runs.lines(tuned, "metrics.jsonl")]
    assert stages == [None, 1, 1, 2, 2, 2]
    for step in (1, 2):
        assert all(same(alone[step], found[step]))
    assert all(same(found[0]["backbone"], found[2]["backbone"]))
    assert not any(same(found[2]["backbone"], found[3]["backbone"]))


def test_the_probes_step_is_the_gradient_of_the_completions_tokens_alone(root):
    """ΔW = η Σ (e_y − π) φᵀ / N over the completions' N tokens, of the rows written out."""
    plain = {"optim__optimizer": "sgd", "optim__max_grad_norm": 0.0, "optim__warmup_steps": 0}
    changes = {"train__steps": 1, "optim__learning_rate": 0.5, **plain}
    run = supervised(root, "linear_probe", "plain", **changes)
    with open_run(run) as saved:
        model, before, tokenizer = saved.loaded.model, saved.loaded.params, saved.loaded.tokenizer
        after, examples = saved.policy(1)[1], examples_of(saved.task, 0)
    encode, stop = tokenizer.encode, tokenizer.stop_ids[0]
    answer = lambda e: [*encode(e["completion"], special_tokens=False), stop]
    rows = [(encode(e["prompt"]), answer(e)) for e in examples]
    tokens = np.full((len(rows), 8), stop)
    for row, (prompt, completion) in zip(tokens, rows, strict=True):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    # What stands after a row's end is seen by none of its slots.
    features = model.features(before["backbone"], jnp.asarray(tokens), jnp.ones((4, 8), bool))
    W = np.asarray(before["classifier"]["weight"], np.float64)
    gradient, loss, count = np.zeros_like(W), 0.0, 0
    for phi, (prompt, completion) in zip(np.asarray(features, np.float64), rows, strict=True):
        for slot, token in enumerate(completion, len(prompt) - 1):
            weights = np.exp(W @ phi[slot])
            pi = weights / weights.sum()
            loss, count = loss - np.log(pi[token]), count + 1
            gradient += np.outer(np.eye(len(W))[token] - pi, phi[slot])
    line = tiny_runs.lines(run, "metrics.jsonl")[1]
    np.testing.assert_allclose(line["loss"], loss / count, rtol=1e-5)
    moved = np.asarray(after["classifier"]["weight"], np.float64) - W
    # Float32: an ulp of the weights, and of a sum of twelve terms.
    np.testing.assert_allclose(moved, 0.5 * gradient / count, rtol=1e-4, atol=1e-7)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return line


@pytest.mark.parametrize("schedule", ["linear_probe", "linear_probe_then_finetune"])
def test_a_tied_model_is_refused_in_a_line_and_probed_when_untied(root, schedule, capsys, tmp_path):
    model = tiny_runs.parts(root, tied=True)["model"]
    config = tiny_runs.sft_config(root, str(tmp_path / "tied"), optim__schedule=schedule, **FEW)
    config = tiny_runs.replaced(config, {"model": model})
    with pytest.raises(JaxdynError, match=f"schedule {schedule} moves .* set model.untie"):
        run_sft(config)
    assert not (tmp_path / "tied").exists()
    if schedule == "linear_probe":
        steps = {"model__untie": True, "train__steps": 1}
        run = run_sft(tiny_runs.replaced(config, steps)).parent
        found = parameters(run)
        assert all(same(found[0]["backbone"], found[1]["backbone"]))
        assert "weight" in found[1]["classifier"]
        assert json.loads((run / "config.json").read_text())["optim"]["schedule"] == schedule


def test_each_kind_of_run_has_its_own_schedules(root, capsys, tmp_path):
    save_config(tiny_runs.rl_config(root, str(tmp_path / "rl")), tmp_path / "rl.json")
    save_config(tiny_runs.sft_config(root, str(tmp_path / "sft")), tmp_path / "sft.json")
    said = refused(
        capsys, "rl", "--config", str(tmp_path / "rl.json"), "--optim.schedule", "linear_probe"
    )
    assert "optim.schedule must be one of ['joint', 'classifier_first'" in said
    assert said.endswith("got 'linear_probe'")
    said = refused(
        capsys, "sft", "--config", str(tmp_path / "sft.json"), "--optim.schedule", "classifier_only"
    )
    assert "'linear_probe_then_finetune', 'joint_extra'], got 'classifier_only'" in said
