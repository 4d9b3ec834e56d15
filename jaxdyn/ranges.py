"""Checks of a configuration's numbers, one wording for all: imports no JAX."""

from typing import Any

from jaxdyn.errors import JaxdynError


def at_least(least: float, config: Any, section: str, *names: str) -> None:
    """That the fields are `least` or more, and finite where they are given."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < float("inf"):
            raise JaxdynError(f"{section}.{name} must be at least {least}, got {value}")
