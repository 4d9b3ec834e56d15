"""Examples that share rows: none is lost or torn, and the rows are few and of few counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.data.packing import first_fit, pack, row_count


def test_the_longest_come_first_and_fill_what_is_open():
    assert first_fit([3, 5, 2, 8, 1, 6], 8) == [[3], [5, 2], [1, 0], [4]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 33, 40).tolist()
        rows = first_fit(lengths, 32)
        assert sorted(i for row in rows for i in row) == list(range(40))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 32
        assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / 32) + 1


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_row_counts_are_few_and_waste_little(parts):
    counts = [row_count(n, 64, parts) for n in range(1, 65)]
    assert all(n <= m <= 64 and m % parts == 0 for n, m in enumerate(counts, 1))
    assert all(m <= max(1.25 * n, n + parts) for n, m in enumerate(counts, 1))
    assert len(set(counts)) <= 4 * 6


def test_what_is_packed_is_what_there_was():
    rng = np.random.default_rng(1)
    lengths = np.array([7, 2, 5, 8, 1, 3, 4, 2])
    mask = np.arange(8) < lengths[:, None]
    tokens = np.where(mask, rng.integers(1, 50, mask.shape), 99)
    predicted = mask & (np.arange(8) >= lengths[:, None] - 1)
    packed, numbers, told = map(np.asarray, pack(*map(jnp.asarray, (tokens, mask, predicted))))
    assert packed.shape == (4, 8) == numbers.shape and numbers.astype(bool).sum() == 32
    assert (packed[numbers == 0] == 99).all() and not told[numbers == 0].any()
    found = [
        (packed[row, numbers[row] == n].tolist(), told[row, numbers[row] == n].tolist())
        for row in range(4)
        for n in range(1, numbers[row].max() + 1)
    ]
    given = [(tokens[i, m].tolist(), predicted[i, m].tolist()) for i, m in enumerate(mask)]
    assert sorted(found) == sorted(given)
    assert len(pack(*map(jnp.asarray, (tokens, mask, predicted)), parts=8)[0]) == 8
