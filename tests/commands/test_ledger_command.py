"""`jaxdyn ledger`: checkpoints by every kind of name, its file and summary, its complaints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.commands import ledger as command
from jaxdyn.commands.checkpoints import open_checkpoints
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.data import character_tokenizer, load_tokenizer
from jaxdyn.models import load_pretrained, save_pretrained
from jaxdyn.report.ledger_file import load_ledger, summarize_ledger
from jaxdyn.train import open_run, run_rl
from jaxdyn.types import JaxdynError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, what it became, and prompts, as messages, with completions."""
    root = tmp_path_factory.mktemp("ledger")
    tiny_runs.make_model(root / "before")
    model, params = load_pretrained(root / "before")
    tokenizer = load_tokenizer(root / "before")
    rng = np.random.default_rng(0)
    move = lambda x: x + jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype)
    save_pretrained(root / "after", model, jax.tree.map(move, params), stop_ids=tokenizer.stop_ids)
    tokenizer.save(root / "after")
    rows = [("1=", "ab"), ("23=", "ba"), ("0=", "cdab"), ("4567", "d")]
    asked = [[{"role": "user", "content": a}] for a, _ in rows]
    lines = [json.dumps({"prompt": a, "say": b}) for a, (_, b) in zip(asked, rows, strict=True)]
    (root / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def options_of(root, output, *names, **changes):
    fields = {
        "checkpoints": tuple(str(root / n) if not n.startswith("/") else n for n in names),
        "prompts": str(root / "texts.jsonl"),
        "output": str(output),
        "completion_field": "say",
        "prompt_template": "plain",
        "alternatives": 4,
    }
    return LedgerOptions(**(fields | changes))


def log_probs_of(directory, saved):
    """log π of every site's next token, straight from the checkpoint."""
    model, params = load_pretrained(directory)
    phi = model.features(params["backbone"], jnp.asarray(saved.tokens), jnp.asarray(saved.mask))
    logits = model.logits(params["classifier"], phi)[saved.rows, saved.positions]
    return np.asarray(jax.nn.log_softmax(logits))


@pytest.mark.slow
def test_the_file_has_what_happened(root, tmp_path, capsys):
    path = command.run(options_of(root, tmp_path / "out", "before", "after", by_token=("entropy",)))
    saved = load_ledger(path)
    assert {p.name for p in path.parent.iterdir()} >= {"ledger.npz", "ledger.json"}
    assert "representation" in capsys.readouterr().out
    # The tokens of the four completions, each with the stop token after it.
    text = lambda b: "".join(saved.pieces[saved.rows == b][:-1])
    assert [text(b) for b in range(4)] == ["ab", "ba", "cdab", "d"]
    before, after = (log_probs_of(root / name, saved) for name in ("before", "after"))
    at = np.arange(len(saved.targets)), saved.targets
    np.testing.assert_allclose(saved.values["log_prob"], [before[at], after[at]], atol=2e-6)
    entropy = lambda x: -(np.exp(x) * x).sum(axis=1)
    np.testing.assert_allclose(saved.values["entropy"][1], entropy(after), atol=2e-6)
    for quantity in ("log_prob", "entropy", "kl"):
        scale = np.abs(saved.change(quantity)).max()
        assert scale > 1e-4 and np.abs(saved.residual(quantity)).max() < 1e-3 * scale
    gradient = saved.parts["entropy"]["gradient"]
    np.testing.assert_allclose(saved.by_token["entropy"].sum(axis=1), gradient, atol=1e-6)
    body = sum(x.sum(-1) for k, x in saved.by_layer["log_prob"].items() if k != "classifier")
    by_text = np.bincount(saved.rows, saved.parts["log_prob"]["gradient"][0], 4)
    np.testing.assert_allclose(body[0], by_text, atol=1e-5)
    # Half of the followed tokens are those whose probability rose most, then those that fell.
    rise = np.exp(after) - np.exp(before)
    np.testing.assert_array_equal(saved.alternatives[:, 0], rise.argmax(axis=1))
    np.testing.assert_array_equal(saved.alternatives[:, 2], rise.argmin(axis=1))
    taken = np.take_along_axis(after, saved.alternatives, axis=1)
    np.testing.assert_allclose(saved.alternative_values[1], taken, atol=2e-6)
    summary = json.loads((path.parent / "ledger.json").read_text())
    found = summary["quantities"]["log_prob"]
    np.testing.assert_allclose(found["change"], (after - before)[at].mean(), rtol=1e-4)
    shares = found["representation_share"] + found["gradient_share"]
    np.testing.assert_allclose(shares, 1, atol=1e-3)
    low, high = found["representation_share_interval"]
    assert low < found["representation_share"] < high
    assert summary == json.loads(json.dumps(summarize_ledger(saved)))


@pytest.mark.slow
def test_sampled_by_the_first_and_the_last(root, tmp_path):
    changes = {"completion_field": None, "sample": "both", "max_completion_length": 5}
    options = options_of(root, tmp_path / "out", "before", "after", through="features", **changes)
    saved = load_ledger(command.run(options))
    names = [str(root / "before"), str(root / "after")]
    assert saved.about["writers"] == [names[0]] * 4 + [names[1]] * 4
    assert len(saved.prompts) == 8 and not saved.by_layer
    scale = np.abs(saved.change("log_prob")).max()
    assert np.abs(saved.residual("log_prob")).max() < 1e-3 * scale


@pytest.mark.slow
def test_runs_by_all_their_checkpoints_or_one(root, tmp_path):
    changes = {"evaluation__every": 0, "probe__every": 0, "train__checkpoint_every": 2}
    run = run_rl(tiny_runs.rl_config(root, "run", **changes))
    with open_checkpoints((str(root / "model"), str(run)), jnp.float32) as found:
        assert found.names == [str(root / "model"), f"{run}@2", f"{run}@4", f"{run}@6"]
        with open_run(run) as saved:
            for number, step in ((1, 2), (3, 6)):
                wanted = saved.policy(step)[1]
                jax.tree.map(np.testing.assert_array_equal, found[number], wanted)
    with open_checkpoints((f"{run}@4", f"{run}@6"), jnp.float32) as found:
        assert found.names == [f"{run}@4", f"{run}@6"] and not found.strangers
    with pytest.raises(JaxdynError, match=r"a run's step is a number or 'best', got 'last'"):
        open_checkpoints((f"{run}@last", f"{run}@6"), jnp.float32).__enter__()


@pytest.mark.slow
def test_adapters_of_a_run_are_parts_by_factor(root, tmp_path):
    changes = {"optim__backbone": "lora", "optim__classifier": "lora", "evaluation__every": 0}
    run = run_rl(tiny_runs.rl_config(root, "lora", probe__every=0, **changes))
    saved = load_ledger(command.run(options_of(root, tmp_path / "out", f"{run}@3", f"{run}@6")))
    kinds = {k for k, x in saved.by_layer["log_prob"].items() if np.abs(x).max() > 0}
    factors = {f"{k}_lora_{f}" for k in ("query", "key", "value", "out", "mlp") for f in "ab"}
    assert kinds == factors | {"classifier_lora_a", "classifier_lora_b"}
    # Beside the model they started from they are merged: one change of W.
    merged = load_ledger(command.run(options_of(root, tmp_path / "two", "model", f"{run}@6")))
    assert "query" in merged.by_layer["log_prob"] and "query_lora_a" not in merged.by_layer


@pytest.mark.slow
def test_another_tokenizer_is_named(root, tmp_path, capsys):
    directory = tiny_runs.make_model(root / "other")
    character_tokenizer(tiny_runs.ALPHABET[::-1]).save(directory)
    command.run(options_of(root, tmp_path / "out", "after", "other", through="features"))
    assert f"the tokenizer of {directory} differs from that of" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(root, tmp_path, capsys):
    before, after, texts = (str(root / n) for n in ("before", "after", "texts.jsonl"))
    tiny_runs.make_model(root / "wider", num_layers=2)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    given = ["--completion-field", "say", "--output", str(tmp_path / "out")]
    given += ["--prompt-template", "plain"]
    for words, said in [
        ([before, "--prompts", texts, *given], f"two checkpoints or more are wanted, got {before}"),
        ([before, before, "--prompts", texts, *given], "the 2 checkpoints are equal"),
        ([before, str(root / "wider"), "--prompts", texts, *given], "num_layers is 1 and 2"),
        ([before, after, "--prompts", texts, *given[:4]], "one of plain, hh, alpaca, got auto"),
        ([before, "/no/such", "--prompts", texts, *given], "/no/such is neither a directory"),
        ([before, after, "--prompts", "/no/such.jsonl", *given], "cannot read /no/such.jsonl"),
        ([before, after, "--prompts", str(tmp_path / "empty.jsonl"), *given], "is empty"),
        (
            [before, after, "--prompts", texts, *given[:2], "--output", str(tmp_path / "taken")],
            "already holds thesis.txt",
        ),
        (
            [before, after, "--prompts", texts, *given, "--sample", "both"],
            "give --completion-field or --sample, not both",
        ),
        (
            [before, after, "--prompts", texts, *given, "--alternatives", "3"],
            "an even number is wanted, got 3",
        ),
        (
            [before, after, "--prompts", texts, *given, "--tolerance", "2"],
            "tolerance must lie in (0, 1), got 2.0",
        ),
        ([before, after, "--prompts", texts, *given, "--memory-budget", "1KB"], "memory_budget"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["ledger", *words])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert said in error.splitlines()[-1] and error.splitlines()[-1].startswith("jaxdyn: ")


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    for content, said in [(b"", "is not a ledger file"), (b"PK\x03\x04", "is not a ledger file")]:
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(JaxdynError, match=said):
            load_ledger(tmp_path / "x.npz")
    with pytest.raises(JaxdynError, match="no such ledger file"):
        load_ledger(tmp_path / "nothing.npz")
    with (tmp_path / "k.npz").open("wb") as file:
        np.savez(file, about=json.dumps({"format": "jaxdyn kernel 2"}))
    with pytest.raises(JaxdynError, match="wanted 'jaxdyn ledger 1', got 'jaxdyn kernel 2'"):
        load_ledger(tmp_path / "k.npz")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "advised"), [("float32", True), ("float64", False)])
def test_a_change_as_small_as_its_rounding_is_told_what_helps(
    root, tmp_path, capsys, dtype, advised
):
    model, params = load_pretrained(root / "before")
    save_pretrained(tmp_path / "near", model, jax.tree.map(lambda x: x * (1 + 3e-7), params))
    load_tokenizer(root / "before").save(tmp_path / "near")
    options = options_of(root, tmp_path / "out", "before", str(tmp_path / "near"), dtype=dtype)
    saved = load_ledger(command.run(options))
    residual = summarize_ledger(saved)["quantities"]["log_prob"]["residual"]
    assert (residual > 1e-2) == advised
    assert ("--dtype float64 has none of it" in capsys.readouterr().out) == advised
