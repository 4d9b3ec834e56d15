"""Sketches in a file: the same as in memory, from where a killed call was; and who is nearest."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from kernel_oracles import PARTS, all_sites, rollout, some, tiny_model
from safetensors import safe_open
from safetensors.numpy import load, save_file

from jaxdyn.kernels import nearest, nearest_sketches, open_sketches, sketch_file, store_sketches
from jaxdyn.kernels import sketch as sketch_module
from jaxdyn.kernels.sketch import Sketch, sketch_gradients, sketch_kernel, sketch_sequences
from jaxdyn.storage.files import partial_of
from jaxdyn.types import JaxdynError

NAMES = ["gpt2-tied", "gpt_neox-untied"]
KEY = jax.random.key(3)
SIZES = {"replicates": 4, "side": 3}
TEXTS = {"before": ["α", "", "b\ud800", *"cdefg"], "next": list("stuvwxyz")}


@functools.cache
def in_memory(name):
    model, params = tiny_model(name, np.float32)
    return sketch_gradients(model, params, all_sites(), KEY, **SIZES)


@pytest.fixture(autouse=True)
def three_at_a_time(monkeypatch):
    monkeypatch.setattr(sketch_module, "_rows_at_once", lambda *_: 3)


def stored(path, name="gpt2-tied", **changes):
    model, params = tiny_model(name, np.float32)
    given = {"texts": TEXTS, "about": {"what": "tiny"}, **SIZES, **changes}
    places, key = given.pop("places", all_sites()), given.pop("key", KEY)
    return store_sketches(path, model, params, places, key, **given)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_what_memory_does(name, tmp_path):
    model, _ = tiny_model(name, np.float32)
    found, wanted = stored(tmp_path / "s.safetensors", name), in_memory(name)
    assert len(found) == 8 and found.key == wanted.key and (found.replicates, found.side) == (4, 3)
    assert isinstance(found.rows, np.memmap)
    taken = found.take([6, 1], model.config)
    for path in ("head", "body"):
        np.testing.assert_array_equal(getattr(taken, path), getattr(wanted, path)[np.array([6, 1])])
    assert [found.text("next", n) for n in range(8)] == TEXTS["next"]
    assert [found.text("before", n) for n in range(4)] == ["α", "", "b?", "c"]
    assert found.text("nothing", 1) == "" and found.about["what"] == "tiny"
    # Another reader of the format finds the same.
    with safe_open(found.path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("rows")[:, 0], wanted.head)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors"]


def test_whole_completions(tmp_path):
    model, params = tiny_model("gpt2-tied", np.float32)
    found = stored(tmp_path / "s.safetensors", places=rollout(), texts={})
    own = sketch_sequences(model, params, rollout(), found.key, **SIZES)
    np.testing.assert_array_equal(found.rows[:, 1], own.body)


def test_a_killed_call_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    monkeypatch.setattr(sketch_file, "SECONDS", 0)

    def kill(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(path, progress=kill)
    assert not path.exists() and json.loads(record_of(path).read_text())["rows"] == 6
    with pytest.raises(JaxdynError, match="unfinished sketches of something else"):
        stored(path, key=jax.random.key(4))
    calls = []
    found = stored(path, progress=lambda *done: calls.append(done))
    assert calls == [(3, 3)]
    np.testing.assert_array_equal(found.rows[:, 1], in_memory("gpt2-tied").body)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def record_of(path):
    return partial_of(path.with_name(f"{path.name}.rows"))


@pytest.mark.parametrize("name", NAMES)
def test_the_nearest_are_those_of_the_whole_kernel(name, tmp_path, monkeypatch):
    """Against all estimates and errors at once, and cosines from the replicates' sums."""
    monkeypatch.setattr(nearest, "BLOCK", 4 * 4 * 2 * 9 * 3)  # three rows at a time
    model, params = tiny_model(name, np.float32)
    file = stored(tmp_path / "s.safetensors", name)
    queries = sketch_gradients(
        model, params, some(all_sites(), np.array([2, 5])), file.key, **SIZES
    )
    found = nearest_sketches(file, queries, 3)
    whole = sketch_kernel(queries, in_memory(name))
    total = np.asarray(whole.total)
    order = np.argsort(-total, axis=1)
    np.testing.assert_array_equal(found.up, order[:, :3])
    np.testing.assert_array_equal(found.down, order[:, :-4:-1])
    for rows, kernel in ((found.up, found.of_up), (found.down, found.of_down)):
        for part in (*PARTS, "standard_error"):
            wanted = np.take_along_axis(np.asarray(getattr(whole, part)), rows, axis=1)
            np.testing.assert_allclose(getattr(kernel, part), wanted, rtol=1e-5, atol=1e-6)
    # The queries are rows of the file: of each the cosine with itself is 1.
    assert [row in rows for row, rows in zip([2, 5], found.up, strict=True)] == [True, True]
    np.testing.assert_allclose(found.up_cosines[found.up == [[2], [5]]], 1, rtol=1e-5)
    every = np.asarray(whole.standard_error)
    np.testing.assert_allclose(found.error, np.sqrt((every**2).mean(axis=1)), rtol=1e-5)
    assert found.largest == pytest.approx(np.sqrt(2 * np.log(8)))


