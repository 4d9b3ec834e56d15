r"""Inner products of parameter gradients, layer by layer, without holding the gradients.

A layer's gradient for row n is a sum over slots t of products of its input a_t and its output's
cotangent δ_t. So the inner product of two rows' gradients, for

    dense  y = x K + b :   Σ_{t,t'} (a_t·a'_{t'}) (δ_t·δ'_{t'})  +  (Σ_t δ_t)·(Σ_{t'} δ'_{t'})
    norm   y = x̂ ⊙ s + b : (Σ_t δ_t⊙x̂_t)·(Σ_{t'} δ'_{t'}⊙x̂'_{t'})  +  as above for b
    embedding y = E[id] :  Σ_{t,t'} [id_t = id'_{t'}] (δ_t·δ'_{t'})

For K functions a row, δ has an axis K and the result is [N, K, M, J]. Every function takes the
rows' pair (a, δ) and the columns' pair, or None for the columns when they are the rows; arrays are

    a [N, T, I] (ids: [N, T]),  δ [N, K, T, O];   columns  [M, U, I],  [M, J, U, O].

`workspace` is about how many bytes are formed in between.
"""

import jax
import jax.numpy as jnp

SPARE = 8
"""Rows of a block below which products are slow: up to so many workspaces are taken for them."""


def wide_dtype(x: jax.Array):
    """The dtype in which products of x are accumulated: float32 or better."""
    return jnp.promote_types(x.dtype, jnp.float32)


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays, accumulated in float32 or better."""
    # "highest": accelerators would otherwise round float32 inputs to fewer bits.
    wide = jnp.promote_types(wide_dtype(x), y.dtype)
    return jnp.einsum(spec, x, y, precision="highest", preferred_element_type=wide)


def pairwise(rows: jax.Array, columns: jax.Array | None) -> jax.Array:
    """⟨rows, columns⟩ over the last axis, [N, K, P] and [M, J, P] -> [N, K, M, J].

    Without columns the result is symmetric, and blocks above the diagonal are copied from below.
    """
    n, k, size = rows.shape
    left = rows.reshape(n * k, size)
    if columns is not None:
        m, j, _ = columns.shape
        return product("ip,jp->ij", left, columns.reshape(m * j, size)).reshape(n, k, m, j)
    step = min(max(64, -(-n * k // 2)), 256)  # products of fewer rows are slow
    bands = []
    for start in range(0, n * k, step):
        stop = min(start + step, n * k)
        band = product("ip,jp->ij", left[start:stop], left[:stop])
        bands.append(jnp.pad(band, ((0, 0), (0, n * k - stop))))
    lower = jnp.tril(jnp.concatenate(bands))
    return (lower + jnp.tril(lower, -1).T).reshape(n, k, n, k)


def dense(rows, columns, workspace: int, root: jax.Array | None = None) -> jax.Array:
    """The kernel of a dense layer's matrix, by whichever of the two forms costs fewer products.

    `root` [I, O] multiplies every gradient elementwise, which only formed gradients allow; where
    several functions' outputs lie side by side, every one's.
    """
    (a, d), (b, e) = rows, columns or rows
    (n, k, t, o), (m, j, u, _), i = d.shape, e.shape, a.shape[2]
    slots = k * n * t + (0 if columns is None else j * m * u)
    pairs = n * k * m * j * (1 if columns is not None else 0.6)
    if root is None and n * m * t * u * (i + k * j * o) < (slots + pairs) * i * o:
        return _by_slots(rows, columns, workspace, lambda x: product("ti,mui->tmu", x, b))
    return _by_blocks(rows, columns, workspace, root)


def embedding(rows, columns, size: int, workspace: int) -> jax.Array:
    """The kernel of a table of `size` rows: slots that hold the same id meet, no others."""
    (_, d), (ids, e) = rows, columns or rows
    if d.shape[2] * e.shape[2] > size:
        return _by_ids(rows, columns, size, workspace)
    return _by_slots(rows, columns, workspace, lambda x: x[:, None, None] == ids[None])


def scale_gradient(a: jax.Array, d: jax.Array) -> jax.Array:
    """Σ_t a_t ⊙ δ_t, [..., N, K, O], of a vector that multiplies its input elementwise."""
    wide = wide_dtype(d)  # summed as it is multiplied: a product of matrices would transpose both
    return jnp.sum(a.astype(wide)[..., None, :, :] * d.astype(wide), axis=-2)


def bias_gradient(d: jax.Array) -> jax.Array:
    """Σ_t δ_t, [..., N, K, O], of a vector that is added to a layer's output."""
    return jnp.sum(d, axis=-2, dtype=wide_dtype(d))


