"""Sampling completions: filters, prefill and decode, and the keys they draw from."""

from jaxdyn.rollout.generate import SamplingConfig, generate
from jaxdyn.rollout.keys import Stream, step_key
from jaxdyn.rollout.sampling import sample_token
from jaxdyn.rollout.trim import trim
