"""What an update did: first-order propagation by component, confidence, diversity, features."""

from jaxdyn.dynamics.measure import SiteState, measure_state, measure_update, site_state
from jaxdyn.dynamics.probes import ProbeConfig, sites_from_rollout
from jaxdyn.dynamics.propagation import delta_logits, propagate, site_features

__all__ = [
    "ProbeConfig",
    "SiteState",
    "delta_logits",
    "measure_state",
    "measure_update",
    "propagate",
    "site_features",
    "site_state",
    "sites_from_rollout",
]
