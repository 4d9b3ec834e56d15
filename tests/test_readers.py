"""Files from outside: whatever they hold, they are read or refused in one line."""

import contextlib
import dataclasses
import gzip
import io
import json
import resource
import shutil
import zipfile

import damage
import jaxtyping
import numpy as np
import pytest
import tiny_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxdyn.config import KINDS, RunConfig, SFTConfig
from jaxdyn.data import (
    DataConfig,
    JsonlFile,
    Prompts,
    fit_prompts,
    load_source,
    load_tokenizer,
)
from jaxdyn.data.examples import as_json, example_of
from jaxdyn.data.files import rows_of
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import from_dict, load_config
from jaxdyn.kernels.store import Store
from jaxdyn.models import load_pretrained
from jaxdyn.models.hf_config import config_from_hf
from jaxdyn.storage import reading
from jaxdyn.train.task import open_tokenizer

# The same cases in every run.
TRIED = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = st.integers() | st.integers(10**18, 10**60) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(damage.HOSTILE)
TREES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3)
)


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@contextlib.contextmanager
def in_a_line():
    """Nothing is raised but a JaxdynError of one line."""
    try:
        yield
    except JaxdynError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory, as it is."""
    return tiny_runs.make_model(tmp_path_factory.mktemp("readers") / "model")


@pytest.fixture
def copy(model, tmp_path):
    """And one to damage."""
    return shutil.copytree(model, tmp_path / "copy")


# -- the grammar ----------------------------------------------------------------------------------


def fields_of(config, above=()):
    """Every field of a configuration, by its path."""
    for name, value in config.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*above, name))


WHOLE = {
    kind: json.loads(json.dumps(dataclasses.asdict(kind()))) for kind in (RunConfig, SFTConfig)
}
CHANGED = st.sampled_from(list(WHOLE)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.lists(st.tuples(st.sampled_from(list(fields_of(WHOLE[kind]))), TREES), max_size=2),
    )
)


@TRIED
@given(CHANGED)
def test_any_value_in_any_field_of_a_configuration(changed):
    kind, changes = changed
    data = WHOLE[kind]
    with contextlib.suppress(KeyError, TypeError):  # the first change took the second's place away
        for path, value in changes:
            data = damage.replaced(data, path, value)
    with in_a_line():
        config = from_dict(kind, data)
        assert from_dict(kind, json.loads(json.dumps(dataclasses.asdict(config))))


@TRIED
@given(
    st.binary(max_size=40) | st.text(max_size=40).map(lambda x: x.encode(errors="replace")) | TREES
)
def test_any_bytes_as_json(content):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    with in_a_line():
        reading.parse_json(content, "a file", unique=True)


def test_json_is_bounded():
    assert reading.parse_json("[" * 100 + "]" * 100, "x") is not None
    for text, words in {
        "[" * 101 + "]" * 101: "x is not JSON that we read: it lies more than 100 deep",
        '{"a":' * 50_000: "x is not JSON that we read: it lies more than 100 deep",
        "9" * 5000: "x is not JSON: Exceeds the limit",
        '{"a": 1, "b": {"c": 1, "c": 2}}': "'c' is given twice",
        b"\xff": "it is not UTF-8",
    }.items():
        with pytest.raises(JaxdynError, match=words):
            reading.parse_json(text, "x", unique=True)
    assert reading.parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}


def test_a_file_of_settings_has_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SETTINGS_BYTES", 10)
    (tmp_path / "c.json").write_text('{"output": "somewhere"}')
    with pytest.raises(JaxdynError, match=r"c\.json holds more than 10 bytes"):
        load_config(KINDS, tmp_path / "c.json")


# -- models and tokenizers ------------------------------------------------------------------------


@TRIED
@given(st.data())
def test_any_value_in_any_field_of_a_model(model, data):
    with open(f"{model}/config.json") as file:
        told = json.load(file)
    path = data.draw(st.sampled_from(list(damage.places(told))))
    with in_a_line():
        config = config_from_hf(damage.replaced(told, path, data.draw(TREES)))
        assert config.num_layers <= 10_000


@pytest.mark.parametrize("size", [10**7, 10**9, 10**30])
def test_a_model_of_more_layers_than_it_has_tensors(size, copy):
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(told | {"num_hidden_layers": size}))
    with pytest.raises(JaxdynError, match=r"num_hidden_layers = .* a whole number from 1 to 10000"):
        load_pretrained(copy)
    (copy / "config.json").write_text(json.dumps(told | {"num_hidden_layers": 9999}))
    with pytest.raises(JaxdynError, match="promises 9999 layers, and the checkpoint holds 16"):
        load_pretrained(copy)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_size_of_more_than_the_file_has(name, copy):
    """Refused before anything is made of that size."""
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(told | {name: 10**9}))
    with pytest.raises(JaxdynError, match=r"of 1000000000, and the checkpoint holds \d+ numbers"):
        load_pretrained(copy)


def test_a_model_that_does_not_fit_the_machine(copy, monkeypatch):
    monkeypatch.setattr(reading, "available_memory", lambda: 1000)
    with pytest.raises(JaxdynError, match=r"takes 1\.\d+e-05 GB in memory, and 1e-06 GB are avail"):
        load_pretrained(copy)


def test_memory_is_asked_of_the_system():
    there = reading.available_memory()
    assert 2**20 < there < 2**50


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(value, copy):
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[1] = value
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(JaxdynError, match=f"the tensor {name} is damaged: 1 of its .* not finite"):
        load_pretrained(copy)


def test_a_header_larger_than_its_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(damage.huge_header(None, path.read_bytes()))
    with pytest.raises(
        JaxdynError, match="its header should take 80000000000000 bytes, and it has"
    ):
        load_pretrained(copy)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("generation_config.json", {"eos_token_id": 2.0}, "eos_token_id should be a token's id"),
        (
            "generation_config.json",
            {"eos_token_id": [2, "3"]},
            "a whole number, or several, got '3'",
        ),
        ("generation_config.json", {"eos_token_id": True}, "got True"),
        ("generation_config.json", {"eos_token_id": 99}, "99 as a padding or stop token, outside"),
        ("generation_config.json", {"pad_token_id": 1e99}, "pad_token_id should be"),
        ("config.json", {"bos_token_id": {}}, "bos_token_id should be a token's id"),
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token should be a text, got 3"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "eos_token is not valid Unicode"),
        ("tokenizer_config.json", {"pad_token": {"content": [1]}}, "pad_token should be a text"),
        (
            "tokenizer_config.json",
            {"add_bos_token": "yes"},
            "add_bos_token should be true or false",
        ),
        ("tokenizer_config.json", {"chat_template": [{"name": []}, 3]}, None),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template should be a text"),
    ],
)
def test_what_names_tokens(file, change, words, copy):
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    open_ = lambda: open_tokenizer(copy, load_pretrained(copy)[0])
    if words is None:
        assert open_().chat_template is None
        return
    with pytest.raises(JaxdynError, match=words):
        open_()


def test_ids_with_gaps_beyond_the_model(copy):
    path = copy / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"]["a"] = 10**6
    path.write_text(json.dumps(told))
    assert load_tokenizer(copy).largest_id == 10**6
    with pytest.raises(JaxdynError, match="has a token of the id 1000000, outside the model's voc"):
        open_tokenizer(copy, load_pretrained(copy)[0])


def test_no_model_is_named(tmp_path):
    with pytest.raises(JaxdynError, match="no model is named: give a Hugging Face directory"):
        load_pretrained("")
    with pytest.raises(JaxdynError, match="the name of a model cannot have a NUL in it"):
        load_pretrained("a\0b")


# -- rows -----------------------------------------------------------------------------------------


@TRIED
@given(TREES, st.text(max_size=10), st.booleans())
def test_any_row(tmp_path, value, text, packed):
    path = tmp_path / ("r.jsonl.gz" if packed else "r.jsonl")
    lines = [{"prompt": value, "completion": text}, {"prompt": text, "messages": value}, value]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    with in_a_line():
        file = JsonlFile(str(path), "prompt", "completion")
        for row, where in rows_of(path):
            json.loads(as_json(example_of(row, file, where), where))


def test_a_text_and_a_line_have_a_size(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "1" * 10**7}) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(JaxdynError, match="'prompt' has 10000000 characters; a text has at most"):
        [example_of(row, JsonlFile(str(path)), where) for row, where in rows_of(path)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    monkeypatch.setattr("jaxdyn.data.files.LINE_BYTES", 1000)
    with pytest.raises(JaxdynError, match="line 1 has more than 1000 bytes"):
        list(rows_of(path))


# -- arrays and logs ------------------------------------------------------------------------------


def archive(**entries):
    """A zip of raw entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(f"{name}.npy", content)
    return file.getvalue()


