"""The picture of a kernel: heat maps ordered by similarity, spectra, the components' shares."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from jaxdyn import COMPONENTS
from jaxdyn.errors import JaxdynError
from jaxdyn.report.kernel_file import SavedKernel, load_kernel
from jaxdyn.report.plotting import STYLE, draw_cosines, say_empty
from jaxdyn.storage.files import write_file

COLOURS = {
    "total": "#1A1A1A",
    "representation": "#0072B2",
    "gradient": "#D55E00",
    "cross": "#009E73",
}
PART_COLOURS = {
    "embedding": "#AA4499",
    "attention": "#0072B2",
    "mlp": "#D55E00",
    "norms": "#009E73",
    "final_norm": "#555555",
}
COLOUR_MAP = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#BBBBBB")
"""Blue below 0, white at 0, red above, grey where there is no value."""
LABELLED = 40  # places that can be labelled legibly
OPTIMAL = 1000  # places whose order is refined: the refinement takes a time of N² log N or more


def draw_kernel(path: str | Path, png: str | Path) -> None:
    """Draw a kernel file.

    Raises:
      JaxdynError: if it is not a kernel file, or of a single place, which has nothing to compare.
    """
    write_file(Path(png), drawn_kernel(load_kernel(path)))


def drawn_kernel(saved: SavedKernel) -> bytes:
    """The picture as a PNG; raises JaxdynError for a single place, as `draw_kernel`."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        kernel_figure(saved).savefig(buffer, format="png")
    return buffer.getvalue()


