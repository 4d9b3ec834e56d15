"""A whole CF-RL run in a process of its own: when its first step ends, and what compiles when."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import harness
from peers.protocol import END, Shape, random_prompts


def suite(shape: Shape, chosen: argparse.Namespace) -> dict:
    """The same run with JAX's persistent compilation cache empty, and full."""
    print(f"\ncompile: {json.dumps(dataclasses.asdict(shape))}")
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(shape, chosen.architecture, Path(directory))
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{directory}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("cold", "warm"):
            began = time.time()
            run = found[name] = harness.in_a_process(
                f"compile, cache {name}", [__file__, directory, name], environ=os.environ | cache
            )
            pairs = zip(run["compiled"], run["first_of_kind"], strict=True)
            run["compiled_after_the_first_of_each_kind"] = sum(n for n, first in pairs if not first)
            run["first_step_seconds"] = run["ended"][0] - began
            print(
                f"cache {name}: the first step ended {run['first_step_seconds']:.1f} s after the "
                f"process began\n  programs compiled by step {run['compiled']}: "
                f"{run['compiled_after_the_first_of_each_kind']} after the first of each kind",
                flush=True,
            )
    return {"shape": dataclasses.asdict(shape), "runs": found}


def write_model(shape: Shape, architecture: str, directory: Path) -> None:
    """A model on disk, and prompts for it."""
    import engine

    from jaxdyn.models import save_pretrained

    task = engine.task_of(shape, architecture)
    task.tokenizer.save(directory / "model")
    save_pretrained(directory / "model", task.model, task.params, bos_token_id=1, stop_ids=(END,))
    lines = [json.dumps({"prompt": prompt}) for prompt in random_prompts(shape, 512)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "shape.json").write_text(json.dumps(dataclasses.asdict(shape)))


def run(directory: Path, name: str) -> dict:
    """Classifier stage, then joint, with probes and evaluations; programs compiled in each step."""
    import engine
    import jax

    from jaxdyn.data import DataConfig
    from jaxdyn.optim import stage_at
    from jaxdyn.sections import EvaluationConfig, ModelSource
    from jaxdyn.train import Progress, run_rl
    from jaxdyn.train.loop import plan_of

    shape = Shape(**json.loads((directory / "shape.json").read_text()))
    config = engine.config_of(shape, steps=8)
    config = dataclasses.replace(
        config,
        output=str(directory / name),
        model=ModelSource(str(directory / "model"), dtype=shape.dtype),
        data=DataConfig("jsonl", path=f"{directory}/prompts.jsonl", cache_dir=str(directory)),
        optim=dataclasses.replace(config.optim, schedule="classifier_first", classifier_steps=8),
        probe=dataclasses.replace(config.probe, every=2),
        evaluation=EvaluationConfig(every=4, num_prompts=8, num_generations=2),
    )
    compiled, ended = [0], []

    def count(event: str, seconds: float, **_) -> None:
        compiled[-1] += event == "/jax/core/compile/backend_compile_duration"

    class Noting(Progress):
        def advance(self, **figures):
            ended.append(time.time())
            compiled.append(0)

    def discount(event: str, **_) -> None:
        compiled[-1] -= event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(discount)
    run_rl(config, Noting())
    plan, every = plan_of(config), (config.probe.every, config.evaluation.every)
    kinds = [(stage_at(plan, i).name, *(i % e == e - 1 for e in every)) for i in range(len(ended))]
    return {
        "ended": ended,
        "compiled": compiled[: len(ended)],
        "first_of_kind": [kind not in kinds[:i] for i, kind in enumerate(kinds)],
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2])))
