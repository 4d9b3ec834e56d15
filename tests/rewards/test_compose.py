import copy
import math
import sys
import warnings

import numpy as np
import pytest
import tyro

from jaxdyn.rewards import BUILT_IN, Length, RegexMatch, RewardConfig, make_reward
from jaxdyn.types import JaxdynError

PROMPTS = ["abc=", "abc=", "xyz="]
COMPLETIONS = ["cab", "1", "xyz"]
COLUMNS = {"letters": ["abc", "abc", "xyz"], "finished": [True, True, False]}

MODULE = """
def halves(prompts, completions, **columns):
    return [0.5] * len(completions)

def sometimes(prompts, completions, **columns):
    return [None if c == "1" else len(c) for c in completions]

def never(prompts, completions, **columns):
    return [None] * len(completions)

def raises(prompts, completions, letters, **columns):
    return [1 / (a != "xyz") for a in letters]

def only_together(prompts, completions, **columns):
    if len(prompts) > 1:
        raise RuntimeError("two\\nlines")
    return [0.0]

def short(prompts, completions, **columns):
    return [1.0]

def nothing(prompts, completions, **columns):
    return None

def text(prompts, completions, **columns):
    return [1, "2", 3]

def infinite(prompts, completions, **columns):
    return [1, 2, float("nan")]

def scalars(prompts, completions, **columns):
    import numpy as np
    return np.array([True, False, True])

constant = 3

def leaves(prompts, completions, **columns):
    raise SystemExit(0)

def dies(prompts, completions, **columns):
    raise BaseException("no ordinary failure")

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("says nothing")

def mute(prompts, completions, **columns):
    raise Mute()

class Odd:
    def __float__(self):
        raise KeyError("no number")
    __repr__ = __float__

def odd(prompts, completions, **columns):
    return [Odd()] * len(completions)

def endless(prompts, completions, **columns):
    yield 1.0
    raise SystemExit(0)

def greedy(prompts, completions, letters, spans, **columns):
    prompts.clear(), completions.clear(), letters.append("z")
    for span in spans:
        span["at"].pop()
    return [1.0, 2.0, 3.0]

def strict(prompts, completions, **columns):
    import warnings
    warnings.simplefilter("error")
    return [1.0] * len(completions)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the working directory, which a console script does not search."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import absent_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def evaluate(*functions, **options):
    return make_reward(RewardConfig(functions, **options))(PROMPTS, COMPLETIONS, COLUMNS)


def test_weighted_total():
    output = evaluate("anagram", "finished", weights=(2.0, -0.5))
    np.testing.assert_array_equal(output.values["anagram"], [1, 0, 1])
    np.testing.assert_array_equal(output.values["finished"], [1, 1, 0])
    np.testing.assert_array_equal(output.total, [1.5, -0.5, 2])
    assert output.means == {"anagram": 2 / 3, "finished": 2 / 3}
    np.testing.assert_array_equal(evaluate("anagram", "finished").total, [2, 1, 1])


def test_the_users_own_by_path_with_unscorable_completions(mine):
    output = evaluate("anagram", f"{mine}:sometimes", f"{mine}.never", weights=(1.0, 0.5, 0.0))
    np.testing.assert_array_equal(output.values["sometimes"], [3, np.nan, 3])
    # Left out of the mean, and unscorable as a whole: a sum without a term is another quantity.
    assert output.means["sometimes"] == 3
    assert math.isnan(output.means["never"])
    np.testing.assert_array_equal(output.total, [2.5, np.nan, 2.5])
    # A function without a weight takes nothing away.
    weighed = evaluate("anagram", f"{mine}:never", weights=(1.0, 1e-9))
    np.testing.assert_array_equal(weighed.total, [np.nan] * 3)
    np.testing.assert_array_equal(evaluate(f"{mine}:scalars").total, [1, 0, 1])


def test_options_reach_the_functions():
    options = {"regex_match": RegexMatch("b$"), "length": Length(3, 3)}
    output = evaluate("regex_match", "length", **options)
    np.testing.assert_array_equal(output.values["regex_match"], [1, 0, 0])
    np.testing.assert_array_equal(output.values["length"], [1, 0, 1])
    # A column of the examples never stands in for an option.
    reward = make_reward(RewardConfig(("regex_match",), regex_match=RegexMatch("a")))
    assert reward(["p"], ["a"], {"pattern": ["b"]}).total == [1]
    # Nor one called like an argument for it.
    assert reward(["p"], ["a"], {"completions": ["b"], "prompts": ["c"]}).total == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"reward 'raises' failed for example 2 \('xyz='\): ZeroDivisionError"),
        ("only_together", r"reward 'only_together' failed: RuntimeError: two lines"),
        ("short", r"'short' returned 1 values for 3 completions.*example 0 \('abc='\)"),
        ("nothing", r"'nothing' returned NoneType, wanted a list"),
        ("text", r"'text' returned '2' for example 1 \('abc='\), wanted a finite number or None"),
        ("infinite", r"'infinite' returned nan for example 2 \('xyz='\)"),
    ],
)
def test_a_reward_that_fails_names_itself_and_the_example(mine, name, message):
    with pytest.raises(JaxdynError, match=message) as caught:
        evaluate(f"{mine}:{name}")
    assert "\n" not in str(caught.value)


def test_a_missing_column_names_the_reward():
    with pytest.raises(
        JaxdynError, match=r"'contains_words' failed.*column 'words'.* letters, fin"
    ):
        evaluate("contains_words")


def test_an_answer_that_does_not_fit_names_the_example():
    reward = make_reward(RewardConfig(("anagram",)))
    with pytest.raises(JaxdynError, match=r"example 1 \('q'\): TypeError.*'int'"):
        reward(["p", "q"], ["ab", "ab"], {"letters": ["ab", 7]})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("exact", "unknown reward 'exact': did you mean 'exact_match'"),
        ("anagrams", "did you mean 'anagram'"),
        ("absent_module:f", "cannot import the reward 'absent_module:f': ModuleNotFoundError"),
        ("broken_rewards.f", "ModuleNotFoundError: No module named 'absent_module'"),
        ("my_rewards:absent", "cannot import.*AttributeError"),
        ("my_rewards:constant", "is a int, not a function"),
        ("regex_match", "^reward.regex_match.pattern must be set, got ''$"),
    ],
)
def test_a_reward_that_cannot_be_found(mine, path, message):
    with pytest.raises(JaxdynError, match=message) as caught:
        make_reward(RewardConfig((path,)))
    assert "\n" not in str(caught.value)


def test_config_errors(mine):
    with pytest.raises(JaxdynError, match=r"^reward.weights must be as many as .* \(2\), got 1$"):
        RewardConfig(("anagram", "finished"), weights=(1.0,))
    with pytest.raises(JaxdynError, match=r"^reward.weights must be finite, got nan$"):
        RewardConfig(("anagram",), weights=(math.nan,))
    with pytest.raises(JaxdynError, match=r"^reward.functions must name at least one, got \(\)$"):
        RewardConfig(())
    with pytest.raises(JaxdynError, match=r"^reward.functions names 'anagram' twice$"):
        make_reward(RewardConfig(("anagram", "anagram")))


def test_the_command_line_can_edit_it():
    args = ["--functions", "length", "finished", "--weights", "1", "0.5", "--length.maximum", "9"]
    config = tyro.cli(RewardConfig, args=args)
    assert config == RewardConfig(("length", "finished"), (1.0, 0.5), length=Length(maximum=9))


def test_the_help_names_every_built_in_function():
    assert set(BUILT_IN) >= {"anagram", "finished"}
    assert all(name in (RewardConfig.__doc__ or "") for name in BUILT_IN)


class Counting:
    """A scorer with a state, as a model's would have: it has been called so many times."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        return [float(self.calls + len(text)) for text in completions]


