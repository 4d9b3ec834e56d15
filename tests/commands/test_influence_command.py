"""`jaxdyn influence`: its file against the run's own probe, what it says, what it refuses."""

import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.commands import influence_page
from jaxdyn.commands.influence import run
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.errors import JaxdynError
from jaxdyn.models import load_pretrained
from jaxdyn.report.influence_file import load_influence
from jaxdyn.train import open_run, run_rl, run_sft

SPECIAL = ("<s>", "</s>", "<pad>")
pytestmark = pytest.mark.slow
ROWS = [
    {"prompt": f"{i // 3}=", "completion": ("ab", "ba", "cdab")[i % 3], "advantage": a}
    for i, a in enumerate([1.0, -0.5, 0.25, 0.0, 2.0, -1.0])
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("influence")


@pytest.fixture(scope="module")
def tied_run(root):
    changes = {"train__num_iterations": 2, "loss__beta": 0.1, "optim__weight_decay": 0.1}
    return run_rl(tiny_runs.rl_config(root, "tied-run", tied=True, **changes))


@pytest.fixture(scope="module")
def completions(root):
    path = root / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def closes(saved, tolerance):
    """The columns leave no more of the first order than rounding does, and the rows add up."""
    scale = np.abs(saved.actual).max(axis=1, keepdims=True)
    assert np.all(np.abs(saved.residual) < tolerance * scale)
    columns = saved.total.sum(axis=-1) + sum(x.sum(axis=0) for x in saved.others.values())
    whole = columns + saved.residual + saved.second_order
    np.testing.assert_allclose(whole, saved.actual, rtol=0, atol=1e-6 * float(scale.max()))


def test_a_step_at_the_runs_own_probe(tied_run, tmp_path):
    """What the run itself measured there when it took the step, with both of its inner epochs."""
    path = run(InfluenceOptions(str(tied_run), step=3, output=str(tmp_path / "out")))
    saved = load_influence(path)
    with np.load(tied_run / "dynamics" / "step_000003.npz") as file:
        logged = dict(file)
    scale = np.abs(logged["actual"]).max()
    np.testing.assert_allclose(saved.actual[0], logged["actual"], rtol=0, atol=1e-3 * scale)
    closes(saved, 1e-3)
    assert saved.total.shape == (2, 12, 8) and saved.about["epochs"] == 2
    assert np.all(saved.site_completion == -1) and not np.any(saved.site_group >= 0)
    # By path, over both epochs: the run follows it as well.
    own = saved.representation[0].sum(axis=-1)
    own = own + sum(x[0, 0] for x in saved.others.values())
    np.testing.assert_allclose(own, logged["representation"], rtol=0, atol=0.05 * scale)
    names = [x.name for x in sorted(path.parent.iterdir())]
    assert names == ["influence.html", "influence.json", "influence.npz"]


@pytest.fixture(scope="module")
def own_step(tied_run, tmp_path_factory):
    """A step at its own completions, by the command: its directory, and what its page was given."""
    output, pages = tmp_path_factory.mktemp("own") / "out", []
    real = influence_page.microscope_pages
    keep = lambda *given: pages.append(given) or real(*given)
    words = ["--sites", "batch", "--site-completions", "3", "--sites-per-completion", "2"]
    words += ["--by-token", "1", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(influence_page, "microscope_pages", keep)
        main(["influence", str(tied_run), *words])
    return output, pages[0], said.getvalue()


def test_the_page_has_every_token_and_at_the_sites_who_moved_them(own_step):
    output, (found, _, moved, *_), _ = own_step
    saved = load_influence(output / "influence.npz")
    seen, texts = found, saved.completions
    shown = set(saved.site_completion.tolist())
    for number in shown:
        pieces = [x for x in found.pieces[found.rows == number] if x not in SPECIAL]
        assert "".join(pieces) == texts[number]
    at = seen.change("log_prob")[0][moved.rows]
    np.testing.assert_allclose(at, saved.actual[0], rtol=0, atol=2e-6)
    assert np.array_equal(seen.targets[moved.rows], saved.targets)
    for q, function in enumerate(("log_prob", "entropy")):
        parts = sum(moved.contributions[function].values())
        np.testing.assert_array_equal(parts, saved.total[q])


def test_a_step_at_its_own_completions(tied_run, own_step):
    output, _, said = own_step
    assert f"influence: {output / 'influence.npz'}" in said and "second order" in said
    saved = load_influence(output / "influence.npz")
    closes(saved, 1e-3)
    with open_run(tied_run) as opened:
        assert saved.about["step"] == 3 == max(s for s in opened.steps if opened.follows(s))
    logged = [r for r in tiny_runs.lines(tied_run, "completions.jsonl") if r["step"] == 3]
    assert [r["completion"] for r in logged] == saved.completions.tolist()
    assert [r["reward"] for r in logged] == saved.rewards.tolist()
    assert saved.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(np.unique(saved.site_completion)) == 3
    ids = saved.completion_ids[saved.site_completion, saved.site_slot]
    assert np.array_equal(ids, saved.targets)
    assert np.array_equal(saved.group[saved.site_completion], saved.site_group)
    # The tokens of completion 1 make up its column.
    assert np.all(saved.places[:, 0] == 1)
    apart, whole = saved.by_token.sum(axis=-1), saved.components[..., 1]
    np.testing.assert_allclose(apart, whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    summary = json.loads((output / "influence.json").read_text())
    mean = summary["log_prob"]["mean"]
    origins = sum(mean[name]["total"] for name in ("itself", "completion", "group", "other"))
    assert origins == pytest.approx(mean["completions"]["total"], abs=1e-7)


def test_momentum_traced_to_its_batches(root, tmp_path, capsys):
    """With b1 = 0.01 the batch of the step before is all of it but 0.01 of the rest."""
    changes = {"train__checkpoint_every": 2, "optim__b1": 0.01}
    path = run_rl(tiny_runs.rl_config(root, "momentum", **changes))
    given = InfluenceOptions(str(path), step=4, momentum=1, output=str(tmp_path / "out"))
    saved = load_influence(run(given))
    closes(saved, 1e-3)
    assert "momentum of 3" in capsys.readouterr().out and saved.earlier_steps.tolist() == [3]
    assert saved.earlier.shape == (3, 2, 12, 1, 8)
    logged = [r for r in tiny_runs.lines(path, "completions.jsonl") if r["step"] == 3]
    assert [r["completion"] for r in logged] == saved.earlier_completions[0].tolist()
    assert [r["prompt"] for r in logged] == saved.earlier_prompts[0].tolist()
    older, whole = saved.by_batch["momentum_older"], saved.momentum
    assert 0 < np.abs(older).max() < 0.1 * np.abs(whole).max()
    with pytest.raises(JaxdynError, match=r"--momentum 3 begins with step 1, and no checkpoint"):
        run(dataclasses.replace(given, momentum=3))


def test_a_classifier_stage_moves_through_the_representation_alone(root, tmp_path):
    changes = {"optim__schedule": "classifier_only", "optim__classifier_steps": 0}
    path = run_rl(tiny_runs.rl_config(root, "head", **changes))
    saved = load_influence(run(InfluenceOptions(str(path), output=str(tmp_path / "out"))))
    closes(saved, 1e-3)
    assert saved.about["stage"] == "classifier"
    assert not saved.gradient.any() and not saved.cross.any() and saved.representation.any()


def outside(root, completions, output, **changes):
    fields = {"model": str(root / "model"), "completions": str(completions), "output": str(output)}
    return InfluenceOptions(**(fields | changes))


def test_from_outside(root, completions, tmp_path):
    """A step of gradient descent on −Σ A mean log π / U by automatic differentiation."""
    tiny_runs.parts(root)
    path = run(outside(root, completions, tmp_path / "out", site_completions=0))
    saved = load_influence(path)
    model, params = load_pretrained(root / "model")
    sites = np.arange(len(saved.rows))

    def log_probs(params, u):
        mask = saved.completion_mask[u]
        first = saved.tokens.shape[1] - len(mask)
        sequence = jnp.asarray(saved.tokens[u])[None], jnp.asarray(saved.mask[u])[None]
        phi = model.features(params["backbone"], *sequence)
        logits = model.logits(params["classifier"], phi)[0, first - 1 : -1]
        return jax.nn.log_softmax(logits)[np.arange(len(mask)), saved.completion_ids[u]]

    def objective(params, u):
        mask = saved.completion_mask[u]
        return saved.advantages[u] * (log_probs(params, u) * mask).sum() / mask.sum() / len(ROWS)

    gradient = jax.jit(jax.grad(objective), static_argnums=1)
    for u in (0, 4):
        g = gradient(params, u)
        for v in (0, 2, 4):
            along = jax.jvp(lambda p, v=v: log_probs(p, v), (params,), (g,))[1]
            here = sites[saved.site_completion == v]
            expected = np.asarray(along)[saved.site_slot[here]]
            np.testing.assert_allclose(saved.total[0, here, u], expected, rtol=2e-3, atol=1e-4)
    assert saved.actual is None and saved.about["unit"] == "nats per unit of learning rate"
    assert not saved.total[..., 3].any()  # its advantage is 0


def test_parquet_is_read_as_json_lines_are(root, completions, tmp_path):
    """Of a file with more rows as many as are asked for."""
    tiny_runs.parts(root)
    table = tmp_path / "completions.parquet"
    rows = [row | {"step": 1} for row in (*ROWS, ROWS[0])]
    pa.parquet.write_table(pa.Table.from_pylist(rows), table)
    given = {"site_completions": 0, "limit": len(ROWS)}
    one = load_influence(run(outside(root, completions, tmp_path / "one", **given)))
    two = load_influence(run(outside(root, table, tmp_path / "two", **given)))
    assert np.array_equal(one.total, two.total) and len(two.group) == len(ROWS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give a RUN or --model, got none"),
        ({"run": "r", "model": "m"}, "give a RUN or --model, not both"),
        ({"model": "m"}, "--model needs --completions"),
        ({"model": "m", "completions": "c", "step": 3}, "--step is of a run"),
        ({"model": "m", "completions": "c", "momentum": 2}, "--momentum is of a run"),
        ({"model": "m", "completions": "c", "sites": "probe"}, "--sites probe is of a run"),
        ({"run": "r", "aggregation": "token-mean"}, "--aggregation goes with .* got token-mean"),
        ({"run": "r", "memory_budget": "much"}, "memory_budget must be a size"),
        ({"run": "r", "site_completions": -1}, "site_completions must be at least 0, got -1"),
    ],
)
def test_options_that_are_refused(changes, words):
    with pytest.raises(JaxdynError, match=words):
        InfluenceOptions(**changes)


def test_runs_and_files_that_are_refused(root, tied_run, completions, tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(JaxdynError, match=r"checkpoints at steps \[3, 6\], not at 4"):
        run(InfluenceOptions(str(tied_run), step=4, output=output))
    with pytest.raises(JaxdynError, match=r"no step of .* follows its checkpoint 6"):
        run(InfluenceOptions(str(tied_run), step=6, output=output))
    with pytest.raises(JaxdynError, match="names completion 8; they go from 0 to 7"):
        run(InfluenceOptions(str(tied_run), by_token=(8,), output=output))
    supervised = run_sft(tiny_runs.sft_config(root, "supervised")).parent
    with pytest.raises(JaxdynError, match="is a run of jaxdyn sft; wanted one of rl"):
        run(InfluenceOptions(str(supervised), output=output))
    lines = {
        '{"prompt": "1=", "completion": "a"}': "row 1 has no field 'advantage'",
        '{"prompt": "1=", "completion": "a", "advantage": "high"}': "finite number, .* got 'high'",
        '{"prompt": "1=", "completion": "a", "advantage": NaN}': "finite number, .* got nan",
        '{"prompt": "1=", "advantage": 1}': "no field 'completion'",
    }
    for line, words in lines.items():
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(JaxdynError, match=words):
            run(outside(root, tmp_path / "bad.jsonl", output))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(JaxdynError, match=r"cannot read .*bad\.parquet"):
        run(outside(root, tmp_path / "bad.parquet", output))