@TRIED
@given(st.integers(0, 2**32), st.sampled_from(damage.NPZ + damage.BYTES))
def test_any_archive(tmp_path, seed, way):
    file = io.BytesIO()
    np.savez_compressed(file, a=np.arange(6.0), b=np.array(["x", "y"]))
    path = tmp_path / "a.npz"
    path.write_bytes(way(np.random.default_rng(seed), file.getvalue()))
    with in_a_line():
        for x in reading.read_arrays(path).values():
            assert isinstance(x, np.ndarray) and x.dtype.kind != "O"


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    path.write_bytes(damage.bomb(None, b"", size=2**24))
    monkeypatch.setattr(reading, "UNPACKED_BYTES", 2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        JaxdynError, match=r"would unpack from \d+ bytes to \d+, more than 100 times"
    ):
        reading.read_arrays(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000
    monkeypatch.setattr(reading, "available_memory", lambda: 2**20)
    with pytest.raises(JaxdynError, match=r"takes 0\.0168 GB in memory, and 0\.00105 GB are"):
        reading.read_arrays(path)


def test_an_archive_that_compresses_well_is_read(tmp_path):
    """Zeros, as where a component vanishes."""
    np.savez_compressed(tmp_path / "a.npz", cross=np.zeros((1000, 1000)))
    assert reading.read_arrays(tmp_path / "a.npz")["cross"].shape == (1000, 1000)


def test_a_damaged_tile_is_made_again(tmp_path):
    store = Store(tmp_path / "blocks", ["a"])
    store.save(0, 0, {"x": np.arange(4.0)})
    path = tmp_path / "blocks" / "tile_00000_00000.npz"
    whole = path.read_bytes()
    np.testing.assert_array_equal(store.load(0, 0)["x"], np.arange(4.0))
    plain = io.BytesIO()
    np.save(plain, np.arange(3))
    for content in (
        b"",
        whole[:-5],
        plain.getvalue(),
        archive(),
        archive(x=b""),
        archive(x=b"\0" * 9),
    ):
        path.write_bytes(content)
        assert store.load(0, 0) is None
    path.unlink()
    assert store.load(0, 0) is None
    (tmp_path / "blocks" / "kernel.json").write_bytes(b"\xff")
    with pytest.raises(JaxdynError, match="holds finished tiles of another kernel"):
        Store(tmp_path / "blocks", ["a"])


@TRIED
@given(TREES, st.integers(0, 2))
def test_any_line_of_a_log(tmp_path, value, place):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(3)]
    lines[place] = json.dumps(value)
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with in_a_line():
        assert all(-1 <= record["step"] <= 10**9 for record in reading.read_records(path))


# -- what a run works on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "3="}, "supervised training needs a text under 'completion' in every example"),
        ({"prompt": "3=", "completion": "ab" * 40}, "prompt and completion have 84 tokens"),
    ],
)
def test_a_row_of_no_use_is_found_before_the_run(row, words, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "1=", "completion": "a"}] * 9 + [row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig("jsonl", path=str(path), cache_dir=str(tmp_path / "cache"), held_out=0.2)
    tokenizer = load_tokenizer(model)
    prompts = Prompts(load_source(data, "train"), data, tokenizer)
    with pytest.raises(JaxdynError, match=words):
        fit_prompts(prompts, 8, 32)
    fit_prompts(prompts, 8)  # of no matter to RL
