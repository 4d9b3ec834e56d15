"""Ledgers of random numbers that add up as a real one's do, and texts that a page must survive."""

import numpy as np

from jaxdyn.report.ledger_file import SavedLedger
from jaxdyn.report.microscope import Influence

PARTS = ("representation", "gradient")
QUANTITIES = ("log_prob", "entropy", "confidence", "margin", "kl")

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "\"'&amp;<b>`${1}\\",
    "שלום",
    "\u202eevil",
    "\ud800",
    "👩‍🔬",
    "\n\n",
    "   ",
    "\t",
    "<0x0A>",
    "\u2028\u2029",
    "\x00x\x1b[31m",
    "",
    "<!--",
    "]]>",
)
KINDS = ("attention_query", "attention_out", "mlp_up", "norm")
OUTSIDE = ("embedding", "final_norm", "classifier")


def saved_ledger(
    texts=3, length=6, segments=3, layers=4, wide=7, words=HOSTILE, seed=0, by_token=QUANTITIES[:2]
):
    """Parts that miss the change by some 1e-5; layers and kinds that add up to the gradient."""
    rng = np.random.default_rng(seed)
    n = texts * length
    real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    words = np.array(words)
    values, parts, of_token, of_layer = {}, {}, {}, {}
    for quantity in QUANTITIES:
        values[quantity] = np.cumsum(0.4 * real(segments + 1, n), axis=0)
        if quantity == "log_prob":
            values[quantity] = -np.abs(values[quantity])
        change = np.diff(values[quantity].astype(np.float64), axis=0)
        change += 1e-5 * rng.standard_normal((segments, n))
        split = rng.dirichlet(np.ones(layers + 2), size=(segments, n)).transpose(0, 2, 1)
        gradient = change * rng.uniform(0.5, 1.1, (segments, n))
        parts[quantity] = dict(zip(PARTS, ((change - gradient), gradient), strict=True))
        of_token[quantity] = split * gradient[:, None]
        sums = of_token[quantity].reshape(segments, layers + 2, texts, length).sum(axis=-1)
        sums = sums.transpose(0, 2, 1)
        of_layer[quantity] = {kind: (k + 1) / 10 * sums[..., 1:-1] for k, kind in enumerate(KINDS)}
        heads = (change - gradient).reshape(segments, texts, length).sum(axis=-1)[..., None]
        rest = (sums[..., :1], sums[..., -1:], heads)
        of_layer[quantity] |= dict(zip(OUTSIDE, rest, strict=True))
    alternatives = np.argsort(rng.random((n, 4 * wide)), axis=1)[:, :wide].astype(np.int32)
    of_alternatives = -np.abs(3 * real(segments + 1, n, wide))
    halves = np.diff(of_alternatives, axis=0) / 2
    single = lambda tree: {
        k: single(v) if isinstance(v, dict) else v.astype(np.float32) for k, v in tree.items()
    }
    pick = lambda *shape: words[rng.integers(len(words), size=shape)]
    return SavedLedger(
        tokens=np.zeros((texts, 2 * length), np.int32),
        mask=np.ones((texts, 2 * length), bool),
        rows=np.repeat(np.arange(texts, dtype=np.int32), length),
        positions=np.tile(np.arange(length, 2 * length, dtype=np.int32) - 1, texts),
        targets=np.arange(n, dtype=np.int32) % (4 * wide),
        is_prompt=np.arange(n) % length == 0,
        prompts=np.array([f"prompt {t // 2}: {words[t % len(words)]}" for t in range(texts)]),
        pieces=words[np.arange(n) % len(words)],
        names=np.array([f"step {10 * k} {words[0]}" for k in range(segments + 1)]),
        nodes=rng.integers(2, 9, (segments, texts)),
        alternatives=alternatives,
        alternative_pieces=pick(n, wide),
        alternative_values=of_alternatives,
        alternative_parts={part: halves for part in PARTS},
        values=values,
        parts=single(parts),
        by_layer=single(of_layer),
        by_token=single({q: of_token[q] for q in by_token}),
        about={"model": {"name": words[0], "layers": layers}, "tolerance": float("nan")},
    )


def influence_on(saved, count=12, seed=1):
    """Of every other site, in falling order of sites, by as many completions."""
    rng = np.random.default_rng(seed)
    rows = np.arange(0, len(saved.rows), 2)[::-1]
    return Influence(
        rows=rows,
        contributions={
            quantity: {part: rng.standard_normal((len(rows), count)) for part in PARTS}
            for quantity in QUANTITIES[:2]
        },
        texts=np.array([f"completion {u} {HOSTILE[u % len(HOSTILE)]}" for u in range(count)]),
        prompts=np.array([f"asked {u // 4} {HOSTILE[0]} " for u in range(count)]),
        advantages=rng.standard_normal(count).astype(np.float32),
        about=f"Step 40 of a run {HOSTILE[0]}.",
    )
