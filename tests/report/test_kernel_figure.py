import dataclasses
import gc
import json

import jax
import matplotlib
import numpy as np
import pytest

from jaxdyn.kernels import summarize
from jaxdyn.report import kernel_figure as figure
from jaxdyn.report.kernel_file import SavedKernel, load_kernel
from jaxdyn.report.plotting import STYLE
from jaxdyn.types import COMPONENTS, JaxdynError

NAMES = ("ant", "bee", "cat")


def saved_kernel(count=12, tied=True, features=True, parts=True, rng_seed=0, **changes):
    """A kernel of three kinds of places, shuffled: alike within a kind, unlike between kinds."""
    rng = np.random.default_rng(rng_seed)
    kinds = rng.permutation(np.arange(count) % 3)
    centres = 4 * np.eye(3, 20)
    gram = lambda: (lambda x: x @ x.T)(centres[kinds] + 0.2 * rng.standard_normal((count, 20)))
    two = rng.standard_normal((2, count, count))
    stacks = {"attention": np.stack([gram(), gram()]), "embedding": gram()[None]}
    cross = 0.1 * (two[0] + two[0].T) if tied else np.zeros((count, count))
    fields = {
        "representation": gram(),
        "gradient": sum(x.sum(axis=0) for x in stacks.values()),
        "cross": cross,
        "tokens": np.arange(2 * count, dtype=np.int32).reshape(count, 2),
        "mask": np.ones((count, 2), bool),
        "rows": np.arange(count, dtype=np.int32),
        "positions": np.ones(count, np.int32),
        "targets": kinds.astype(np.int32),
        "is_prompt": np.ones(count, bool),
        "contexts": np.array([f"one\n{kind} 漢" for kind in kinds]),
        "target_texts": np.array([NAMES[kind] for kind in kinds]),
        "prompts": np.array([f"prompt {n}" for n in range(count)]),
        "completions": np.array([""] * count),
        "parts": stacks if parts else {},
        "features": centres[kinds] + rng.standard_normal((count, 20)) if features else None,
        "about": {
            "entry": "⟨a, b⟩",
            "quantity": "log_prob",
            "preconditioned": False,
            "model": {"name": "tiny", "dtype": "float32", "config": {"tied": tied}},
            "config": {"num_probes": None},
        },
    }
    fields |= changes
    statistics = summarize(fields, fields["parts"], fields["features"])
    return SavedKernel(**fields, statistics=statistics)


# -- the file -------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(tmp_path):
    saved = saved_kernel(standard_error=np.full((12, 12), 0.5, np.float32))
    saved.write(tmp_path / "k.npz")
    again = load_kernel(tmp_path / "k.npz")
    assert again.about == saved.about
    assert set(again.parts) == {"attention", "embedding"}
    assert set(again.statistics) == set(saved.statistics)
    for kept, given in ((again.parts, saved.parts), (again.statistics, saved.statistics)):
        for name, x in kept.items():
            np.testing.assert_array_equal(x, given[name])
    for name in vars(saved):
        if name not in ("about", "parts", "statistics"):
            ours, theirs = getattr(saved, name), getattr(again, name)
            np.testing.assert_array_equal(theirs, ours, err_msg=name)
            assert theirs.dtype == ours.dtype
    with np.load(tmp_path / "k.npz") as file:  # as someone without jaxdyn reads it
        np.testing.assert_array_equal(file["total"], sum(file[name] for name in COMPONENTS))
        assert json.loads(str(file["about"]))["model"]["name"] == "tiny"


