"""What is refused, before anything heavy runs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from kernel_oracles import all_sites, rollout, tiny_model

from jaxdyn import kernels
from jaxdyn.kernels import contractions, passes, trace
from jaxdyn.types import JaxdynError

OPTIONS = {
    "progress": lambda done, total: None,
    "method": "gram",
    "devices": jax.devices(),
    "blocks": Path("nowhere"),
}


@pytest.fixture
def model_and_params(monkeypatch):
    """A model that must not be run."""
    for module in (contractions, trace):
        monkeypatch.setattr(module, "plain_kernels", None)
    for module in (contractions, passes):
        monkeypatch.setattr(module, "assemble", None)
    return tiny_model("gpt_neox-untied", jnp.float32)


def with_entry(name, index, value):
    sites = all_sites()
    return dataclasses.replace(sites, **{name: getattr(sites, name).at[index].set(value)})


@pytest.mark.parametrize(
    "name, index, value, message",
    [
        ("positions", 3, 6, r"sites_a\.positions\[3\] is 6; .* slot .* from 0 to 5"),
        ("positions", 0, -1, r"sites_a\.positions\[0\] is -1"),
        ("positions", 3, 0, r"site 3 of sites_a \(sequence 1, slot 0\) lies on padding"),
        ("rows", 7, 3, r"sites_a\.rows\[7\] is 3; .* from 0 to 2"),
        ("targets", 2, 11, r"sites_a\.targets\[2\] is 11; .* vocabulary, from 0 to 10"),
        ("tokens", (2, 1), -4, r"sites_a\.tokens\[2, 1\] is -4; .* vocabulary"),
        ("tokens", (1, 0), 99, r"sites_a\.tokens\[1, 0\] is 99"),
    ],
)
def test_sites_that_are_refused(name, index, value, message, model_and_params):
    sites = with_entry(name, index, value)
    for function in (kernels.log_prob_kernel, kernels.trace_kernel):
        with pytest.raises(JaxdynError, match=message):
            function(*model_and_params, sites)
    with pytest.raises(JaxdynError, match=message.replace("sites_a", "sites_b")):
        kernels.log_prob_kernel(*model_and_params, all_sites(), sites)


def test_no_site_and_too_long_a_sequence(model_and_params):
    sites = all_sites()
    none = dataclasses.replace(
        sites, rows=sites.rows[:0], positions=sites.rows[:0], targets=sites.rows[:0],
        is_prompt=sites.is_prompt[:0],
    )  # fmt: skip
    with pytest.raises(JaxdynError, match="at least one site, got none"):
        kernels.log_prob_kernel(*model_and_params, none)
    long = dataclasses.replace(
        sites, tokens=jnp.zeros((3, 40), jnp.int32), mask=jnp.ones((3, 40), bool)
    )
    with pytest.raises(JaxdynError, match="has 40 tokens; the model's context is 32"):
        kernels.log_prob_kernel(*model_and_params, long)


def test_cotangents_that_are_refused(model_and_params):
    sites = all_sites()
    good, short = jnp.zeros((8, 11)), jnp.zeros((8, 10))
    message = r"cotangents_a must be \[N, V\] = \(8, 11\), got \(8, 10\)"
    with pytest.raises(JaxdynError, match=message):
        kernels.update_kernel(*model_and_params, sites, cotangents_a=short)
    with pytest.raises(JaxdynError, match="cotangents_b must be"):
        kernels.update_kernel(
            *model_and_params, sites, sites, cotangents_a=good, cotangents_b=short
        )
    with pytest.raises(JaxdynError, match="sites_b is given without cotangents_b"):
        kernels.update_kernel(*model_and_params, sites, sites, cotangents_a=good)
    with pytest.raises(JaxdynError, match="cotangents_b is given without sites_b"):
        kernels.update_kernel(*model_and_params, sites, cotangents_a=good, cotangents_b=good)


def test_chosen_tokens_that_are_refused(model_and_params):
    for ids, message in [
        ([3, 11], r"token_ids\[1\] is 11; .* from 0 to 10"),
        ([], "must be a list of token ids"),
        ([0.5], "must be a list of token ids"),
    ]:
        with pytest.raises(JaxdynError, match=message):
            kernels.token_block(*model_and_params, all_sites(), token_ids=ids)


def test_sequences_that_are_refused(model_and_params):
    good = rollout()
    call = lambda r, **options: kernels.sequence_kernel(*model_and_params, r, **options)
    with pytest.raises(JaxdynError, match=r"rollout_a must be \[B, C\] = \(3, 3\), got \(3, 2\)"):
        call(good, weights_a=jnp.zeros((3, 2)))
    with pytest.raises(JaxdynError, match="weights_b is given without rollout_b"):
        call(good, weights_b=jnp.zeros((3, 3)))
    right_padded = dataclasses.replace(good, prompt_mask=good.prompt_mask[:, ::-1])
    with pytest.raises(JaxdynError, match="prompt 1 of rollout_a must end in its last slot"):
        call(right_padded)
    outside = dataclasses.replace(good, completion_ids=good.completion_ids.at[1, 2].set(11))
    with pytest.raises(JaxdynError, match=r"rollout_a\.tokens\[1, 5\] is 11"):
        call(outside)
    columns = ("completion_ids", "completion_mask", "per_token_logps")
    empty = dataclasses.replace(good, **{k: getattr(good, k)[:, :0] for k in columns})
    with pytest.raises(JaxdynError, match=r"at least one completion slot, got \[B, C\] = \(3, 0\)"):
        call(empty)


def test_methods_and_budgets_that_are_refused(model_and_params):
    sites = all_sites()
    for function in (kernels.log_prob_kernel, kernels.trace_kernel):
        with pytest.raises(JaxdynError, match="'auto', 'plain' or 'gram', got 'fast'"):
            function(*model_and_params, sites, method="fast")
        with pytest.raises(JaxdynError, match="too small for one site: a pair needs about"):
            function(*model_and_params, sites, method="gram", memory_budget=1000)
        with pytest.raises(JaxdynError, match=r"'plain' holds \d+ bytes .* memory_budget is 1000"):
            function(*model_and_params, sites, method="plain", memory_budget=1000)


def test_options_that_are_refused(model_and_params):
    """Unknown ones as any keyword argument, and those for which a function has no use."""
    model, params = model_and_params
    sites, key = all_sites(), jax.random.key(0)
    field = jnp.zeros((8, 11))
    of_sites = {
        kernels.log_prob_kernel: (),
        kernels.trace_kernel: (),
        kernels.apply_kernel: (field,),
        kernels.top_eigenpairs: (2,),
        kernels.sketch_gradients: (key,),
    }
    for function, arguments in of_sites.items():
        with pytest.raises(TypeError, match="unexpected keyword argument 'memory'"):
            function(model, params, sites, *arguments, memory=1)
    for function, name, words in [
        (kernels.apply_kernel, "progress", "progress has no use here: the options are memory_bud"),
        (kernels.top_eigenpairs, "method", "method has no use here: the options are memory_budget"),
        (kernels.sketch_gradients, "devices", "devices has no use here: .*_budget and progress"),
    ]:
        with pytest.raises(JaxdynError, match=words) as refused:
            function(model, params, sites, *of_sites[function], **{name: OPTIONS[name]})
        assert "\n" not in str(refused.value)
    with pytest.raises(JaxdynError, match="blocks has no use here"):
        kernels.sketch_sequences(model, params, rollout(), key, blocks=OPTIONS["blocks"])
