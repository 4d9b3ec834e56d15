"""What `jaxdyn influence` finds: of a run's step taken again, or of completions from outside."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdyn.commands.influence_momentum import Momentum, stacked
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.commands.influence_page import StepLedger, step_ledger
from jaxdyn.commands.influence_places import (
    Related,
    batch_sites,
    own_weights,
    relate,
    token_places,
)
from jaxdyn.commands.kernel import wide
from jaxdyn.commands.kernel_places import require_context
from jaxdyn.commands.text_options import bytes_of
from jaxdyn.data import encode_prompts, encode_supervised, read_scored
from jaxdyn.dynamics import (
    contributions,
    influence,
    own_tokens,
    rollout_from_texts,
)
from jaxdyn.dynamics.precision import in_float32
from jaxdyn.hosts import fetch
from jaxdyn.rl import LossConfig, logit_cotangents, normalizer_of
from jaxdyn.sections import ModelSource
from jaxdyn.train.probe import Probe
from jaxdyn.train.progress import Progress
from jaxdyn.train.retake import batch_rollout, take_updates
from jaxdyn.train.saved import SavedRun
from jaxdyn.train.step import prepare_step
from jaxdyn.train.task import open_model
from jaxdyn.types import Components, JaxdynError, Rollout, Sites


class Account(NamedTuple):
    """What was found, and between what."""

    sites: Sites
    related: Related
    rollout: Rollout
    columns: np.ndarray  # of the completions, by component, [3, 2, O, U]
    arrays: dict[str, Any]  # of `SavedInfluence`, where there are any
    texts: dict[str, Any]
    about: dict[str, Any]
    tokenizer: Any
    ledger: StepLedger | None = None


def step_of(options: InfluenceOptions, saved: SavedRun) -> int:
    """The step to take again.

    Raises:
      JaxdynError: if it has no checkpoint before it, or none follows its checkpoint.
    """
    if saved.config.kind != "rl":
        raise JaxdynError(f"{saved.path} is a run of jaxdyn {saved.config.kind}; wanted one of rl")
    if options.step is not None:
        step = saved.find(options.step)
        if not saved.follows(step):
            raise JaxdynError(f"no step of {saved.path} follows its checkpoint {step}")
        return step
    followed = [step for step in saved.steps if saved.follows(step)]
    if not followed:
        raise JaxdynError(
            f"{saved.path} keeps no checkpoint that a step follows, got {saved.steps}; train with "
            "--train.checkpoint-every and --train.keep-checkpoints 0"
        )
    return followed[-1]


def account_of_step(
    options: InfluenceOptions, saved: SavedRun, step: int, progress: Progress
) -> Account:
    """The account of a run's step: of all its inner epochs together."""
    task = saved.task
    model = in_float32(task.model)  # what is measured is less than bfloat16 resolves
    stage, state = saved.begin(step)
    prepared = prepare_step(task, state, stage, step)
    rollout, of_batch = batch_rollout(prepared), options.look_at == "batch"
    if of_batch:
        counts = options.site_completions, options.sites_per_completion
        sites = batch_sites(rollout, *counts, options.seed)
    else:
        sites = Probe(task).sites
    related = relate(sites, rollout, of_batch)
    places = places_of(options, rollout)
    how: dict[str, Any] = {"memory_budget": bytes_of(options.memory_budget)}

    past = Momentum(saved, step, options.momentum, prepared) if options.momentum else None
    before, after = None, None
    found: list[dict[str, np.ndarray]] = []
    weights: list[np.ndarray] = []
    clips: list[float] = []
    with progress.tiles(f"step {step}") as report:
        for update in take_updates(task, state, stage, prepared):
            before, after = update.before if before is None else before, update.after
            common: dict[str, Any] = {
                "weights": update.weights,
                "temperature": update.temperature,
                "metric": update.metric,
            }
            account = influence(
                model,
                update.before,
                update.after,
                sites,
                rollout,
                **common,
                clip=update.clip,
                others=update.others,
                progress=report,
                **how,
            )
            beside: dict[str, Components] = {}
            if of_batch:
                own = {**common, "weights": own_weights(update.weights, related)}
                beside["itself"] = own_tokens(model, update.before, sites, **own)
            if places is not None:
                given = {**common, "places": places, **how}
                beside["by_token"] = contributions(model, update.before, sites, rollout, **given)
            found.append(
                {name: stacked(x) for name, x in {**account.others, **beside}.items()}
                | {"completions": stacked(account.completions)}
                | {name: fetch(getattr(account, name)) for name in ("first_order", "actual")}
            )
            if past is not None:
                past.add(model, update, sites, **how)
            weights.append(update.weights)
            clips.append(update.clip)
    seen = step_ledger(model, before or {}, after or {}, sites, how["memory_budget"])
    arrays: dict[str, Any] = {name: sum(one[name] for one in found) for name in found[0]}
    columns = arrays.pop("completions")
    arrays["places"] = places
    arrays |= {} if past is None else past.arrays()
    experience = prepared.experience
    texts = {
        "prompts": experience.prompts,
        "completions": experience.completions,
        "advantages": wide(prepared.batch.advantages),
        "rewards": np.asarray(experience.rewards.total, np.float64),
        "weights": weights[0],
    }
    about = {
        "model": f"{saved.path.resolve().name}, step {step}",
        "step": step,
        "stage": stage.name,
        "learning_rate": prepared.rate,
        "epochs": len(found),
        "clip": clips,
        "unit": "nats",
        "temperature": task.config.sampling.temperature,
        "loss": dataclasses.asdict(task.config.loss),
        "optim": dataclasses.asdict(task.config.optim),
    }
    tokenizer = saved.loaded.tokenizer
    return Account(sites, related, rollout, columns, arrays, texts, about, tokenizer, seen)


