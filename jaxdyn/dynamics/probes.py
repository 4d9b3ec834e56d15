"""Where and how often a run is watched."""

import dataclasses

from jaxdyn.grammar import MOST_ROWS, at_least


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Where and how often the dynamics are measured.

    A measurement costs about four passes over the probe's sequences: sites that share a sequence
    are cheap, further prompts are not.

    Attributes:
      every: measure the update of every `every`-th step (0: never).
      num_prompts: probe prompts; the last token of each is one site.
      sites_per_completion: sites inside each prompt's completion, sampled once by the policy
        before training.
      ledger: also keep the account of the whole run: what all updates together did at the sites,
        by component, from one measurement or checkpoint to the next. It takes a copy of the
        classifier.
    """

    every: int = 10
    num_prompts: int = 16
    sites_per_completion: int = 3
    ledger: bool = True

    def __post_init__(self):
        at_least(0, self, "probe", "every")
        at_least(0, self, "probe", "sites_per_completion", most=MOST_ROWS)
        at_least(2, self, "probe", "num_prompts", most=MOST_ROWS)
