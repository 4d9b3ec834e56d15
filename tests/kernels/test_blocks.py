"""Tiles: each once, wherever and in whatever order, kept on disk, within the budget."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from kernel_oracles import (
    MILLION,
    all_sites,
    assert_components,
    compiled_bytes,
    scalars,
    scores,
    shaped_rows,
    tiny_model,
)

from jaxdyn import kernels
from jaxdyn.kernels import blocks, gram, memory, trace_exact
from jaxdyn.kernels.rows import Rows
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError

# -- the grid -------------------------------------------------------------------------------------


def test_tile_size_fills_the_budget():
    size = functools.partial(memory.tile_size, held=70, working=30)
    assert size(10, budget=1000) == 10
    # Two tiles of 70 and 30 more for the one that is made: 170 a row.
    assert size(10, budget=999) == 5
    assert size(10, budget=849) == 4
    # Six fit, but then the second tile would be all but empty.
    assert size(7, budget=699) == 4
    with pytest.raises(JaxdynError, match=r"too small for one site.* 170 bytes.* got 169"):
        size(10, budget=169)


@pytest.mark.parametrize("rows, columns", [((70, 30), (70, 30)), ((210, 230), (150, 165))])
@pytest.mark.parametrize("counts", [(10, 10), (3, 7), (7, 2), (1, 1), (12, 5)])
@pytest.mark.parametrize("budget", [750, 1300, 2600, 10**5])
def test_tiles_of_two_sets_prepare_as_few_as_any_that_fit(rows, columns, counts, budget):
    def peak(high, wide):
        """Of the tile that is made last, whichever it is."""
        last_column = high * rows[0] + wide * sum(columns)
        return max(last_column, high * sum(rows) + wide * columns[0])

    def prepared(high, wide):
        n, m = counts
        return n * -(-m // wide) + m * -(-n // high)

    every = itertools.product(*(range(1, count + 1) for count in counts))
    least = min(prepared(*size) for size in every if peak(*size) <= budget)
    found = memory.tile_sizes(counts, rows, columns, budget)
    assert peak(*found) <= budget and prepared(*found) == least


def test_two_sets_of_which_no_pair_fits_are_refused():
    with pytest.raises(JaxdynError, match=r"too small for one site.* 590 bytes.* got 589"):
        memory.tile_sizes((3, 3), (210, 230), (150, 165), 589)
    assert memory.tile_sizes((3, 3), (210, 230), (150, 165), 590) == (1, 1)


def test_rows_that_devices_share_count_on_one_of_them():
    """Of four devices each holds a quarter of a tile, whose size they divide."""
    size = functools.partial(memory.tile_size, held=70, working=30, shards=4)
    assert size(10, budget=300) == 12  # three rows a device, two of them again
    assert size(10, budget=299) == 4
    # Three and eight rows a device, of which all three and five fit.
    assert memory.tile_sizes((10, 30), (70, 30), (70, 30), 710, shards=4) == (12, 16)
    with pytest.raises(JaxdynError, match=r"too small for one site.* 170 bytes.* got 169"):
        size(10, budget=169)
    at_once = functools.partial(memory.rows_at_once, "row", each=100, beside=50, shards=4)
    assert [at_once(n, budget=250) for n in (1, 8, 9, 30)] == [4, 8, 8, 8]
    assert at_once(30, budget=450) == 16


def prepared(tiles, square):
    """How many sets are made when no more than a pair's are held."""
    held, count = set(), 0
    for tile in tiles:
        pair = {("row", tile.row), ("row" if square else "column", tile.column)}
        count += len(pair - held)
        held = pair
    return count


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_strips_hold_every_tile_once_and_prepare_few_sets(devices):
    for high, wide in itertools.product(range(1, 8), repeat=2):
        lists = blocks.strips(high, wide, False, devices)
        grid = itertools.product(range(high), range(wide))
        assert sorted(itertools.chain(*lists)) == list(grid)
        longer, shorter = max(high, wide), min(high, wide)
        for tiles in lists:
            # k strips along the shorter side: of each one set and all across but the last held.
            assert len(tiles) % shorter == 0
            assert prepared(tiles, False) == len(tiles) + bool(tiles)
            assert len(tiles) // shorter in (longer // devices, -(-longer // devices))

    for n in range(1, 10):
        lists = blocks.strips(n, n, True, devices)
        grid = itertools.combinations_with_replacement(range(n), 2)
        assert sorted(itertools.chain(*lists)) == list(grid)
        assert max(map(len, lists)) - min(map(len, lists)) <= n
        for tiles in lists:
            # Of a strip all but its first, which the strip before has left, save the first ever.
            rows = {tile.row for tile in tiles}
            assert prepared(tiles, True) == sum(n - 1 - row for row in rows) + bool(rows)