def kernel_figure(saved: SavedKernel) -> Figure:
    """The heat maps (the total large, with labels where they fit), and a row or two of panels."""
    if len(saved.total) < 2:
        raise JaxdynError("a kernel of a single place has nothing to compare, so no picture")
    if not saved.statistics:
        raise JaxdynError("the file is of an earlier format, without spectra: compute it again")
    panels: list[Callable[[Axes, SavedKernel], None]] = [draw_spectra, draw_shares]
    if saved.features is not None:
        panels.append(draw_feature_cosines)
    if saved.parts:
        panels.append(draw_layers)
    wide = 2 if len(panels) == 4 else len(panels)
    high = -(-len(panels) // wide)

    heights = (7.9 if np.any(saved.cross) else 6.9, 2.9 * high)  # three maps beside it, or two
    figure = Figure(figsize=(11.0, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    above.suptitle(title_of(saved), x=0.01, ha="left", fontsize=11.5)
    draw_maps(above, saved)
    cells = below.subplots(high, wide, squeeze=False)
    for cell, draw in zip(cells.flat, panels, strict=True):
        draw(cell, saved)
    return figure


def title_of(saved: SavedKernel) -> str:
    """What was computed, of which model, in two lines."""
    about = saved.about
    model = about["model"]
    metric = ", in Adam's metric" if about["preconditioned"] else ""
    tied = "tied" if model["config"]["tied"] else "untied"
    probes = about["config"].get("num_probes")
    estimate = f", estimated from {probes} probes" if probes else ""
    places = "completions" if about["quantity"] == "sequence" else "sites"
    return (
        f"{about['entry']}{metric}{estimate}\n"
        f"{shown(model['name'], 60)} ({tied}, {model['dtype']}), {len(saved.total)} {places}"
    )


# -- heat maps ------------------------------------------------------------------------------------


def cosines(kernel: np.ndarray, diagonal: np.ndarray | None = None) -> np.ndarray:
    """K_ij / √(d_i d_j) with d the diagonal of K, or the given one; NaN where d is not positive."""
    diagonal = np.diagonal(kernel) if diagonal is None else diagonal
    scale = np.sqrt(np.where(diagonal > 0, diagonal, np.nan).astype(np.float64))
    return kernel / scale[:, None] / scale[None, :]


def similarity_order(kernel: np.ndarray) -> np.ndarray:
    """A permutation that puts alike places together: the leaves of average-linkage clustering.

    The distance is 1 − cosine; a place without a cosine is as far from all as an orthogonal one.
    """
    distance = 1 - np.nan_to_num(np.clip(cosines(kernel), -1, 1), nan=0.0)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    pairs = squareform(distance, checks=False)
    return leaves_list(linkage(pairs, "average", optimal_ordering=len(kernel) <= OPTIMAL))


def draw_maps(figure: SubFigure, saved: SavedKernel) -> None:
    """The total's cosines, and beside them the components' in the same order."""
    order = similarity_order(saved.total)
    names = COMPONENTS if np.any(saved.cross) else COMPONENTS[:2]
    maps = {name: cosines(getattr(saved, name)) for name in ("total", *COMPONENTS[:2])}
    # The cross component has no positive diagonal of its own.
    maps["cross"] = cosines(saved.cross, np.diagonal(saved.total))
    reach = colour_reach(maps["total"])
    norm = Normalize(-reach, reach)

    wide = {2: 2.6, 3: 3.6}[len(names)]
    grid = figure.add_gridspec(len(names), 2, width_ratios=[wide, 1])
    main = figure.add_subplot(grid[:, 0], anchor="E")
    cells = {"total": main}
    cells |= {name: figure.add_subplot(grid[i, 1]) for i, name in enumerate(names)}
    for name, cell in cells.items():
        image = cell.imshow(maps[name][np.ix_(order, order)], cmap=COLOUR_MAP, norm=norm)
        cell.grid(False)
        cell.set(xticks=[], yticks=[], title=name)
        cell.spines[:].set_visible(True)
    main.set_title("total: Kᵢⱼ / √(Kᵢᵢ Kⱼⱼ), alike places together")
    if "cross" in cells:
        cells["cross"].set_title("cross, scaled as the total")
    if len(order) <= LABELLED:
        labels = [label_of(saved, n) for n in order.tolist()]
        main.set_yticks(range(len(order)), labels, fontsize=7.5)
        main.tick_params(axis="y", length=0)
    else:
        main.set_ylabel(f"{len(order)} places, in the order of similarity")
    extend = "neither" if reach == 1 else "both"
    bar = figure.colorbar(
        image, ax=main, location="bottom", extend=extend, shrink=0.5, aspect=36, pad=0.02
    )
    defined = all(np.isfinite(maps[name]).all() for name in cells)
    bar.set_label("cosine" if defined else "cosine (grey: a diagonal is not positive)")
    bar.outline.set_visible(False)


def colour_reach(values: np.ndarray) -> float:
    """Where the colours end: 1, or less where the cosines between two places are all small."""
    between = np.abs(values[~np.eye(len(values), dtype=bool)])
    between = between[np.isfinite(between)]
    largest = np.quantile(between, 0.995) if len(between) else 1.0
    return min((reach for reach in (0.1, 0.25, 0.5) if reach >= largest), default=1.0)


def label_of(saved: SavedKernel, place: int) -> str:
    """The end of what a place follows on, and the start of what is predicted there."""
    context = shown(str(saved.contexts[place]), 24, end=True)
    return f"{context} → {shown(str(saved.target_texts[place]).strip(' '), 14)}"


def shown(text: str, longest: int, end: bool = False) -> str:
    """A text on one line, its start or its end, in characters that the font has."""
    text = text.replace("\n", "⏎").replace("\t", " ")
    if len(text) > longest:
        text = f"…{text[1 - longest :]}" if end else f"{text[: longest - 1]}…"
    known = _characters()
    return "".join(c if ord(c) in known else "□" for c in text)


@cache
def _characters() -> frozenset[int]:
    """What the default font can draw; anything else would warn and show an empty box."""
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


# -- panels ---------------------------------------------------------------------------------------


def present(saved: SavedKernel) -> tuple[str, ...]:
    """The total and the components that are not zero everywhere."""
    return tuple(n for n in ("total", *COMPONENTS) if f"spectrum/{n}" in saved.statistics)


def draw_spectra(axes: Axes, saved: SavedKernel) -> None:
    """|λ_k| / Σ|λ| of the total and the components."""
    count = len(saved.total)
    floor = count * float(np.finfo(saved.total.dtype).eps)  # below it is rounding
    for name in present(saved):
        values = saved.statistics[f"spectrum/{name}"]
        sizes = np.sort(np.abs(values))[::-1] / np.abs(values).sum()
        rank = float(saved.statistics[f"effective_rank/{name}"])
        kept = sizes > floor
        axes.plot(
            np.arange(1, count + 1)[kept],
            sizes[kept],
            color=COLOURS[name],
            linewidth=2.2 if name == "total" else 1.5,
            marker="o" if count <= LABELLED else None,
            markersize=3,
            label=f"{name}, {rank:.1f}",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Spectra", xlabel="k", ylabel="|λₖ| / Σ |λ|")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.3)  # room for the legend
    axes.legend(title="effective rank", fontsize=8.5, title_fontsize=8.5, loc="upper right")


def draw_shares(axes: Axes, saved: SavedKernel) -> None:
    """Shares of the components in the total: everywhere, on the diagonal and off it."""
    groups = ("all pairs", "a place\nwith itself", "two places")
    names = present(saved)[1:]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        values = saved.statistics[f"share/{name}"].tolist()
        at = np.arange(len(groups)) + (index - (len(names) - 1) / 2) * width
        bars = axes.bar(at, values, 0.92 * width, color=COLOURS[name], label=name)
        labels = [f"{round(v, 2) + 0.0:.2f}" for v in values]
        axes.bar_label(bars, labels, fontsize=8.5, padding=1.5)
    axes.axhline(0, color="#999999", linewidth=0.9)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(False, axis="x")
    leave_room(axes)
    axes.set(title="Shares of the total", ylabel="⟨part, total⟩ / ⟨total, total⟩")
    axes.legend(fontsize=8.5, ncols=2, loc="upper left")


def leave_room(axes: Axes) -> None:
    """Room for a legend above what is drawn, and a little below."""
    axes.use_sticky_edges = False
    axes.margins(y=0.08)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.28 * (top - bottom))


def draw_feature_cosines(axes: Axes, saved: SavedKernel) -> None:
    """The cosines of the features of every two sites, and how many lie below 0."""
    pairs = saved.statistics["features/cosines"]
    pairs = pairs[np.isfinite(pairs)]
    if not len(pairs):
        return say_empty(axes)
    draw_cosines(axes, pairs, fill=True, color=COLOURS["representation"])
    axes.axvline(0, ymax=0.85, color="#999999", linewidth=0.9)
    axes.set(
        title="Features of every two sites", xlabel="cosine of φ and φ'", ylabel="share of pairs"
    )
    text = f"mean {np.mean(pairs):.2f}, {np.mean(pairs < 0):.1%} below 0"
    axes.annotate(text, (0.02, 0.97), xycoords="axes fraction", va="top", fontsize=8.5)
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])  # room for the text


def draw_layers(axes: Axes, saved: SavedKernel) -> None:
    """The gradient component's shares by layer and kind of parameter."""
    layers = max(len(x) for x in saved.parts.values())
    ends = {"embedding": -1, "final_norm": layers}
    for kind in saved.parts:
        values = saved.statistics[f"share_by_layer/{kind}"]
        at = [ends[kind]] if kind in ends else range(len(values))
        name = "MLP" if kind == "mlp" else kind.replace("_", " ")
        axes.plot(at, values, color=PART_COLOURS[kind], marker="o", markersize=4, label=name)
    axes.axhline(0, color="#999999", linewidth=0.9)
    named = [n for n in range(layers) if layers <= 12 or n % (layers // 8) == 0]
    axes.set_xticks([-1, *named, layers], ["emb.", *map(str, named), "norm"])
    axes.set(title="The gradient component by layer", xlabel="layer")
    axes.set_ylabel("⟨part, total⟩ / ⟨total, total⟩")
    leave_room(axes)
    axes.legend(fontsize=8.5, ncols=3, loc="upper left")
