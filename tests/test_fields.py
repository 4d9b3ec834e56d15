"""Every number that a user can set has two ends, and says which when it is beyond one."""

import dataclasses
import json
import typing

import jaxtyping
import pytest

from jaxdyn.cli import COMMANDS, found
from jaxdyn.config import RunConfig
from jaxdyn.grammar import MOST, load_config
from jaxdyn.types import JaxdynError

# What has no default.
NEEDED = {
    "KernelOptions": {"prompts": "p", "model": "m"},
    "SketchOptions": {"prompts": "p", "model": "m"},
    "EvaluateOptions": {"run": "r"},
    "InfluenceOptions": {"run": "r"},
    "LedgerOptions": {"checkpoints": ("a", "b"), "prompts": "p"},
    "PlanOptions": {"preset": "tiny"},
    "ExportOptions": {"run": "r", "output": "o"},
    "AnalyzeOptions": {"run": "r"},
    "ReportOptions": {"runs": ("r",)},
    "ScoreOptions": {"model": "m", "file": "f"},
}


def kinds(kind):
    """A dataclass of options, and those of its sections."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from kinds(hint)


def arguments_of(hint):
    """A type, and those inside it."""
    inner = [x for argument in typing.get_args(hint) for x in arguments_of(argument)]
    return [hint, *inner]


def numeric():
    """Of every field that may hold a number: its class, name, and whether it holds several."""
    every = {kind: None for row in COMMANDS.values() for kind in kinds(found(row.options))}
    for kind in every:
        for name, hint in typing.get_type_hints(kind).items():
            if {int, float} & set(arguments_of(hint)):
                origins = {typing.get_origin(x) for x in arguments_of(hint)}
                yield pytest.param(kind, name, tuple in origins, id=f"{kind.__name__}.{name}")


FIELDS = list(numeric())
ABSURD = (10**30 + 1, -(10**31), 10**400, 1e308, -1e308, float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize(("kind", "name", "several"), FIELDS)
def test_a_number_has_two_ends(kind, name, several, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    needed = NEEDED.get(kind.__name__, {})
    kind(**needed)
    for value in ABSURD:
        with pytest.raises(JaxdynError) as caught:
            kind(**{**needed, name: (value,) if several else value})
        said = str(caught.value)
        assert name in said and " must " in said and len(said) < 200 and "\n" not in said
        # The message says where the end is.
        assert "finite" in said or any(letter.isdigit() for letter in said.split(" must ")[1])
    try:  # what is small may be within
        kind(**{**needed, name: (-1,) if several else -1})
    except JaxdynError as error:
        assert name in str(error)


def test_the_fields_are_found():
    """Among them those that are nested, optional, several, or a number or a name."""
    names = {parameter.id for parameter in FIELDS}
    assert len(names) > 90
    assert {"TrainConfig.steps", "LossConfig.epsilon", "RewardConfig.weights"} <= names
    assert {"KernelOptions.step", "EvaluateOptions.pass_at", "Length.maximum"} <= names
    assert "ModelSource.dtype" not in names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"train": {"steps": 1%s}}' % ("0" * 30), "train.steps must be at most 1000000000, got 1"),
        ('{"train": {"steps": 1%s}}' % ("0" * 400), "got an integer of more than 60 digits"),
        ('{"seed": %s}' % ("9" * 5000), "config.json is not JSON: Exceeds the limit"),
        ('{"optim": {"learning_rate": 1%s}}' % ("0" * 400), f"must lie in [{-MOST:g}, {MOST:g}]"),
        ('{"optim": {"learning_rate": 1e999}}', "optim.learning_rate must be finite, got inf"),
        ('{"optim": {"learning_rate": NaN}}', "optim.learning_rate must be finite, got nan"),
        ('{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ('{"output": "a\\u0000b"}', "output cannot have a NUL in it"),
        ('{"output": "a\\ud800b"}', "output must be valid Unicode"),
        ('{"output": ' + "[" * 90000 + "]" * 90000 + "}", "lies more than 100 deep"),
        ('{"output": ' + "[" * 200 + "]" * 200 + "}", "lies more than 100 deep"),
        ('{"model": {"dtype": ["float32"]}}', "dtype: expected one of"),
        ('{"seed": 4294967296}', "seed must be at most 4294967295, got 4294967296"),
    ],
)
def test_a_configuration_file_of_absurd_values(data, message, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    path = tmp_path / "config.json"
    path.write_text(data)
    with pytest.raises(JaxdynError) as caught:
        load_config(RunConfig, path)
    assert message in str(caught.value) and len(str(caught.value)) < 300
    json.dumps(str(caught.value))
