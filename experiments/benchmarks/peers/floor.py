"""The floor: GRPO's arithmetic on a bare Llama in plain jitted JAX, and nothing around it.

No tokenizer, text, reward, metrics, padding, stop tokens or clipping of gradients: what is left is
what XLA makes of the same shapes. A step is three programs: decode P × G sequences with a KV cache,
the reference's log-probs, and one AdamW update of the clipped objective with k3 at β 0.04.
Layers are unrolled, and each prompt is read once in a full pass and shared by its generations.
The environment is jaxdyn's own.
"""

import jax
import jax.numpy as jnp
import optax
from protocol import WORDS, Runner

runner = Runner()
shape = runner.shape
HEAD = shape.width // shape.heads
OPTIMIZER = optax.adamw(1e-6)


def random_params(key):
    keys = iter(jax.random.split(key, 2 + 7 * shape.layers))
    normal = lambda *size: 0.02 * jax.random.normal(next(keys), size)
    d, m = shape.width, shape.mlp
    sizes = {n: (d, d) for n in "qkvo"} | {"gate": (d, m), "up": (d, m), "down": (m, d)}
    return {
        "embed": normal(shape.vocab, d),
        "head": normal(d, shape.vocab),
        "norm": jnp.ones(d),
        "layers": [
            {"attend": jnp.ones(d), "feed": jnp.ones(d)}
            | {name: normal(*size) for name, size in sizes.items()}
            for _ in range(shape.layers)
        ],
    }


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def rotate(x, positions):
    """Rotary positions on [B, H, T, HEAD]."""
    angles = positions[:, None] * 1e4 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def body(params, tokens, positions, mask, remember):
    """Features of `tokens` [B, T]; `remember` turns a layer's keys and values into those seen."""
    params = jax.tree.map(lambda x: x.astype(shape.dtype), params)
    rows, slots = tokens.shape
    h = params["embed"][tokens]
    for index, layer in enumerate(params["layers"]):
        x = rms(h, layer["attend"])
        split = lambda name, x=x, layer=layer: (
            (x @ layer[name]).reshape(rows, slots, shape.heads, HEAD).swapaxes(1, 2)
        )
        q, k = rotate(split("q"), positions), rotate(split("k"), positions)
        k, v = remember(index, k, split("v"))
        scores = (q @ k.swapaxes(2, 3)).astype(jnp.float32) / HEAD**0.5
        seen = jax.nn.softmax(jnp.where(mask, scores, -1e9)).astype(v.dtype) @ v
        h += seen.swapaxes(1, 2).reshape(rows, slots, -1) @ layer["o"]
        x = rms(h, layer["feed"])
        h += (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return rms(h, params["norm"])


def logits_of(params, features):
    return (features @ params["head"].astype(shape.dtype)).astype(jnp.float32)


def full_pass(params, tokens, remember=lambda index, k, v: (k, v)):
    slots = jnp.arange(tokens.shape[1])
    return body(params, tokens, slots, slots[:, None] >= slots, remember)


def log_probs(params, tokens):
    """Of the completions, [B, C]."""
    features = full_pass(params, tokens)[:, shape.prompt_length - 1 : -1]
    logits = logits_of(params, features)
    chosen = tokens[:, shape.prompt_length :, None]
    return jnp.take_along_axis(logits, chosen, -1)[..., 0] - jax.nn.logsumexp(logits, -1)


def objective(params, tokens, advantages, reference):
    new = log_probs(params, tokens)
    ratio, ahead = jnp.exp(new - jax.lax.stop_gradient(new)), reference - new
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
    return jnp.mean(0.04 * (jnp.exp(ahead) - ahead - 1) - gain)


def update(params, moments, tokens, advantages, reference):
    loss, gradient = jax.value_and_grad(objective)(params, tokens, advantages, reference)
    step, moments = OPTIMIZER.update(gradient, moments, params)
    return optax.apply_updates(params, step), moments, loss


def generate(params, prompts, key):
    """Prompts [P, S] and their sampled completions, [P G, S + C]."""
    caches = []

    def begin(index, k, v):
        extend = lambda x: jnp.pad(
            jnp.repeat(x, shape.generations, 0),
            ((0, 0), (0, 0), (0, shape.completion_length), (0, 0)),
        )
        caches.append((extend(k), extend(v)))
        return k, v

    last = full_pass(params, prompts, begin)[:, -1]
    first = jnp.repeat(logits_of(params, last), shape.generations, 0)

    def draw(carry, slot):
        logits, caches = carry
        token = jax.random.categorical(jax.random.fold_in(key, slot), logits)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
        caches = list(caches)

        def write(index, k, v):
            put = lambda cache, x: jax.lax.dynamic_update_slice(cache, x, (0, 0, slot, 0))
            caches[index] = put(caches[index][0], k), put(caches[index][1], v)
            return caches[index]

        mask = jnp.arange(shape.slots) <= slot
        features = body(params, token[:, None], slot[None], mask, write)[:, 0]
        return (logits_of(params, features), caches), (token, logp)

    slots = jnp.arange(shape.prompt_length, shape.slots)
    _, (tokens, logps) = jax.lax.scan(draw, (first, caches), slots)
    prompts = jnp.repeat(prompts, shape.generations, 0)
    return jnp.concatenate([prompts, tokens.T], 1), logps.T


def main():
    key = jax.random.key(0)
    params = jax.jit(random_params)(key)
    moments = jax.jit(OPTIMIZER.init)(params)
    reference_params = jax.tree.map(jnp.copy, params)
    prompts = jax.random.randint(key, (shape.prompts, shape.prompt_length), WORDS, shape.vocab)
    advantages = jax.random.normal(key, (shape.rows, 1))
    runner.ready(
        versions={"jax": jax.__version__},
        device=jax.devices()[0].device_kind,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
    )
    wait = jax.block_until_ready
    clock = lambda part, function: runner.timed(part, function, wait)
    sample = clock("generate", jax.jit(generate))
    score = clock("reference", jax.jit(log_probs))
    learn = clock("update", jax.jit(update, donate_argnums=(0, 1)))
    for turn in runner.turns():
        tokens, _ = sample(params, prompts, jax.random.key(turn))
        if runner.task == "generate":
            continue
        reference = score(reference_params, tokens)
        params, moments, _ = learn(params, moments, tokens, advantages, reference)


if __name__ == "__main__":
    main()
