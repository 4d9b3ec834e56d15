"""An influence file: written, read again, refused; and its sums by origin, against plain loops."""

import dataclasses
import json
import operator

import numpy as np
import pytest

from jaxdyn.errors import JaxdynError
from jaxdyn.report.influence_file import SavedInfluence, load_influence
from jaxdyn.report.origins import by_origin, by_sign, cancellation, summarize_influence

GROUP = np.array([0, 0, 1, 1, 2])
SITE_COMPLETION = np.array([3, -1, 0, -1])
SITE_GROUP = np.array([1, 2, 0, -1])
ADVANTAGES = np.array([1.0, -1.0, 0.5, 0.0, 2.0])


def saved_one(**changes):
    """Five completions of three prompts, and four sites: two inside them, one at a third prompt."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    texts = lambda n: np.array([f"text {i} <b>" for i in range(n)], np.str_)
    columns = {name: draw(3, 2, 4) for name in ("clipping", "momentum", "decay")}
    fields = {
        "representation": draw(2, 4, 5),
        "gradient": draw(2, 4, 5),
        "cross": draw(2, 4, 5),
        "tokens": np.zeros((2, 6), int),
        "mask": np.ones((2, 6), bool),
        **{name: np.arange(4) for name in ("rows", "positions", "targets")},
        "is_prompt": np.zeros(4, bool),
        "contexts": texts(4),
        "target_texts": texts(4),
        "site_completion": SITE_COMPLETION,
        "site_slot": np.array([1, -1, 0, -1]),
        "site_group": SITE_GROUP,
        "group": GROUP,
        "prompts": texts(5),
        "completions": texts(5),
        "advantages": ADVANTAGES,
        "completion_ids": np.zeros((5, 3), int),
        "completion_mask": np.ones((5, 3), bool),
        "weights": draw(5, 3, 2),
        "about": {"unit": "nats", "model": "a run"},
        "first_order": draw(2, 4),
        "actual": draw(2, 4),
        "itself": np.where(SITE_COMPLETION >= 0, draw(3, 2, 4), 0),
        **columns,
    }
    return SavedInfluence(**(fields | changes))


def test_written_and_read_again(tmp_path):
    saved = saved_one()
    saved.write(tmp_path / "influence.npz")
    again = load_influence(tmp_path / "influence.npz")
    for field in dataclasses.fields(saved):
        wanted, got = getattr(saved, field.name), getattr(again, field.name)
        same = np.array_equal if isinstance(wanted, np.ndarray) else operator.eq
        assert same(wanted, got), field.name
    rows = saved.total.sum(axis=-1) + sum(x.sum(axis=0) for x in saved.others.values())
    assert np.allclose(rows + again.residual + again.second_order, saved.actual, atol=1e-12)


def test_origins_are_disjoint_and_whole():
    saved = saved_one()
    found = by_origin(saved)
    for o in range(4):
        expected = dict.fromkeys(("itself", "completion", "group", "other"), 0.0)
        for u in range(5):
            kind = "group" if GROUP[u] == SITE_GROUP[o] else "other"
            kind = "completion" if SITE_COMPLETION[o] == u else kind
            expected[kind] = expected[kind] + saved.components[:, :, o, u]
        expected["itself"] = saved.itself[:, :, o]
        expected["completion"] = expected["completion"] - saved.itself[:, :, o]
        for name, x in expected.items():
            np.testing.assert_allclose(found[name][:, :, o], x, atol=1e-14, err_msg=name)
    whole = saved.components.sum(axis=-1)
    np.testing.assert_allclose(sum(found.values()), whole, atol=1e-14)
    signs = by_sign(saved)
    np.testing.assert_allclose(signs["positive"], saved.components[..., [0, 2, 4]].sum(axis=-1))
    np.testing.assert_allclose(sum(signs.values()), whole, atol=1e-14)


def test_the_sign_of_a_completion_whose_tokens_have_advantages():
    """It is that of their sum, of tokens alone."""
    advantages = np.tile(ADVANTAGES[:, None], (1, 3))
    advantages[3] = [1.0, 1.0, -5.0]
    mask = np.ones((5, 3), bool)
    mask[3, 2] = False
    signs = by_sign(saved_one(advantages=advantages, completion_mask=mask))
    assert not signs["zero"].any() and signs["positive"].any()


def test_cancellation():
    alike, apart = np.ones((2, 5)), np.array([[1.0, -1.0], [2.0, -2.0]])
    assert cancellation(alike) == 5 and cancellation(apart) == 0
    one = np.array([[3.0, 4.0]])
    np.testing.assert_allclose(cancellation(one), 49 / 25)
    assert np.isnan(cancellation(np.zeros((2, 5))))


def test_the_summary_is_json_and_adds_up():
    saved = saved_one()
    summary = json.loads(json.dumps(summarize_influence(saved)))
    for number, function in enumerate(("log_prob", "entropy")):
        mean = {name: x["total"] for name, x in summary[function]["mean"].items()}
        beside = mean["clipping"] + mean["momentum"] + mean["decay"]
        origins = mean["itself"] + mean["completion"] + mean["group"] + mean["other"]
        whole = origins + beside + mean["residual"] + mean["second_order"]
        np.testing.assert_allclose(origins, mean["completions"], atol=1e-14)
        np.testing.assert_allclose(whole, saved.actual[number].mean(), atol=1e-14)
        np.testing.assert_allclose(mean["actual"], saved.actual[number].mean())
        parts = summary[function]["mean"]["group"]
        np.testing.assert_allclose(
            parts["representation"] + parts["gradient"] + parts["cross"], parts["total"]
        )
    outside = saved_one(first_order=None, actual=None, clipping=None, momentum=None, decay=None)
    assert outside.residual is None and outside.second_order is None and not outside.others
    assert "actual" not in summarize_influence(outside)["log_prob"]["mean"]


def test_what_is_no_influence_file(tmp_path):
    path = tmp_path / "influence.npz"
    with pytest.raises(JaxdynError, match="no such influence file"):
        load_influence(path)
    path.write_text("not an archive")
    with pytest.raises(JaxdynError, match="is not an influence file"):
        load_influence(path)
    np.savez(path, about=json.dumps({"format": "jaxdyn kernel 2"}))
    with pytest.raises(JaxdynError, match="wanted 'jaxdyn influence 1', got 'jaxdyn kernel 2'"):
        load_influence(path)
    np.savez(path, about=np.array([{"format": 1}], dtype=object))
    with pytest.raises(JaxdynError, match="is not an influence file"):
        load_influence(path)
    saved_one(cross=np.zeros((2, 4, 4))).write(path)
    with pytest.raises(JaxdynError, match=r"cross should be \[2, 4, 5\], got \[2, 4, 4\]"):
        load_influence(path)
    np.savez(path, about=json.dumps({"format": "jaxdyn influence 1"}), rows=np.zeros(2))
    with pytest.raises(JaxdynError, match="not a whole influence file: it has no representation"):
        load_influence(path)
