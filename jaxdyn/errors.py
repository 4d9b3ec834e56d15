"""The exceptions that the command line knows, apart so that rooms without JAX can raise them."""


class JaxdynError(ValueError):
    """Something the user can mend. The command line prints its message alone and exits."""

    exit_code = 2
    """The command line's: there is no use in trying again."""


class Preempted(Exception):
    """The run was told to end (SIGTERM) and has saved all it did; the same command goes on."""

    exit_code = 75
    """The command line's exit code: EX_TEMPFAIL of sysexits.h, "try again"."""