def test_a_scorer_that_exists_already_can_be_handed_in(mine):
    """It comes before a built-in function or a path of its name."""
    counting, other = Counting(), Counting()
    names = ("model", "finished", "anagram", f"{mine}:halves")
    scorers = {"model": counting, "finished": other, "unused": None}
    reward = make_reward(RewardConfig(names, weights=(10.0, 1.0, 0.0, 0.0)), scorers)
    for call in (1, 2):
        output = reward(PROMPTS, COMPLETIONS, COLUMNS)
        lengths = np.array([3, 1, 3])
        np.testing.assert_array_equal(output.values["model"], call + lengths)
        np.testing.assert_array_equal(output.total, 11 * (call + lengths))
        np.testing.assert_array_equal(output.values["halves"], [0.5] * 3)
    assert (counting.calls, other.calls) == (2, 2)
    with pytest.raises(JaxdynError, match=r"the reward .model. is a model, which is not"):
        make_reward(RewardConfig(("model",)))


# -- what a reward may do to the run ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [
        ("leaves", r"reward 'leaves' failed for example 0 \('abc='\): SystemExit: 0"),
        ("dies", "reward 'dies' failed for example 0 .*: BaseException: no ordinary failure"),
        ("mute", "reward 'mute' failed for example 0 .*: Mute$"),
        ("odd", "reward 'odd' returned Odd for example 0 .*, wanted a finite number or None"),
        ("endless", "reward 'endless' failed.*: SystemExit: 0"),
    ],
)
def test_a_reward_that_would_end_the_run_is_named(name, words, mine):
    reward = make_reward(RewardConfig((f"{mine}:{name}",)))
    with pytest.raises(JaxdynError, match=words):
        reward(PROMPTS, COMPLETIONS, COLUMNS)


