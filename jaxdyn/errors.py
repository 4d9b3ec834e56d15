"""The one exception meant for the user, apart so that rooms without JAX can raise it."""


class JaxdynError(ValueError):
    """Something the user can mend. The command line prints its message alone and exits with 2."""
