"""Tiny runs: a random one-layer model, a handful of prompts in a JSONL file, a regular expression.

Everything here is one shape, so that the jitted programs are compiled once a session.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jaxdyn.config import RunConfig, SFTConfig
from jaxdyn.data import AnagramsConfig, DataConfig, character_tokenizer
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.models import LanguageModel, gpt_neox, save_pretrained
from jaxdyn.optim import OptimConfig
from jaxdyn.presets import RL, SFT
from jaxdyn.rewards import Length, RegexMatch, RewardConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import EvaluationConfig, ModelSource, SupervisedConfig, TrainConfig

ALPHABET = "0123456789=abcd"


def make_model(directory: Path, tied: bool = False, alphabet=ALPHABET, **overrides) -> str:
    """A random model and its tokenizer in the Hugging Face layout."""
    tokenizer = character_tokenizer(alphabet)
    config = gpt_neox(
        tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, max_positions=32, tied=tied
    )
    model = LanguageModel(dataclasses.replace(config, **overrides))
    params = model.init(jax.random.key(0))
    save_pretrained(directory, model, params, stop_ids=tokenizer.stop_ids)
    tokenizer.save(directory)
    return str(directory)


def make_prompts(path: Path, count: int = 20) -> str:
    """`count` rows with a prompt and a supervised completion."""
    rows = [{"prompt": f"{i}=", "completion": "ab" if i % 2 else "ba"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parts(root: Path, tied: bool = False, untie: bool = False) -> dict:
    """What an RL and a supervised run share; makes the model and the prompts on first use."""
    directory = root / ("tied" if tied else "model")
    if not directory.exists():
        make_model(directory, tied)
    prompts = root / "prompts.jsonl"
    if not prompts.exists():
        make_prompts(prompts)
    return {
        "model": ModelSource(str(directory), untie=untie),
        "data": DataConfig(
            "jsonl",
            path=str(prompts),
            completion_field="completion",
            held_out=0.2,
            cache_dir=str(root / "cache"),
        ),
        "reward": RewardConfig(("regex_match",), regex_match=RegexMatch("[ab]")),
        "sampling": SamplingConfig(max_completion_length=6),
        "evaluation": EvaluationConfig(every=3, num_prompts=2, num_generations=4),
    }


def rl_config(root: Path, output: str, tied: bool = False, untie: bool = False, **changes):
    """Six joint steps, a checkpoint every three, every update probed; `changes` are dotted."""
    config = RunConfig(
        output=str(root / output),
        **parts(root, tied, untie),
        optim=OptimConfig(learning_rate=3e-3, classifier_steps=3, warmup_steps=1, decay="linear"),
        train=TrainConfig(
            steps=6,
            num_prompts=2,
            num_generations=4,
            max_prompt_length=8,
            checkpoint_every=3,
            keep_checkpoints=0,
            save_completions=8,
        ),
        probe=ProbeConfig(every=1, num_prompts=3),
    )
    return replaced(config, changes)


def sft_config(root: Path, output: str, **changes):
    """Six supervised steps, a checkpoint every two."""
    config = SFTConfig(
        output=str(root / output),
        **parts(root),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, decay="cosine"),
        train=SupervisedConfig(steps=6, num_prompts=4, checkpoint_every=2, max_prompt_length=8),
    )
    return replaced(config, changes)


def quickstart_presets() -> tuple[SFTConfig, RunConfig]:
    """The quickstart's two, a few steps long, of a few rows."""
    few = {"num_prompts": 2, "num_generations": 2}
    sft, rl = SFT["quickstart"], RL["quickstart"]
    anagrams = AnagramsConfig(train_examples=64, test_examples=16)
    data = dataclasses.replace(sft.data, anagrams=anagrams)
    evaluation = dataclasses.replace(rl.evaluation, every=0, **few)
    train = dataclasses.replace(sft.train, steps=2, num_prompts=4)
    sft = dataclasses.replace(sft, data=data, evaluation=evaluation, train=train)
    rl = dataclasses.replace(
        rl,
        # A random model has no anagram right; some of its completions are shorter.
        reward=RewardConfig(("length",), length=Length(maximum=0, slack=9)),
        data=data,
        evaluation=evaluation,
        train=dataclasses.replace(rl.train, steps=2, **few),
        optim=dataclasses.replace(rl.optim, classifier_steps=1),
        probe=dataclasses.replace(rl.probe, every=1, num_prompts=2),
    )
    return sft, rl


def replaced(config, changes: dict):
    """`config` with fields changed; `optim__schedule` is the field `schedule` of `optim`."""
    for name, value in changes.items():
        head, _, rest = name.partition("__")
        if rest:
            value = replaced(getattr(config, head), {rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config


def lines(run: Path, name: str) -> list[dict]:
    """A log's records."""
    return [json.loads(line) for line in (Path(run) / name).read_text().split("\n") if line]


def without_times(records: list[dict]) -> list[str]:
    """Records as text, which compares nan with nan, less the fields that hold seconds."""
    timed = lambda key: key.startswith("time/") or key == "step_time"
    return [json.dumps({k: v for k, v in r.items() if not timed(k)}) for r in records]


def assert_same_run(run: Path, other: Path, apart: str = "time/") -> None:
    """Two runs' logs, times and what begins with `apart` left out, and arrays are the same to the
    bit."""
    kept = lambda records: [
        {k: v for k, v in record.items() if not k.startswith(apart)} for record in records
    ]
    for name in ("metrics.jsonl", "dynamics.jsonl", "samples.jsonl", "completions.jsonl"):
        got, expected = (kept(lines(r, name)) for r in (run, other))
        assert without_times(got) == without_times(expected), name
    arrays = sorted(p.name for p in (other / "dynamics").iterdir())
    assert sorted(p.name for p in (run / "dynamics").glob("*.npz")) == arrays
    for name in arrays:
        got, expected = (np.load(r / "dynamics" / name, allow_pickle=False) for r in (run, other))
        assert all(np.array_equal(got[k], expected[k], equal_nan=True) for k in expected)