# -- a kernel of toys: inner products of what the tokens point at ---------------------------------


class Toys:
    """x_n = table[token n], [K=2, 3]; kernels ⟨x, x'⟩ and, by two layers, ⟨x, (1 + l) x'⟩.

    They lie where the table does; the host computes them, without a program for every shape.
    """

    def __init__(self):
        table = np.random.default_rng(0).standard_normal((40, 2, 3))
        self.table = jnp.asarray(table, jnp.float32)
        self.prepared, self.contracted, self.done = 0, 0, []

    def rows(self, start, count):
        column = np.arange(start, start + count, dtype=np.int32)[:, None]
        return Rows(column, column >= 0, column, column, np.ones_like(column, np.float32))

    def prepare(self, table, rows):
        self.prepared += 1
        return jax.device_put(np.asarray(table)[np.asarray(rows.tokens)[:, 0]], table.sharding)

    def contract(self, table, left, right):
        self.contracted += 1
        right = left if right is None else right
        x = np.einsum("nki,mji->nkmj", np.asarray(left), np.asarray(right))
        return {"flat": x, "layers": np.stack([x, 2 * x])}

    def progress(self, done, total):
        self.done.append((done, total))

    def assemble(self, n, m, size, *, kind="toys", start=0, **execution):
        """All of it, checked against the table's own products; without m the columns are rows."""
        rows, columns = self.rows(start, n), None if m is None else self.rows(3, m)
        execution = {"progress": self.progress, **execution}
        tiles = blocks.Tiling(rows, columns, size, size, each=0, workspace=0)
        found = blocks.assemble(kind, tiles, self.table, self.prepare, self.contract, execution)
        x = np.asarray(self.table)[start : start + n]
        y = x if m is None else np.asarray(self.table)[3 : 3 + m]
        expected = np.einsum("nki,mji->nkmj", x, y)
        np.testing.assert_allclose(found["flat"], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found["layers"][0], found["flat"])
        np.testing.assert_array_equal(found["layers"][1], 2 * found["flat"])
        return found


