"""What an update did: first-order propagation by component, confidence, diversity, features."""

from jaxdyn.dynamics.alternatives import most_changed_tokens
from jaxdyn.dynamics.influence import (
    Change,
    Influence,
    contributions,
    influence,
    own_tokens,
)
from jaxdyn.dynamics.ledger import Ledger, ledger
from jaxdyn.dynamics.measure import (
    SiteState,
    StateMeasures,
    UpdateMeasures,
    measure_state,
    measure_update,
    site_state,
)
from jaxdyn.dynamics.probes import ProbeConfig
from jaxdyn.dynamics.propagation import delta_logits, propagate, site_features
from jaxdyn.dynamics.reward_change import reward_weights
from jaxdyn.dynamics.sites import (
    rollout_from_texts,
    site_texts,
    sites_from_prompts,
    sites_from_rollout,
    sites_from_texts,
)
