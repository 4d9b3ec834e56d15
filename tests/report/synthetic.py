"""Run directories with numbers known in closed form, in the layout training writes."""

import json
import math
from pathlib import Path

import numpy as np

SITES, PROMPT_SITES, WIDTH = 48, 16, 12


def reward(step, seed):
    return 0.2 + 0.6 * (1 - math.exp(-step / 40)) + 0.01 * seed


def evaluation(moved, seed):
    return {
        "eval_reward": reward(moved, seed) - 0.05,
        "eval_diversity/vendi": 3.88 - 0.004 * moved,
        "eval_diversity/self_bleu": 0.12 + 0.004 * moved,
        "eval_diversity/unique": 0.97 - 0.002 * moved,
        "eval_metrics/accuracy": 0.3 + 0.002 * moved,
        **sampled(moved, seed),
    }


def solved(moved, k, seed):
    """pass@k, and the best of k, of a policy that solves a prompt with a chance between 0 and 1."""
    return 1 - (0.8 * math.exp(-moved / 40)) ** k - 0.01 * seed


def sampled(moved, seed, prefix="eval_"):
    """The measures of several samples, each with an interval of ± 0.1."""
    values = {f"{n}@{k}": solved(moved, k, seed) for n in ("pass", "best_of") for k in (1, 2, 4)}
    ends = {"": 0.0, "_ci_low": -0.1, "_ci_high": 0.1}
    return {f"{prefix}{n}{end}": v + by for n, v in values.items() for end, by in ends.items()}


