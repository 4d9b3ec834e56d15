"""`jaxdyn kernel`: the numbers in its file, going on where it was killed, its complaints."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny_runs

from jaxdyn import kernels
from jaxdyn.cli import main
from jaxdyn.commands import kernel as command
from jaxdyn.commands.kernel_options import KernelOptions
from jaxdyn.commands.text_options import bytes_of
from jaxdyn.data import load_tokenizer
from jaxdyn.models import load_pretrained
from jaxdyn.optim import make_optimizer
from jaxdyn.report import kernel_figure
from jaxdyn.report.kernel_file import load_kernel
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.progress import Progress
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.update import TrainState
from jaxdyn.types import COMPONENTS, JaxdynError, Sites


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tied and an untied model, and prompts of one to four characters."""
    root = tmp_path_factory.mktemp("kernel")
    tiny_runs.make_model(root / "model")
    tiny_runs.make_model(root / "tied", tied=True)
    rows = [("1=", "ab"), ("23=", "ba"), ("0=", "cdab"), ("4567", "d"), ("89=", "abcd")]
    lines = [json.dumps({"ask": a, "say": b, "completion": "unused"}) for a, b in rows]
    (root / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def undrawn(monkeypatch):
    """A picture takes a second, and is looked at elsewhere."""
    monkeypatch.setattr(command, "drawn_kernel", lambda saved: b"")


def test_messages_are_read_as_texts(root, tmp_path):
    rows = [{"ask": [{"role": "user", "content": "1="}], "say": "ab"}] * 2
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(root / "model")
    for template, prompt, said in (
        ("plain", "1=", "ab"),
        ("hh", "\n\nHuman: 1=\n\nAssistant:", " ab"),
    ):
        changes = {"prompts": str(tmp_path / "asked.jsonl"), "prompt_template": template}
        options = config_of(root, tmp_path / "out", limit=1, **changes)
        texts = command.texts_of(options, command.read_file(options, Progress()), tokenizer)
        assert texts == ([prompt], [said])


def config_of(root, output, model="model", completed=True, **changes):
    fields = {
        "model": model and str(root / model),
        "prompts": str(root / "texts.jsonl"),
        "prompt_field": "ask",
        "completion_field": "say" if completed else None,
        "output": str(output),
    }
    return KernelOptions(**(fields | changes))


def sites_of(saved):
    return Sites(**{f.name: jnp.asarray(getattr(saved, f.name)) for f in dataclasses.fields(Sites)})


def assert_same(saved, kernel, tolerance=1e-5):
    """Each component within `tolerance` (rounding of float32 sums) of its largest entry."""
    for part in COMPONENTS:
        expected = np.asarray(getattr(kernel, part))
        scale = np.abs(expected).max()
        got = getattr(saved, part)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale, err_msg=part)


def log_prob_gradients(model, params, texts):
    """∇ log π(last token | the others) of each text, padded on the right: rows of one matrix."""
    slots = 12
    lengths = np.array([len(ids) for ids in texts])
    ids = np.array([[*ids, *[0] * (slots - len(ids))] for ids in texts])
    mask = np.arange(slots)[None] < lengths[:, None] - 1

    def log_prob(params, ids, mask, length):
        view = model.view(params)
        phi = model.features(view["backbone"], ids[None], mask[None])[0, length - 2]
        return jax.nn.log_softmax(model.logits(view["classifier"], phi))[ids[length - 1]]

    each = jax.jit(jax.vmap(jax.grad(log_prob), in_axes=(None, 0, 0, 0)))
    leaves = jax.tree.leaves(each(params, ids, mask, lengths))
    return np.concatenate([np.reshape(x, (len(texts), -1)) for x in leaves], axis=1)


def site_ids(saved):
    """Token ids up to and with each site's target."""
    places = zip(saved.rows, saved.positions, saved.targets, strict=True)
    before = lambda row, end: saved.tokens[row, : end + 1][saved.mask[row, : end + 1]].tolist()
    return [[*before(row, end), int(target)] for row, end, target in places]


