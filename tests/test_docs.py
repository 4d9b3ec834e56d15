"""The documents: every page's Python runs, every link leads somewhere, every command exists."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import COMMANDS
from jaxdyn.data import AnagramsConfig
from jaxdyn.presets import RL
from jaxdyn.rewards import Length, RewardConfig
from jaxdyn.sections import ModelSource
from jaxdyn.train import run_rl

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT = ("CONTRIBUTING.md", "findings.md")
WITH_PYTHON = [page for page in PAGES if page.name not in WITHOUT]


@pytest.fixture(scope="module")
def quickstarted(tmp_path_factory):
    """What the quickstart leaves, in small: a random model and two steps of RL on it."""
    here = tmp_path_factory.mktemp("docs")
    model = here / "runs/quickstart/sft/model"
    letters = AnagramsConfig().letters + "="
    tiny_runs.make_model(model, alphabet=letters, max_positions=64)
    base, few = RL["quickstart"], {"num_prompts": 2, "num_generations": 2}
    run_rl(
        dataclasses.replace(
            base,
            output=str(here / "runs/quickstart/joint"),
            model=ModelSource(str(model)),
            data=dataclasses.replace(
                base.data,
                anagrams=AnagramsConfig(train_examples=64, test_examples=16),
                cache_dir=str(here / "cache"),
            ),
            # A random model has no anagram right; some of its completions are shorter.
            reward=RewardConfig(("length",), length=Length(maximum=0, slack=9)),
            train=dataclasses.replace(
                base.train, steps=2, checkpoint_every=1, keep_checkpoints=0, **few
            ),
            evaluation=dataclasses.replace(base.evaluation, every=1, **few),
            probe=dataclasses.replace(base.probe, every=1, num_prompts=2),
        )
    )
    return here


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, quickstarted, monkeypatch, capsys):
    monkeypatch.chdir(quickstarted)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    found: dict = {}
    with jax.numpy_rank_promotion("allow"):  # neural-tangents promotes
        exec(compile("\n".join(blocks), page.name, "exec"), found)
    said = capsys.readouterr().out
    if page.name == "kernels.md":
        # neural-tangents' matrix is ours in its convention, in float32.
        sites, params = found["sites"], found["params"]
        kernel = found["kernels"].trace_kernel(found["model"], params, sites, mean=True)
        ntk = found["ntk"](found["site_prefixes"](sites), None, params)
        np.testing.assert_allclose(ntk, kernel.total, rtol=1e-4)
        # An ascent step along the full gradient: both parts of the kernel are positive
        # semi-definite, and at so small a step the first order is the change.
        share, correlation = map(float, said.split())
        assert 0 < share < 1 and correlation > 0.99
    if page.name == "devices.md":
        total = (
            found["kernels"]
            .log_prob_kernel(
                found["model"], found["params"], found["sites_from_prompts"](found["prompts"])
            )
            .total
        )
        numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", said)]
        np.testing.assert_allclose(numbers, np.ravel(total), rtol=1e-4)
    if page.name == "ledger.md":
        assert float(said) < 1e-3
        saved = found["found"]
        whole = saved.values["entropy"][-1] - saved.values["entropy"][0]
        np.testing.assert_allclose(found["change"].sum(axis=0), whole, atol=1e-6)
    if page.name == "rewards.md":
        assert said.strip() == "[0.0]"
    if page.name == "training.md":
        rate, steps = said.split(maxsplit=1)
        assert float(rate) == 3e-4 and steps.strip() == "[1, 2]"
        assert found["taken"].metrics["cfrl/stage"] == 2 and len(found["prompts"]) == 2
    if page.name == "results.md":
        assert said.startswith("{-1: ") and said.split()[-1] == "2"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_files_that_are_named_exist(page):
    text = page.read_text()
    for command in re.findall(r"(?:bin/|`)jaxdyn ([a-z]+)[ `\n]", text):
        assert command in COMMANDS, command
    for path in re.findall(r"`((?:jaxdyn|experiments|tests|tpu)/[\w./-]*\w)`", text):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path