def sweep(step, moved, seed):
    """The lines of a temperature sweep: completions of three prompts, hotter ones more varied."""
    return [
        {
            "step": step,
            "temperature": temperature,
            "reward": reward(moved, seed) - 0.1 * temperature,
            "reward_ci_low": reward(moved, seed) - 0.1 * temperature - 0.05,
            "reward_ci_high": reward(moved, seed) - 0.1 * temperature + 0.05,
            **sampled(moved, seed, ""),
            "diversity/unique": 0.25 + 0.6 * temperature / (1 + 0.02 * moved),
            "entropy": 1.5 * temperature,
            "samples": [
                {
                    "prompt_index": i,
                    "prompt": f"Story {i}: use the words <b>tree</b> & pond.",
                    "completion": f"at {temperature:g} number {i}.{g} <i>of</i> step {step}",
                    "reward": 0.5,
                    "finished": True,
                }
                for i in range(3)
                for g in range(2)
            ],
        }
        for temperature in (0.0, 0.5, 1.0)
    ]


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def bare_run(directory, schedule="joint", seed=0):
    """A run that has logged nothing yet."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"seed": seed, "optim": {"schedule": schedule}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_run(
    directory: Path,
    schedule: str = "joint",
    seed: int = 0,
    steps: int = 60,
    every: int = 10,
    classifier_steps: int = 15,
    wiggle: float = 0.0,
    cross: float = 0.0,
) -> Path:
    """Write a run; `wiggle` adds noise to the reward, for looking at."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    stage1 = {"classifier_first": classifier_steps, "classifier_only": steps}.get(schedule, 0)
    stage = lambda t: 1 if t < stage1 else 2
    (directory / "config.json").write_text(
        json.dumps({"seed": seed, "optim": {"schedule": schedule, "learning_rate": 1e-3}})
    )
    metrics = [{"step": -1, **evaluation(0.0, seed)}]
    for t in range(steps):
        moved = max(0.0, t - 0.8 * min(t, stage1))
        record = {
            "step": t,
            "cfrl/stage": stage(t),
            "time/wall": 0.5 * (t + 1) * (0.6 if stage(t) == 1 else 1.0) + 3 + seed,
            "reward": reward(moved, seed) + wiggle * float(rng.normal()),
            "confidence/max_prob": 0.45 + 0.004 * moved + 0.002 * seed,
            "confidence/sampled_logp": -1.0 + 0.004 * moved,
            "entropy": 2.0 - 0.015 * moved,
            "diversity/distinct_1": 0.5,
            "diversity/distinct_2": 0.8 - 0.003 * moved,
            "diversity/distinct_3": 0.9,
            "diversity/vendi": 3.9 - 0.004 * moved + 0.01 * seed,
            "diversity/self_bleu": 0.1 + 0.004 * moved + 0.01 * seed,
            "diversity/unique": 1.0 - 0.002 * moved,
            "kl": 0.001 * moved,
            "completions/mean_length": 40.0 + 0.1 * t + 3 * float(rng.normal()),
        }
        if t % 20 == 0 or t == steps - 1:
            record |= evaluation(moved, seed)
        metrics.append(record)
    write_lines(directory / "metrics.jsonl", metrics)

    (directory / "dynamics").mkdir()
    base = rng.normal(size=(SITES, WIDTH))
    base[:PROMPT_SITES] += 3.0  # prompts' features are alike, completions' are not
    dynamics = []
    for t in [-1, *range(0, steps, every)]:
        moved = max(0.0, t - 0.8 * min(t, stage1))
        features = base + 0.01 * moved * np.ones(WIDTH)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        cosines = features @ features.T
        prompts, completions = cosines[:PROMPT_SITES, :PROMPT_SITES], cosines[16:, 16:]
        arrays = {
            "is_prompt": np.arange(SITES) < PROMPT_SITES,
            "targets": rng.integers(0, 100, SITES),
            "entropy": np.full(SITES, 2.0 - 0.01 * moved),
            "confidence": np.full(SITES, 0.5 + 0.002 * moved),
            "sampled_logp": np.full(SITES, -1.0),
            "drift_cosine": np.full(SITES, 1.0 - 0.001 * moved),
            "cosines_prompt": prompts.astype(np.float32),
            "cosines_completion": completions.astype(np.float32),
        }
        record = {"step": t, "classifier/norm": 12.0 + 0.01 * moved}
        for place, block in (("prompt", prompts), ("completion", completions)):
            pairs = block[np.triu_indices(len(block), 1)]
            record |= {
                f"probe/entropy/{place}": 2.0 - 0.01 * moved,
                f"probe/confidence/{place}": 0.5 + 0.002 * moved,
                f"probe/sampled_logp/{place}": -1.0,
                f"probe/kl/{place}": 0.002 * moved,
                f"features/{place}/cosine_mean": float(pairs.mean()),
                f"features/{place}/negative_share": float((pairs < 0).mean()),
            }
        record |= {
            "features/drift/cosine_mean": 1.0 - 0.001 * moved,
            "features/drift/norm_mean": 0.02 * moved,
        }
        if t >= 0:
            size = 0.02 * math.exp(-t / 80)
            representation = size * rng.normal(size=SITES)
            gradient = (0.0 if stage(t) == 1 else 1.6) * size * rng.normal(size=SITES)
            third = cross * size * rng.normal(size=SITES)
            predicted = representation + gradient + third
            actual = predicted + 0.1 * size * rng.normal(size=SITES)
            arrays |= {
                "representation": representation,
                "gradient": gradient,
                "cross": third,
                "actual": actual,
            }
            rms = lambda v: float(np.sqrt(np.mean(v**2)))
            record |= {
                "cfrl/stage": stage(t),
                "delta/representation/rms": rms(representation),
                "delta/gradient/rms": rms(gradient),
                "delta/cross/rms": rms(third),
                "delta/predicted/rms": rms(predicted),
                "delta/actual/rms": rms(actual),
                "delta/residual/rms": rms(actual - predicted),
                "delta/correlation": float(np.corrcoef(predicted, actual)[0, 1]),
                "share/representation": float(representation @ predicted / (predicted @ predicted)),
                "share/gradient": float(gradient @ predicted / (predicted @ predicted)),
                "share/cross": float(third @ predicted / (predicted @ predicted)),
                "delta/share/representation": 0.02,
            }
            for name, nats in (("log_prob", 0.01), ("entropy", -0.005)):
                for part, share in (("representation", 0.3), ("gradient", 0.7), ("change", 1.0)):
                    record[f"ledger/{name}/share/{part}"] = share
                    for kind in ("prompt", "completion"):
                        record[f"ledger/{name}/{part}/{kind}"] = share * nats * t
        np.savez(directory / "dynamics" / f"step_{t:06d}.npz", **arrays)
        dynamics.append(record)
    write_lines(directory / "dynamics.jsonl", dynamics)

    samples = [
        {
            "step": t,
            "prompt_index": i,
            "prompt": f"Story {i}: use the words <b>tree</b> & pond.",
            "completion": f"{'At the end' if t > 0 else 'Once'} there was a tree & a pond, "
            f"number {i}.{g}, <script>alert(1)</script> and so on. " * (3 if g else 1),
            "reward": 0.25 * (i % 4) if t < 0 else 1.0,
            "finished": g == 0,
        }
        for t in (-1, steps - 1)
        for i in range(9)
        for g in range(3)
    ]
    write_lines(directory / "samples.jsonl", samples)
    last = steps - 1
    swept = [*sweep(-1, 0.0, seed), *sweep(last, last - 0.8 * min(last, stage1), seed)]
    write_lines(directory / "temperatures.jsonl", swept)
    return directory