# -- what is in the file --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["model", "tied"])
def test_the_file_holds_the_kernel_between_the_texts_sites(model, root, tmp_path, capsys):
    path = command.run(config_of(root, tmp_path / "out", model, sites_per_completion=1))
    saved = load_kernel(path)
    lm, params = load_pretrained(root / model)
    encode = load_tokenizer(root / model).encode

    # One text ends in "d", whose only place inside is the stop token's.
    texts = [ids for ids, first in zip(site_ids(saved), saved.is_prompt, strict=True) if first]
    assert texts == [encode(text) for text in ("1=a", "23=b", "0=c", "4567d", "89=a")]
    assert saved.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert saved.contexts[0] == "1=" and saved.target_texts[0] == "a"
    assert (saved.contexts[7], saved.target_texts[7]) == ("4567d", "</s>")
    assert saved.prompts[3] == "4567" and saved.completions[3] == "d"

    gradients = log_prob_gradients(lm, params, site_ids(saved))
    expected = gradients @ gradients.T
    np.testing.assert_allclose(saved.total, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert_same(saved, kernels.log_prob_kernel(lm, params, sites_of(saved)))
    assert bool(np.any(saved.cross)) == (model == "tied")

    assert saved.about["unit"] == "nats per unit of learning rate × advantage"
    assert saved.about["targets"] == "the completion's next token"
    assert saved.about["model"]["config"] == json.loads(json.dumps(dataclasses.asdict(lm.config)))
    assert saved.about["config"]["sites_per_completion"] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["kernel.npz", "kernel.png"]
    said = capsys.readouterr().out
    share = (saved.gradient * saved.total).sum() / (saved.total**2).sum()
    np.testing.assert_allclose(saved.statistics["share/gradient"][0], share, rtol=1e-5)
    assert f"{saved.statistics['effective_rank/total']:.1f} of 10" in said
    assert f"{share:.3f}" in said and "10 × 10" in said
    assert f"picture: {path.with_suffix('.png')}" in said
    gram = (saved.features @ saved.features.T)[np.triu_indices(10, k=1)]
    assert f"{np.mean(gram < 0):.1%} below 0" in said


@pytest.mark.usefixtures("undrawn")
def test_without_completions_the_target_is_the_likeliest(root, tmp_path):
    saved = load_kernel(command.run(config_of(root, tmp_path / "out", completed=False, limit=3)))
    lm, params = load_pretrained(root / "model")
    texts = [load_tokenizer(root / "model").encode(text) for text in ("1=", "23=", "0=")]
    ends = np.array([len(ids) - 1 for ids in texts])
    tokens = np.array([[*ids, 0][:4] for ids in texts])  # padded on the right
    mask = np.arange(4)[None] <= ends[:, None]
    phi = jax.jit(lm.features)(params["backbone"], tokens, mask)[np.arange(3), ends]
    np.testing.assert_allclose(saved.features, phi, rtol=1e-4, atol=1e-5)
    assert saved.targets.tolist() == np.argmax(phi @ params["classifier"]["weight"].T, 1).tolist()
    assert saved.about["targets"] == "the model's most likely next token"
    assert saved.is_prompt.all() and saved.completions.tolist() == [""] * 3
    assert_same(saved, kernels.log_prob_kernel(lm, params, sites_of(saved)))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_by_part_and_in_float64(root, tmp_path):
    config = config_of(root, tmp_path / "out", by_part=True, dtype="float64")
    saved = load_kernel(command.run(config))
    assert set(saved.parts) == {"attention", "mlp", "norms", "embedding", "final_norm"}
    whole = sum(x.sum(axis=0) for x in saved.parts.values())
    assert saved.gradient.dtype == whole.dtype == np.float64
    scale = np.abs(whole).max()
    np.testing.assert_allclose(saved.gradient, whole, rtol=0, atol=1e-12 * scale)
    lm, params = load_pretrained(root / "model")
    parts = kernels.log_prob_kernel(lm, params, sites_of(saved), by_part=True).parts
    np.testing.assert_allclose(saved.parts["mlp"], parts["mlp"], rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_bfloat16_kernel_is_read_again(root, tmp_path):
    saved = load_kernel(command.run(config_of(root, tmp_path / "out", dtype="bfloat16", limit=2)))
    assert saved.features.dtype == saved.total.dtype == np.float32
    assert np.isfinite(saved.total).all() and np.any(saved.features)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("longest", [64, 2])
def test_whole_completions(longest, root, tmp_path):
    config = config_of(root, tmp_path / "out", quantity="sequence", max_completion_length=longest)
    saved = load_kernel(command.run(config))
    lm, params = load_pretrained(root / "model")
    texts = ["ab", "ba", "cdab", "d", "abcd"]
    counted = [min(len(text) + 1, longest) for text in texts]  # with the stop token
    assert np.bincount(saved.rows).tolist() == counted
    assert saved.target_texts.tolist() == [text[:longest] for text in texts]
    gradients = log_prob_gradients(lm, params, site_ids(saved))
    sums = np.array([gradients[saved.rows == row].sum(axis=0) for row in range(5)])
    expected = sums @ sums.T
    np.testing.assert_allclose(saved.total, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert saved.features is None


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_trace_by_probes(root, tmp_path):
    options = {"quantity": "trace", "mean": True}
    exact = load_kernel(command.run(config_of(root, tmp_path / "exact", **options)))
    lm, params = load_pretrained(root / "model")
    assert_same(exact, kernels.trace_kernel(lm, params, sites_of(exact), mean=True))
    assert exact.standard_error is None
    # The representation component of the mean is ⟨φ, φ'⟩ itself.
    gram = exact.features @ exact.features.T
    np.testing.assert_allclose(exact.representation, gram, rtol=1e-4, atol=1e-5)

    config = config_of(root, tmp_path / "probed", num_probes=64, seed=3, **options)
    probed = load_kernel(command.run(config))
    again = kernels.trace_kernel(
        lm, params, sites_of(exact), mean=True, num_probes=64, key=jax.random.key(3)
    )
    assert_same(probed, again)
    np.testing.assert_allclose(probed.standard_error, again.standard_error, rtol=1e-4)
    # Chebyshev: an entry is ten standard errors off with a chance below 1 %.
    assert (np.abs(probed.total - exact.total) < 10 * probed.standard_error).all()


def test_a_single_place_is_written_but_not_drawn(root, tmp_path, capsys):
    path = tmp_path / "out" / "kernel.npz"
    given = ["--model", str(root / "model"), "--prompts", str(root / "texts.jsonl")]
    given += ["--prompt-field", "ask", "--output", str(path.parent), "--limit", "1"]
    main(["kernel", *given])
    assert load_kernel(path).total.shape == (1, 1)
    assert [p.name for p in path.parent.iterdir()] == ["kernel.npz"]
    said = capsys.readouterr()
    assert said.out.endswith(f"kernel: {path}\n")
    assert "picture" not in said.out and "--limit 0 takes all" in said.err


# -- a run's checkpoint ---------------------------------------------------------------------------


def make_run(root, output, **changes):
    """A run directory with two checkpoints, the newer one after two steps of its optimizer."""
    config = tiny_runs.rl_config(root, output, optim__b2=0.9, optim__eps=1e-4, **changes)
    model, params = load_pretrained(config.model.path)
    optimizer = make_optimizer(config.optim)
    directory = RunDirectory(config.output, config)
    checkpoints = Checkpoints(directory.checkpoints)
    state = TrainState(params, optimizer.init(params))
    position = {"seed": 0, "stage": "joint", "num_tokens": 0, "time/wall": 0.0}
    for step in (1, 2):
        noise = jax.tree.map(
            lambda x, s=step: jnp.cos(s * jnp.arange(x.size).reshape(x.shape)), params
        )
        _, opt_state = optimizer.update(noise, state.opt_state, params)
        moved = jax.tree.map(lambda x, n: x + 0.01 * n, state.params, noise)
        state = state.replace(params=moved, opt_state=opt_state)
        checkpoints.save(step, state, {"step": step, **position})
    checkpoints.close()
    return directory.path, model, state


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_run_in_the_metric_of_its_optimizer(root, tmp_path):
    run, model, state = make_run(root, "run", optim__classifier_multiplier=3.0)
    config = config_of(root, tmp_path / "out", model=None, run=str(run), preconditioned=True)
    saved = load_kernel(command.run(config))
    gradients = log_prob_gradients(model, state.params, site_ids(saved))
    # Adam's second moments after two steps: P = 1 / (√(ν / (1 − b2²)) + ε).
    nu = {part: adam.nu for part, (adam, _) in state.opt_state[1].items()}
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(nu)])
    metric = 1 / (np.sqrt(flat / (1 - 0.9**2)) + 1e-4)
    times = {part: jax.tree.map(lambda x, m=m: np.full(x.shape, m), nu[part])
             for part, m in (("backbone", 1.0), ("classifier", 3.0))}  # fmt: skip
    metric *= np.concatenate([np.ravel(x) for x in jax.tree.leaves(times)])
    expected = (gradients * metric) @ gradients.T
    np.testing.assert_allclose(saved.total, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert saved.about["preconditioned"] and saved.about["model"]["step"] == 2
    assert "in Adam's metric" in kernel_figure.title_of(saved)

    older = dataclasses.replace(
        config, output=str(tmp_path / "older"), step=1, preconditioned=False, limit=2
    )
    assert load_kernel(command.run(older)).about["model"]["name"] == "run, step 1"
    with pytest.raises(JaxdynError, match=r"has checkpoints at steps \[1, 2\], not at 7"):
        command.run(dataclasses.replace(older, output=str(tmp_path / "none"), step=7))


def test_a_run_without_second_moments(root, tmp_path):
    run, _, _ = make_run(root, "sgd", optim__optimizer="sgd")
    config = config_of(root, tmp_path / "out", preconditioned=True, model=None, run=str(run))
    with pytest.raises(JaxdynError, match=r"second moments; .* was trained with sgd"):
        command.run(config)
    assert not (tmp_path / "out").exists()


# -- going on -------------------------------------------------------------------------------------


class Watched(Progress):
    """Counts tiles; raises KeyboardInterrupt once so many are done in this process."""

    def __init__(self, stop=None):
        super().__init__()
        self.stop, self.advances, self.found = stop, 0, 0

    def start(self, title, total, done=0):
        self.total, self.found = total, done
        return super().start(title, total, done)

    def advance(self, **figures):
        super().advance(**figures)
        self.advances += 1
        if self.advances == self.stop:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("undrawn")
def test_a_killed_command_goes_on(root, tmp_path):
    options = {"method": "gram", "memory_budget": "250kB", "sites_per_completion": 1}
    whole = Watched()
    expected = load_kernel(command.run(config_of(root, tmp_path / "whole", **options), whole))
    assert whole.advances == whole.total > 4

    config = config_of(root, tmp_path / "out", **options)
    with pytest.raises(KeyboardInterrupt):
        command.run(config, Watched(stop=3))
    assert {p.name for p in Path(config.output).iterdir()} == {"blocks"}
    with pytest.raises(JaxdynError, match="finished tiles of another kernel"):
        command.run(dataclasses.replace(config, limit=4))
    rest = Watched()
    saved = load_kernel(command.run(config, rest))
    # The first call says that the three found are done, then one more call for each of the others.
    assert rest.found == 2 and rest.advances == whole.total - 2
    np.testing.assert_array_equal(saved.total, expected.total)
    assert {p.name for p in Path(config.output).iterdir()} == {"kernel.npz", "kernel.png"}
    with pytest.raises(JaxdynError, match=r"already holds kernel.npz; choose another output"):
        command.run(config)


def test_an_output_that_holds_something_else(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JaxdynError, match=r"already holds notes.txt; choose another output"):
        command.run(config_of(root, tmp_path))
    with pytest.raises(JaxdynError, match=r"notes.txt is not a directory"):
        command.run(config_of(root, tmp_path / "notes.txt"))


# -- what cannot be done is said in a line --------------------------------------------------------


@pytest.mark.parametrize(
    "text, size",
    [("8GB", 8 * 10**9), ("512MiB", 2**29), ("1.5kb", 1500), ("4096", 4096), (" 2 GiB ", 2**31)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "8 apples", "1e9", "3i"])
def test_what_is_not_a_size(text):
    with pytest.raises(JaxdynError, match="must be a size"):
        bytes_of(text)


@pytest.fixture
def refused(root, tmp_path, capsys, monkeypatch):
    """Run the command with other options than those that work; its one line."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def run(*arguments, file=None, model="model", completed=False):
        given = [f"--prompts={file or root / 'texts.jsonl'}", f"--output={tmp_path / 'out'}"]
        given += ["--prompt-field=ask"] + (["--completion-field=say"] if completed else [])
        given += [f"--model={root / model}"] if model else []
        with pytest.raises(SystemExit) as stop:
            main(["kernel", *given, *arguments])
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert said.err.count("jaxdyn: ") == 1 and "Traceback" not in said.err
        assert not (tmp_path / "out" / "kernel.npz").exists()
        return said.err.rstrip("\n").split("\n")[-1]

    return run


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--quantity", "hessian"], "hessian"),
        (["--num-probes", "8"], "--num-probes is of --quantity trace, got log_prob"),
        (["--num-probes", "0"], "num_probes must be at least 1, got 0"),
        (["--mean"], "--mean is of --quantity trace, got log_prob"),
        (["--by-part", "--quantity", "trace"], "--by-part is of --quantity log_prob, got trace"),
        (["--preconditioned"], "--preconditioned is of a run: give --run, not --model"),
        (["--step", "3"], "--step is of a run: give --run, not --model"),
        (["--run", "somewhere"], "give --model or --run, not both"),
        (["--quantity", "sequence"], "needs completions: give --completion-field"),
        (["--sites-per-completion", "1"], "needs completions: give --completion-field"),
        (["--limit", "-1"], "limit must be at least 0, got -1"),
        (["--max-prompt-length", "0"], "max_prompt_length must be at least 1, got 0"),
        (["--memory-budget", "much"], "memory_budget must be a size"),
        (["--prompts", "/nowhere.jsonl"], "cannot read /nowhere.jsonl"),
        (["--prompt-field", "question"], "line 1 has no field 'question' for the prompt"),
        (["--max-prompt-length", "3"], "example 1 ('23='): the prompt has 4 tokens"),
        (["--devices", "9"], "devices is 9; this host has 8"),
        (["--memory-budget", "1kB", "--method", "gram"], "memory_budget is too small"),
        (["--quantity", "trace", "--num-probes", "1"], "num_probes must be at least 2"),
    ],
)
def test_what_does_not_fit(arguments, words, refused):
    assert words in refused(*arguments)


def test_neither_model_nor_run(refused, tmp_path):
    assert "give --model or --run, got none" in refused(model=None)
    assert "holds no run" in refused("--run", str(tmp_path), model=None)
    assert "--untie goes with --model" in refused("--run", "x", "--untie", model=None)


def test_sequence_takes_whole_completions(refused):
    line = refused("--quantity", "sequence", "--sites-per-completion", "2", completed=True)
    assert "leave --sites-per-completion out" in line


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty: wanted one JSON object a line"),
        ('{"ask": "1="}\n\n{"ask": \n', "line 3 is not JSON"),
        ('{"ask": "1="}\n{"ask": ""}\n', "line 2: 'ask' should be a non-empty text"),
        ('{"ask": "' + "1" * 40 + '"}\n', "example 0 has 41 tokens; the model's context is 32"),
        ('{"ask": "Z"}\n', "has no token for 'Z'"),
    ],
)
def test_files_of_prompts(content, words, refused, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    assert words in refused(file=tmp_path / "p.jsonl")