def cross(head, body, workspace: int) -> jax.Array:
    """Σ_{s,t'} g_s[id'_{t'}] (φ_s·δ'_{t'}): rows through the classifier, columns the embedding.

    Both are gradients of one matrix, [V, D]: Σ_s g_s φ_sᵀ and Σ_{t'} e_{id'_{t'}} δ'_{t'}ᵀ. Here
    head is φ [N, S, D] and g [N, K, S, V]; body is ids [M, U] and δ' [M, J, U, D].
    """
    ids, d = body
    (_, k, s, _), (m, j, u, _) = head[1].shape, d.shape

    def one(row):
        phi, g = row
        return product("ksmu,smju->kmj", g[:, :, ids], product("sd,mjud->smju", phi, d))

    return _map_rows(one, head, (k + j) * s * m * u * wide_dtype(d).itemsize, workspace)


def _map_rows(function, rows, bytes_each: int, workspace: int) -> jax.Array:
    """The function of every row, as many at a time as the workspace holds."""
    count = len(rows[0])
    at_once = max(1, min(count, workspace // bytes_each))
    if at_once == count:
        return jax.vmap(function)(rows)
    return jax.lax.map(function, rows, batch_size=at_once)


def _by_slots(rows, columns, workspace, likeness) -> jax.Array:
    """Σ_{t,t'} likeness(t, t') (δ_t·δ'_{t'})."""
    e = (columns or rows)[1]
    (_, k, t, _), (m, j, u, _) = rows[1].shape, e.shape

    def one(row):
        a, d = row
        alike = likeness(a)[None, :, :, None, :]
        return jnp.sum(alike * product("kto,mjuo->ktmju", d, e), axis=(1, 4))

    return _map_rows(one, rows, (k * j + 1) * t * m * u * wide_dtype(e).itemsize, workspace)


def _by_blocks(rows, columns, workspace, root=None) -> jax.Array:
    """Inner products of Σ_t δ_t a_tᵀ, formed for a block of the longer side at a time."""
    inputs, outputs = rows[0].shape[2], rows[1].shape[3]
    turned = inputs > outputs
    if root is not None:
        root = jnp.tile(root, (1, outputs // root.shape[1]))
        root = root if turned else root.T

    def gradient(x, y, start, width):
        block = lambda z, axis: jax.lax.dynamic_slice_in_dim(z, start, width, axis)
        n, k, t, o = y.shape
        # One axis of rows in the product: with K beside it XLA on a CPU transposes an operand.
        # So the block, the smaller of the two, is repeated or its functions laid side by side.
        if turned:
            x = jnp.repeat(block(x, 2), k, axis=0)
            matrix = product("nti,nto->nio", x, y.reshape(n * k, t, o))
        else:
            y = jnp.moveaxis(block(y, 3), 1, 2).reshape(n, t, k * width)
            matrix = product("nto,nti->noi", y, x)
        matrix = matrix.reshape(n, k, width, -1)
        if root is not None:
            matrix *= block(root, 0)[None, None]
        return matrix.astype(x.dtype)

    longer, each = max(inputs, outputs), min(inputs, outputs)
    return _over_blocks(longer, each, rows, columns, gradient, workspace)


def _by_ids(rows, columns, size, workspace) -> jax.Array:
    """Inner products of Σ_t e_{id_t} δ_tᵀ, formed for a block of the table's rows at a time."""

    def gradient(ids, d, start, width):
        inside = (ids >= start) & (ids < start + width)
        row = jnp.where(inside, ids - start, width)  # past the block: dropped
        empty = jnp.zeros((*d.shape[:2], width, d.shape[3]), wide_dtype(d))
        place = jax.vmap(lambda x, i, y: x.at[:, i].add(y, mode="drop"))
        return place(empty, row, d.astype(empty.dtype)).astype(d.dtype)

    return _over_blocks(size, rows[1].shape[3], rows, columns, gradient, workspace)


def _over_blocks(length, each, rows, columns, gradient, workspace) -> jax.Array:
    """⟨G, G'⟩ of matrices [length, each], of which `gradient` forms some rows at a time."""
    d, e = rows[1], (columns or rows)[1]
    count = d.shape[0] * d.shape[1] + (0 if columns is None else e.shape[0] * e.shape[1])
    in_one = workspace / (count * each * wide_dtype(d).itemsize)
    most = min(length, max(1, int(in_one), min(SPARE, int(SPARE * in_one))))
    # Blocks without a rest, where one is not much smaller.
    width = next((w for w in range(most, most // 2, -1) if length % w == 0), most)
    flat = lambda x: x.reshape(*x.shape[:2], -1)

    def kernel(start, width):
        left = flat(gradient(*rows, start, width))
        return pairwise(left, None if columns is None else flat(gradient(*columns, start, width)))

    blocks, rest = divmod(length, width)
    step = lambda total, start: (total + kernel(start, width), None)
    nothing = jnp.zeros((*d.shape[:2], *e.shape[:2]), wide_dtype(d))
    total = jax.lax.scan(step, nothing, width * jnp.arange(blocks))[0]
    return total + kernel(blocks * width, rest) if rest else total