def test_what_does_not_compare(tmp_path):
    model, _ = tiny_model("gpt2-tied", np.float32)
    file, queries = stored(tmp_path / "s.safetensors"), in_memory("gpt2-tied")
    with pytest.raises(JaxdynError, match="same key"):
        nearest_sketches(file, dataclasses.replace(queries, key=(1, 2)))
    halved = Sketch(queries.head[:, :2], queries.body[:, :2], queries.key, model.config)
    with pytest.raises(JaxdynError, match="same replicates and side"):
        nearest_sketches(file, halved)
    other, _ = tiny_model("gpt_neox-untied", np.float32)
    with pytest.raises(JaxdynError, match=r"is of another model: .* got"):
        nearest_sketches(file, dataclasses.replace(queries, config=other.config))
    with pytest.raises(JaxdynError, match="count must be at least 1, got 0"):
        nearest_sketches(file, queries, 0)
    with pytest.raises(JaxdynError, match=r"texts\['next'\] must be 8 texts, got 1"):
        stored(tmp_path / "t.safetensors", texts={"next": ["a"]})
    with pytest.raises(JaxdynError, match="replicates must be at least 2"):
        stored(tmp_path / "t.safetensors", replicates=1)


def damaged(content, how, path):
    if how == "empty":
        return b""
    if how == "cut short":
        return content[:-1]
    if how == "rows of another shape":
        return content.replace(b'"shape": [8, 2, 4, 9]', b'"shape": [8, 4, 2, 9]')
    if how == "another file":
        save_file({"rows": load(content)["rows"]}, path)
        return path.read_bytes()
    return content[:4] + bytes([255] * 4) + content[8:]


@pytest.mark.parametrize(
    "how", ["empty", "cut short", "rows of another shape", "another file", "header"]
)
def test_a_damaged_file_is_refused_in_a_line(how, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(damaged(written(), how, path))
    with pytest.raises(JaxdynError, match="is not a whole file of sketches") as error:
        open_sketches(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@functools.cache
def written():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return stored(Path(folder) / "s.safetensors").path.read_bytes()


def test_rows_that_are_not_finite_are_found(tmp_path):
    path = tmp_path / "s.safetensors"
    file = stored(path)
    rows = np.array(file.rows)
    rows[5, 1, 0, 0] = np.nan
    path.write_bytes(path.read_bytes()[: -rows.nbytes] + rows.tobytes())
    with pytest.raises(JaxdynError, match="row 5 is damaged"):
        nearest_sketches(open_sketches(path), in_memory("gpt2-tied"))
    with pytest.raises(JaxdynError, match="cannot read the sketches"):
        open_sketches(tmp_path / "none")