def without(path, *names, **changes):
    """Write again what is in a file, less some arrays and with others changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name not in names} | changes
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: p.unlink(), "no such kernel file"),
        (lambda p: p.write_bytes(b""), "is not a kernel file"),
        (lambda p: p.write_text("{}"), "is not a kernel file"),
        (lambda p: p.write_bytes(p.read_bytes()[:2000]), "is not a kernel file"),
        (
            lambda p: (np.save(p.with_suffix(".npy"), 1), p.with_suffix(".npy").rename(p)),
            "is not a",
        ),
        (lambda p: np.savez(p, x=1), "it has no description"),
        (lambda p: np.savez(p, x=np.array([{}])), "is not a kernel file"),
        (lambda p: np.savez(p, about="[1]"), "wanted 'jaxdyn kernel 2', got None"),
        (lambda p: np.savez(p, about='{"format": "x"}'), "wanted 'jaxdyn kernel 2', got 'x'"),
        (lambda p: without(p, "gradient"), "has no gradient"),
        (lambda p: without(p, cross=np.ones(12)), r"cross should be \[12, 12\], got \[12\]"),
    ],
)
def test_what_is_not_a_kernel_file_is_refused_in_a_line(damage, words, tmp_path):
    """And closed: a file left open is a warning, hence an error here."""
    path = tmp_path / "k.npz"
    saved_kernel().write(path)
    damage(path)
    with pytest.raises(JaxdynError, match=words) as said:
        load_kernel(path)
    assert "\n" not in str(said.value)
    del said
    gc.collect(0)


# -- what is drawn --------------------------------------------------------------------------------


def test_alike_places_come_together():
    saved = saved_kernel(count=15)
    order = figure.similarity_order(saved.total)
    assert sorted(order) == list(range(15))
    kinds = saved.targets[order]
    assert np.count_nonzero(np.diff(kinds)) == 2  # three kinds, two borders
    assert np.count_nonzero(np.diff(saved.targets)) > 2


def test_a_place_without_a_cosine_still_has_its_place():
    kernel = saved_kernel().total
    kernel[4, 4] = -1.0  # as a random estimate's diagonal may be
    order = figure.similarity_order(kernel)
    assert sorted(order) == list(range(12))
    values = figure.cosines(kernel)
    assert np.isnan(values[4]).all() and np.isnan(values[:, 4]).all()
    assert np.isfinite(np.delete(np.delete(values, 4, 0), 4, 1)).all()
    np.testing.assert_allclose(values[1, 2], kernel[1, 2] / np.sqrt(kernel[1, 1] * kernel[2, 2]))


def test_the_panels_draw_what_is_stored():
    """Every line, bar and label, of numbers that no kernel has."""
    saved = saved_kernel()
    made_up = np.random.default_rng(3)
    draw = lambda x: made_up.uniform(0.1, 1, x.shape)
    saved = dataclasses.replace(saved, statistics=jax.tree.map(draw, saved.statistics))
    axes = matplotlib.figure.Figure().subplots(4)
    stored = saved.statistics
    figure.draw_spectra(axes[0], saved)
    for line, name in zip(axes[0].lines, ("total", *COMPONENTS), strict=True):
        values = np.sort(stored[f"spectrum/{name}"])[::-1]
        np.testing.assert_allclose(line.get_ydata(), values / values.sum())
        assert line.get_label() == f"{name}, {stored[f'effective_rank/{name}']:.1f}"
    figure.draw_shares(axes[1], saved)
    for bars, name in zip(axes[1].containers, COMPONENTS, strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in bars], stored[f"share/{name}"])
    figure.draw_feature_cosines(axes[2], saved)
    assert f"mean {stored['features/cosines'].mean():.2f}" in axes[2].texts[0].get_text()
    figure.draw_layers(axes[3], saved)
    for line, kind in zip(axes[3].lines, saved.parts, strict=False):
        np.testing.assert_allclose(line.get_ydata(), stored[f"share_by_layer/{kind}"])


def test_a_file_of_the_first_format_is_read_but_not_drawn(tmp_path):
    saved = saved_kernel()
    saved.write(tmp_path / "k.npz")
    about = json.dumps({**saved.about, "format": "jaxdyn kernel 1"})
    without(tmp_path / "k.npz", *saved.statistics, about=about)
    again = load_kernel(tmp_path / "k.npz")
    np.testing.assert_array_equal(again.total, saved.total)
    with pytest.raises(JaxdynError, match="earlier format, without spectra: compute it again"):
        figure.draw_kernel(tmp_path / "k.npz", tmp_path / "k.png")


@pytest.mark.parametrize(
    "largest, reach", [(0.05, 0.1), (0.2, 0.25), (0.3, 0.5), (0.6, 1.0), (1.0, 1.0)]
)
def test_colours_end_beyond_the_cosines_between_places(largest, reach):
    values = np.full((4, 4), largest)
    np.fill_diagonal(values, 1.0)
    assert figure.colour_reach(values) == reach


def images(drawn):
    """The heat maps by their titles."""
    cells = [cell for cell in drawn.findobj(matplotlib.axes.Axes) if cell.images]
    return {cell.get_title(loc="left"): cell for cell in cells}


def test_the_maps_are_the_components_in_the_totals_order():
    saved = saved_kernel()
    with matplotlib.rc_context(STYLE):
        drawn = figure.kernel_figure(saved)
    order = figure.similarity_order(saved.total)
    maps = images(drawn)
    titles = ["total: Kᵢⱼ / √(Kᵢᵢ Kⱼⱼ), alike places together", "representation", "gradient"]
    assert list(maps) == [*titles, "cross, scaled as the total"]
    for title, name in zip(titles, ("total", *COMPONENTS), strict=False):
        shown = maps[title].images[0].get_array()
        expected = figure.cosines(getattr(saved, name))[np.ix_(order, order)]
        np.testing.assert_allclose(shown, expected)
        assert maps[title].images[0].get_clim() == maps["gradient"].images[0].get_clim()
    scale = np.sqrt(np.diagonal(saved.total))
    expected = (saved.cross / np.outer(scale, scale))[np.ix_(order, order)]
    np.testing.assert_allclose(maps["cross, scaled as the total"].images[0].get_array(), expected)
    labels = [text.get_text() for text in maps[titles[0]].get_yticklabels()]
    assert labels == [f"one⏎{saved.targets[n]} □ → {saved.target_texts[n]}" for n in order]


@pytest.mark.parametrize(
    "changes, panels",
    [
        ({"features": False, "parts": False, "tied": False}, 2),
        ({"parts": False}, 3),
        ({}, 4),
        ({"count": 41, "tied": False}, 4),
        ({"count": 2, "tied": False}, 4),
    ],
)
def test_a_picture_of_every_kind(changes, panels, tmp_path):
    saved = saved_kernel(**changes)
    with matplotlib.rc_context(STYLE):
        drawn = figure.kernel_figure(saved)
    titled = [c for c in drawn.findobj(matplotlib.axes.Axes) if c.get_title(loc="left")]
    assert len(titled) == panels + (4 if changes.get("tied", True) else 3)
    saved.write(tmp_path / "k.npz")
    figure.draw_kernel(tmp_path / "k.npz", tmp_path / "k.png")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


def test_one_place_has_no_picture(tmp_path):
    saved_kernel(count=1).write(tmp_path / "k.npz")
    with pytest.raises(JaxdynError, match="a single place"):
        figure.draw_kernel(tmp_path / "k.npz", tmp_path / "k.png")
    assert not (tmp_path / "k.png").exists()


def test_texts_on_one_line():
    assert figure.shown("a\nb", 9) == "a⏎b"
    assert figure.shown("abcdefgh", 5) == "abcd…"
    assert figure.shown("abcdefgh", 5, end=True) == "…efgh"
