"""The exceptions that the command line knows, apart so that rooms without JAX can raise them."""

from typing import TypeVar

T = TypeVar("T")


class JaxdynError(ValueError):
    """Something the user can mend. The command line prints its message alone and exits."""

    exit_code = 2
    """The command line's: there is no use in trying again."""


class Closing:
    """Closed at the end of a `with`, where what went wrong before counts more than this."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except JaxdynError:
            if error is None:
                raise


class Preempted(Exception):
    """The run was told to end (SIGTERM) and has saved all it did; the same command goes on."""

    exit_code = 75
    """The command line's exit code: EX_TEMPFAIL of sysexits.h, "try again"."""
