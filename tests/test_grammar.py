"""The checks of configurations: what passes, what does not, and what is said."""

import dataclasses
import math
from functools import partial

import pytest

from jaxdyn import grammar
from jaxdyn.errors import JaxdynError


@dataclasses.dataclass
class Config:
    x: object


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (partial(grammar.at_least, 1), [1, 1.0, 7, (1, 2)], {0: "be at least 1", 0.5: None}),
        (partial(grammar.above, 0), [1e-30, 1], {0: "be positive", -1: "be positive"}),
        (partial(grammar.above, 1), [1.5], {1: "be above 1"}),
        (partial(grammar.between, 0, 1), [0, 0.5, 1], {-0.1: "lie in [0, 1]", 1.1: None}),
        (partial(grammar.between, 0, 1, ends="()"), [0.5], {0: "lie in (0, 1)", 1: None}),
        (partial(grammar.between, 0, 1, ends="[)"), [0], {1: "lie in [0, 1)", -1e-9: None}),
        (partial(grammar.between, 0, 1, ends="(]"), [1], {0: "lie in (0, 1]", 1.1: None}),
        (grammar.finite, [0, -5.0, 1e30], {}),
    ],
)
def test_numbers(check, good, bad):
    for value in [*good, None, ()]:
        check(Config(value), "room", "x")
    for value, wanted in bad.items():
        for given in (value, (*(g for g in good if not isinstance(g, tuple)), value)):
            with pytest.raises(JaxdynError) as error:
                check(Config(given), "room", "x")
            assert str(error.value).startswith(f"room.x must {wanted or ''}".strip())
            assert str(error.value).endswith(f", got {value}")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(JaxdynError, match=f"^room.x must be finite, got {value}$"):
            check(Config(value), "room", "x")


def test_choices():
    check = partial(grammar.one_of, ("a", "b"))
    check(Config("a"), "room", "x")
    partial(grammar.one_of, ("a", None))(Config(None), "room", "x")
    for unknown in ("c", None):
        with pytest.raises(JaxdynError, match=rf"^room.x must be .*'b'\], got {unknown!r}$"):
            check(Config(unknown), "room", "x")
    with pytest.raises(JaxdynError, match=r"^room.x must be one of \['a'\], got 'c'$"):
        partial(grammar.one_of, ("a", None))(Config("c"), "room", "x")


def test_the_top_level_has_no_prefix():
    with pytest.raises(JaxdynError, match=r"^x must be positive, got 0$"):
        grammar.above(0, Config(0), "", "x")