@pytest.mark.parametrize("devices", [None, 1, 3, 8])
@pytest.mark.parametrize("n, m", [(8, None), (8, 5), (5, 8), (2, 2), (1, None), (1, 11)])
def test_every_tile_is_computed_once(n, m, devices):
    on = {} if devices is None else {"devices": jax.devices()[:devices]}
    for size in (3, 20):
        toys = Toys()
        toys.assemble(n, m, size, **on)
        total = toys.contracted
        assert toys.done == [(done, total) for done in range(1, total + 1)]
        # Every device has a strip of its own where there are rows enough.
        side = min(size, -(-max(n, m or n) // (devices or 1)))
        high, wide = -(-n // side), -(-(m or n) // side)
        assert total == (high * (high + 1) // 2 if m is None else high * wide)


def test_devices_share_the_work():
    toys, used = Toys(), []
    contract = toys.contract

    def noted(table, left, right):
        used.extend(left.devices())
        return contract(table, left, right)

    toys.contract = noted
    toys.assemble(16, 4, 100, devices=jax.devices()[:8])
    assert collections.Counter(used) == dict.fromkeys(jax.devices()[:8], 2)


class Killed(Exception):
    pass


def killed_after(many):
    def progress(done, total):
        if done == many:
            raise Killed

    return progress


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("m", [None, 7])
def test_what_is_finished_is_not_computed_again(m, devices, tmp_path):
    on = {"blocks": tmp_path, "devices": jax.devices()[:devices]}
    whole = Toys()
    expected = whole.assemble(9, m, 2, devices=on["devices"])
    killed = Toys()
    with pytest.raises(Killed):
        killed.assemble(9, m, 2, **on, progress=killed_after(5))
    resumed = Toys()
    found = resumed.assemble(9, m, 2, **on)
    assert resumed.contracted == whole.contracted - 5
    assert resumed.done == [(done, whole.contracted) for done in range(5, whole.contracted + 1)]
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)
    again = Toys()
    again.assemble(9, m, 2, **on)
    assert (again.prepared, again.contracted) == (0, 0)
    assert again.done == [(whole.contracted, whole.contracted)]


def test_tiles_of_another_kernel_are_refused(tmp_path):
    Toys().assemble(9, 7, 2, blocks=tmp_path)
    others = [
        lambda toys: toys.assemble(9, 7, 2, blocks=tmp_path, kind="other toys"),
        lambda toys: toys.assemble(9, 7, 2, blocks=tmp_path, start=1),
        lambda toys: toys.assemble(9, 6, 2, blocks=tmp_path),
        lambda toys: toys.assemble(9, None, 2, blocks=tmp_path),
        lambda toys: toys.assemble(9, 7, 3, blocks=tmp_path),
    ]
    for other in others:
        toys = Toys()
        with pytest.raises(JaxdynError, match="finished tiles of another kernel") as refused:
            other(toys)
        assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
        assert toys.prepared == 0


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JaxdynError, match=r"blocks must be a directory, and .*file is a file"):
        Toys().assemble(9, 7, 2, blocks=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_digest_tells_parameters_apart():
    """One entry changed, two exchanged, a matrix transposed, the same numbers in another shape."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 6)), jnp.float32)
    swapped = x.at[1, 2].set(x[3, 4]).at[3, 4].set(x[1, 2])
    others = [x.at[2, 5].add(1e-3), swapped, x.T, x[::-1], x.reshape(4, 9), x.astype(jnp.bfloat16)]
    digests = [blocks.digest({"weight": y}) for y in (x, *others)]
    assert len(set(digests)) == len(digests)
    assert blocks.digest({"weight": x + 0}) == digests[0]
    assert blocks.digest({"other": x}) != digests[0]


@pytest.mark.parametrize("left", [0, 100, -10])
def test_a_truncated_tile_is_computed_again(left, tmp_path):
    Toys().assemble(9, None, 3, blocks=tmp_path)
    tiles = sorted(tmp_path.glob("*.npz"))
    assert len(tiles) == 6
    tiles[2].write_bytes(tiles[2].read_bytes()[:left])
    toys = Toys()
    toys.assemble(9, None, 3, blocks=tmp_path)
    assert toys.contracted == 1
    toys = Toys()
    toys.assemble(9, None, 3, blocks=tmp_path)
    assert toys.contracted == 0


# -- the real kernels -----------------------------------------------------------------------------


@pytest.fixture
def tiles_of_three(monkeypatch):
    monkeypatch.setattr(blocks, "tile_size", lambda *_: 3)
    monkeypatch.setattr(blocks, "tile_sizes", lambda *_: (3, 3))


@pytest.mark.slow
def test_kernels_on_devices_and_after_a_kill(x64, tiles_of_three, tmp_path):
    """Eight sites in tiles of three: six tiles, the last of each side not full."""
    model, params = tiny_model("gpt2-tied")
    kernel = functools.partial(kernels.log_prob_kernel, model, params, all_sites(), method="gram")
    expected = scalars("gpt2-tied", scores("gpt2-tied"))
    alone = kernel()
    assert_components(alone, expected, 1e-12)
    assert_components(kernel(devices=jax.devices()[:2]), expected, 1e-12)

    with pytest.raises(Killed):
        kernel(blocks=tmp_path, progress=killed_after(4))
    done = []
    resumed = kernel(blocks=tmp_path, progress=lambda *at: done.append(at))
    assert done == [(4, 6), (5, 6), (6, 6)]
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)
    nudged = jax.tree.map(lambda x: 1.001 * x, params)
    with pytest.raises(JaxdynError, match="another kernel"):
        kernels.log_prob_kernel(model, nudged, all_sites(), method="gram", blocks=tmp_path)
    with pytest.raises(JaxdynError, match="another kernel"):
        kernel(preconditioner=jax.tree.map(jnp.ones_like, params), blocks=tmp_path)


@pytest.mark.slow
def test_a_small_budget_makes_tiles_that_change_nothing(x64):
    model, params = tiny_model("gpt_neox-untied")
    held, working = gram.row_bytes(model, 6, 1, 1)
    done = []
    result = kernels.log_prob_kernel(
        model, params, all_sites(), method="gram",
        # Half of a small budget is for blocks of products; the rest for two rows and columns.
        memory_budget=2 * 2 * (2 * held + working), progress=lambda *at: done.append(at),
    )  # fmt: skip
    assert done[-1] == (10, 10)
    assert_components(result, scalars("gpt_neox-untied", scores("gpt_neox-untied")), 1e-12)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied"])
def test_making_factors_needs_what_is_said(name):
    """By XLA's account: not the zeros that open the outputs, nor what activations would keep."""
    sizes = {"vocab_size": 64, "width": 128, "num_heads": 8, "head_dim": 16, "mlp_width": 512}
    config = dataclasses.replace(
        oracles.CONFIGS[name], **sizes, num_kv_heads=8, num_layers=8, max_positions=64
    )
    model = LanguageModel(config)
    view = jax.eval_shape(lambda key: model.view(model.init(key)), jax.random.key(0))
    rows = shaped_rows(16, 64, 1, 1)
    held, working = (16 * x for x in gram.row_bytes(model, 64, 1, 1))
    memory_of = gram.factorize.lower(model, view, None, rows).compile().memory_analysis()
    assert abs(memory_of.output_size_in_bytes - held) < 0.01 * held
    needed = memory_of.temp_size_in_bytes
    assert 0.6 * working < needed <= working, needed / working


# T, S, K and the budget: a short context, a long one where attention counts most, several functions
# of completions of many slots.
@pytest.mark.parametrize(
    "name, slots, counted, outputs, budget",
    [
        ("gpt_neox-untied", 64, 1, 1, 200 * MILLION),
        ("llama-tied", 384, 1, 1, 600 * MILLION),
        pytest.param("gpt2-tied", 64, 8, 4, 200 * MILLION, marks=pytest.mark.slow),
    ],
)
def test_tiles_stay_within_the_budget_and_fill_it(name, slots, counted, outputs, budget):
    sizes = {"vocab_size": 2048, "width": 128, "num_heads": 8, "head_dim": 16, "mlp_width": 512}
    config = dataclasses.replace(
        oracles.CONFIGS[name], **sizes, num_kv_heads=8, max_positions=slots
    )
    model = LanguageModel(config)
    view = jax.eval_shape(lambda key: model.view(model.init(key)), jax.random.key(0))
    workspace, spare = memory.workspace_of(budget, "cpu")
    need = gram.row_bytes(model, slots, counted, outputs)
    size = memory.tile_size(1000, *need, budget - spare)
    rows = shaped_rows(size, slots, counted, outputs)
    factors = jax.eval_shape(functools.partial(gram.factorize, model), view, None, rows)
    one = memory.nbytes(factors)
    options = {"tied": config.tied, "biased": False, "workspace": workspace}
    # The second set of a pair is made while the first is held; then both are.
    peaks = [
        one + compiled_bytes(gram.factorize, model, view, None, rows),
        2 * one + compiled_bytes(gram.contract, view, None, factors, factors, **options),
    ]
    assert budget / 4 <= max(peaks) <= budget, [peak / budget for peak in peaks]

    if (counted, outputs) == (1, 1):
        need = sum(memory.opened_bytes(model, slots))
        size = memory.tile_size(1000, need, 0, budget - spare)
        rows = shaped_rows(size, slots, 1, 1)
        factor = jax.ShapeDtypeStruct((128, 128), jnp.float32)
        operands = (model, (view, None, factor), rows, rows)
        peak = compiled_bytes(
            trace_exact.exact_tile, *operands, at_once=1, first=True, workspace=workspace
        )
        assert budget / 4 <= peak <= budget, peak / budget