def account_of_file(options: InfluenceOptions, progress: Progress) -> Account:
    """What a file's completions would do in a step of gradient descent, per unit of its rate.

    Raises:
      JaxdynError: if the file, the model or the loss is not as it should be, or a text too long.
    """
    scored = read_scored(str(options.completions), options.limit)
    if scored.more:
        text = f"the first {options.limit} rows of {options.completions}; --limit 0 takes all"
        progress.console.print(text, highlight=False, soft_wrap=True)
    loss = LossConfig(aggregation=options.aggregation)
    model, params, tokenizer = open_model(ModelSource(str(options.model), options.untie))
    prompts = encode_prompts(tokenizer, scored.prompts, options.max_prompt_length)
    encoded = encode_supervised(tokenizer, scored.prompts, scored.completions, 2**31)
    rollout = rollout_from_texts(prompts, *encoded, options.max_completion_length)
    counts = options.site_completions, options.sites_per_completion
    sites = batch_sites(rollout, *counts, options.seed)
    require_context(model, sites)
    related, places = relate(sites, rollout, of_batch=True), places_of(options, rollout)

    # At ratio 1 and without a KL, ∂loss/∂ log π is the same wherever log π is.
    found = logit_cotangents(
        loss,
        jnp.zeros(rollout.completion_mask.shape),
        None,
        None,
        jnp.asarray(scored.advantages),
        rollout.completion_mask,
        normalizer_of(rollout.completion_mask, options.max_completion_length),
    )
    weights = np.stack(fetch((found.of_logp, found.of_entropy)), axis=-1)
    common: dict[str, Any] = {"weights": weights, "temperature": options.temperature}
    how: dict[str, Any] = {"memory_budget": bytes_of(options.memory_budget)}
    with progress.tiles("completions") as report:
        whole = contributions(model, params, sites, rollout, **common, **how, progress=report)
    own = own_weights(weights, related)
    itself = own_tokens(model, params, sites, own, options.temperature)
    arrays: dict[str, Any] = {"places": places, "itself": stacked(itself)}
    if places is not None:
        with progress.tiles("tokens") as report:
            tokens = contributions(
                model, params, sites, rollout, places=places, **common, **how, progress=report
            )
        arrays["by_token"] = stacked(tokens)
    texts = {
        "prompts": scored.prompts,
        "completions": scored.completions,
        "advantages": scored.advantages,
        "weights": weights,
    }
    about = {
        "model": Path(str(options.model)).resolve().name,
        "unit": "nats per unit of learning rate",
        "temperature": options.temperature,
        "loss": dataclasses.asdict(loss),
    }
    return Account(sites, related, rollout, stacked(whole), arrays, texts, about, tokenizer)


def places_of(options: InfluenceOptions, rollout: Rollout) -> np.ndarray | None:
    """The tokens to take one by one.

    Raises:
      JaxdynError: if there is no such completion, or it has no token.
    """
    if not options.by_token:
        return None
    count = len(rollout.completion_ids)
    for number in options.by_token:
        if not 0 <= number < count:
            raise JaxdynError(f"by_token names completion {number}; they go from 0 to {count - 1}")
    places = token_places(rollout, options.by_token)
    if not len(places):
        raise JaxdynError(f"completions {list(options.by_token)} have no token")
    return places
