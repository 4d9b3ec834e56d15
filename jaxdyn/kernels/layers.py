r"""Inner products of parameter gradients, layer by layer, without holding the gradients.

A layer's gradient for row n is a sum over slots t of products of its input a_t and its output's
cotangent δ_t. So the inner product of two rows' gradients, for

    dense  y = x K + b :   Σ_{t,t'} (a_t·a'_{t'}) (δ_t·δ'_{t'})  +  (Σ_t δ_t)·(Σ_{t'} δ'_{t'})
    norm   y = x̂ ⊙ s + b : (Σ_t δ_t⊙x̂_t)·(Σ_{t'} δ'_{t'}⊙x̂'_{t'})  +  the same for b
    embedding y = E[id] :  Σ_{t,t'} [id_t = id'_{t'}] (δ_t·δ'_{t'})

For K functions a row, δ has an axis K and the result is [N, K, M, J]. Every function takes the
rows' pair (a, δ) and the columns' pair, or None for the columns when they are the rows; arrays are

    a [N, T, I] (ids: [N, T]),  δ [N, K, T, O];   columns  [M, U, I],  [M, J, U, O].

`workspace` bounds the bytes of what is formed in between.
"""

import jax
import jax.numpy as jnp


def wide_dtype(x: jax.Array):
    """The dtype in which products of x are accumulated: float32 or better."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=wide_dtype(x))


def pairwise(rows: jax.Array, columns: jax.Array | None) -> jax.Array:
    """⟨rows, columns⟩ over the last axis, [N, K, P] and [M, J, P] -> [N, K, M, J].

    Without columns the result is symmetric, and blocks above the diagonal are copied from below.
    """
    n, k, size = rows.shape
    left = rows.reshape(n * k, size)
    if columns is not None:
        m, j, _ = columns.shape
        return _product("ip,jp->ij", left, columns.reshape(m * j, size)).reshape(n, k, m, j)
    step = max(64, -(-n * k // 8))
    bands = []
    for start in range(0, n * k, step):
        stop = min(start + step, n * k)
        band = _product("ip,jp->ij", left[start:stop], left[:stop])
        bands.append(jnp.pad(band, ((0, 0), (0, n * k - stop))))
    lower = jnp.tril(jnp.concatenate(bands))
    return (lower + jnp.tril(lower, -1).T).reshape(n, k, n, k)


def dense(rows, columns, workspace: int) -> jax.Array:
    """The kernel of a dense layer's matrix, by whichever of the two forms costs fewer products."""
    (a, d), (b, e) = rows, columns or rows
    (n, k, t, o), (m, j, u, _), i = d.shape, e.shape, a.shape[2]
    slots = k * n * t + (0 if columns is None else j * m * u)
    pairs = n * k * m * j * (1 if columns is not None else 0.6)
    if n * m * t * u * (i + k * j * o) < (slots + pairs) * i * o:
        return _by_slots(rows, columns, workspace, lambda x: _product("ti,mui->tmu", x, b))
    return _by_blocks(rows, columns, workspace)


def embedding(rows, columns, workspace: int) -> jax.Array:
    """The kernel of an embedding table: slots that hold the same id meet, no others."""
    ids = (columns or rows)[0]
    return _by_slots(rows, columns, workspace, lambda x: x[:, None, None] == ids[None])


def elementwise(rows, columns) -> jax.Array:
    """The kernel of a vector that multiplies its input elementwise."""
    gradient = lambda a, d: _product("nti,nkti->nki", a, d)
    return pairwise(gradient(*rows), None if columns is None else gradient(*columns))


def bias(rows, columns) -> jax.Array:
    """The kernel of a vector that is added to a layer's output."""
    gradient = lambda _, d: jnp.sum(d, axis=2, dtype=wide_dtype(d))
    return pairwise(gradient(*rows), None if columns is None else gradient(*columns))


def cross(head, body, workspace: int) -> jax.Array:
    """Σ_{s,t'} g_s[id'_{t'}] (φ_s·δ'_{t'}): rows through the classifier, columns the embedding.

    Both are gradients of one matrix, [V, D]: Σ_s g_s φ_sᵀ and Σ_{t'} e_{id'_{t'}} δ'_{t'}ᵀ. Here
    head is φ [N, S, D] and g [N, K, S, V]; body is ids [M, U] and δ' [M, J, U, D].
    """
    ids, d = body
    (_, k, s, _), (m, j, u, _) = head[1].shape, d.shape

    def one(row):
        phi, g = row
        return _product("ksmu,smju->kmj", g[:, :, ids], _product("sd,mjud->smju", phi, d))

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
        return jnp.sum(alike * _product("kto,mjuo->ktmju", d, e), axis=(1, 4))

    return _map_rows(one, rows, (k * j + 1) * t * m * u * wide_dtype(e).itemsize, workspace)


def _by_blocks(rows, columns, workspace) -> jax.Array:
    """Inner products of Σ_t δ_t a_tᵀ, formed for a block of outputs at a time."""
    (a, d), (b, e) = rows, columns or rows
    count = d.shape[0] * d.shape[1] + (0 if columns is None else e.shape[0] * e.shape[1])
    outputs, each = d.shape[3], count * a.shape[2] * wide_dtype(d).itemsize
    fitting = max(1, min(outputs, workspace // each))
    width = max(w for w in range(1, fitting + 1) if outputs % w == 0)

    def gradient(x, y, start):
        block = jax.lax.dynamic_slice_in_dim(y, start, width, axis=3)
        matrix = _product("nkto,nti->nkoi", block, x)
        return matrix.reshape(*matrix.shape[:2], -1)

    def kernel(start):
        right = None if columns is None else gradient(b, e, start)
        return pairwise(gradient(a, d, start), right)

    if width == outputs:
        return kernel(0)
    step = lambda total, start: (total + kernel(start), None)
    shape = (*d.shape[:2], *e.shape[:2])
    nothing = jnp.zeros(shape, wide_dtype(d))
    return jax.lax.scan(step, nothing, jnp.arange(0, outputs, width))[0]