def test_an_import_that_would_end_the_run_is_named(mine, tmp_path):
    (tmp_path / "leaving_rewards.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(JaxdynError, match=r"cannot import .*leaving_rewards:f.*SystemExit: 0"):
        make_reward(RewardConfig(("leaving_rewards:f",)))
    with pytest.raises(JaxdynError, match=r"reward.weights must be finite, got nan"):
        RewardConfig(("anagram",), weights=(math.nan,))


def test_an_interrupt_is_no_reward_that_fails():
    def interrupted(prompts, completions, **columns):
        raise KeyboardInterrupt

    reward = make_reward(RewardConfig(("mine",)), {"mine": interrupted})
    with pytest.raises(KeyboardInterrupt):
        reward(PROMPTS, COMPLETIONS, COLUMNS)


def test_a_reward_changes_neither_its_columns_nor_what_warnings_do(mine):
    columns = {**COLUMNS, "spans": [{"at": [i, [2]]} for i in range(3)]}
    before = copy.deepcopy((PROMPTS, COMPLETIONS, columns)), list(warnings.filters)
    reward = make_reward(RewardConfig((f"{mine}:greedy", f"{mine}:strict")))
    assert reward(PROMPTS, COMPLETIONS, columns).total.tolist() == [2.0, 3.0, 4.0]
    assert ((PROMPTS, COMPLETIONS, columns), list(warnings.filters)) == before


def test_the_code_of_a_run_is_not_imported(tmp_path, monkeypatch):
    """Whoever looks at a stranger's run from inside it does not run the stranger's code."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "inner" / "nested_code").mkdir(parents=True)
    for path in (run / "stranger_code.py", run / "inner" / "nested_code" / "__init__.py"):
        path.write_text("raise SystemExit(f'ran {__name__}')")
    monkeypatch.setattr("sys.path", list(sys.path))
    for folder, name in ((run, "stranger_code"), (run / "inner", "nested_code")):
        monkeypatch.chdir(folder)
        with pytest.raises(JaxdynError, match=rf"'{name}:f' lies in the run .*/run, and a run's"):
            make_reward(RewardConfig((f"{name}:f",)))
        assert name not in sys.modules
        make_reward(RewardConfig(("json:dumps",)))  # Python's own: but nothing is looked for here
        assert str(folder) not in sys.path
    monkeypatch.chdir(tmp_path)
    make_reward(RewardConfig(("json:dumps",)))
    assert str(tmp_path) in sys.path
