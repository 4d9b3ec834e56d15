"""The table of families: what its rows promise, and that nothing else knows a family's name."""

import dataclasses
import re
from pathlib import Path

import jax
import oracles
import pytest

from jaxdyn import models
from jaxdyn.models import LanguageModel, config_from_hf, config_to_hf, llama
from jaxdyn.models.families import FAMILIES, family
from jaxdyn.models.hf_layout import stored_tensors
from jaxdyn.types import JaxdynError

ROOT = Path(models.__file__).parent
TABLE = ROOT / "families" / "__init__.py"


def plain(text):
    """Lower case without hyphens; llama3 is also the name of a way to stretch rotary positions."""
    return text.lower().replace("-", "").replace("_", "").replace("llama3", "")


def test_a_familys_name_stands_in_its_file_and_the_table_alone():
    for path in ROOT.rglob("*.py"):
        if path.name == "shapes.py":  # published models, by name
            continue
        there = {name for name in FAMILIES if plain(name) in plain(path.read_text())}
        assert there == (set(FAMILIES) if path == TABLE else {path.stem} & set(FAMILIES)), path


def test_every_file_has_a_row_and_every_row_a_constructor():
    files = {path.stem for path in TABLE.parent.glob("*.py")} - {"__init__", "family"}
    assert files == set(FAMILIES) == {row.model_type for row in FAMILIES.values()}
    for name, row in FAMILIES.items():
        assert hasattr(models, name)
        assert getattr(models, name) == row.config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_constructors_model_can_be_written_and_is_what_a_silent_config_means(name):
    config = getattr(models, name)(97, 24, 2, 3, 40, 64)
    sizes = (config.vocab_size, config.width, config.num_layers, config.num_heads)
    assert (*sizes, config.mlp_width, config.max_positions) == (97, 24, 2, 3, 40, 64)
    assert (config.num_kv_heads, config.head_dim) == (3, 8)
    data = config_to_hf(config)
    sized = {f.theirs for f in FAMILIES[name].fields if f.default in (family.REQUIRED, None)}
    assert config_from_hf({k: data[k] for k in sized | {"model_type"}}) == config
    # Every parameter has a name of its own, or a part of one.
    model = LanguageModel(config)
    leaves = [path for stored in stored_tensors(model) for path in stored.leaves]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert len(set(leaves)) == len(leaves) == len(jax.tree.leaves(shapes))


def test_a_constructor_takes_any_field_by_its_name():
    config = llama(97, 24, 2, 4, num_kv_heads=2, head_dim=10, rotary_base=500.0, tied=True)
    assert (config.num_kv_heads, config.head_dim, config.mlp_width) == (2, 10, 96)
    assert (config.rotary_base, config.tied, config.qkv_bias) == (500.0, True, False)


CHANGES = [
    ("query_key_norm", "head"),
    ("query_key_norm", "projection"),
    ("norm_placement", "after"),
    ("norm", "zero_centered_rms"),
    ("scaled_embedding", True),
    ("attention_scalar", 7),
    ("rotated", (True, False)),
]


def has(row, field, value):
    varies = {f.ours for f in row.fields} | set(row.layers({}, 4))
    return field in varies or row.constant.get(field) == value


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(n, f, v) for n in FAMILIES for f, v in CHANGES if not has(FAMILIES[n], f, v)],
)
def test_what_a_family_does_not_have_is_not_exported(name, field, value):
    config = getattr(models, name)(97, 24, 2, 3, **{field: value})
    message = re.escape(f"a {name} config.json cannot express {field} = {value!r}")
    with pytest.raises(JaxdynError, match=message):
        config_to_hf(config)


def test_an_unknown_family_is_refused_by_name():
    config = dataclasses.replace(oracles.LLAMA, architecture="mamba")
    known = ", ".join(FAMILIES)
    with pytest.raises(JaxdynError, match=f"architecture must be one of {known}, got 'mamba'"):
        config_to_hf(config)
