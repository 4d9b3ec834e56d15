import datetime

import jaxtyping
import pytest
from chat_templates import CHATML, HEADERS, MANY, ONE, THINKING, message

from jaxdyn.data import sandbox
from jaxdyn.data.templates import NAMED, render
from jaxdyn.types import JaxdynError

TURNS = 1000
DAY = datetime.date(2025, 1, 2)


@pytest.fixture(autouse=True)
def _fewer_turns(monkeypatch):
    assert sandbox.MOST_TURNS > 100 * TURNS
    monkeypatch.setattr(sandbox, "MOST_TURNS", TURNS)


def written(template, messages, tokens=None, **settings):
    return render(template, messages, tokens or {}, today=DAY, **settings)


def test_turns_between_two_tokens():
    opening = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  Hi <é>\n<|im_end|>\n"
    assert written(CHATML, ONE) == opening + "<|im_start|>assistant\n"
    assert written(CHATML, ONE, add_generation_prompt=False) == opening
    assert written(CHATML, MANY).startswith(
        "<|im_start|>system\nBe good. <|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm"
    )


def test_headers_the_date_and_special_tokens():
    assert written(HEADERS, ONE, {"bos_token": "<|begin|>"}) == (
        "<|begin|><|start|>system<|end|>\n\nToday: 02 Jan 2025\n\n<|eot|>"
        "<|start|>user<|end|>\n\nHi <é><|eot|><|start|>assistant<|end|>\n\n"
    )
    with pytest.raises(JaxdynError, match=r"^the chat template fails: no role tool$"):
        written(HEADERS, [*MANY, message("tool", "x")])


def test_tools_options_macros_and_loop_controls():
    assert written(
        THINKING, MANY, tools=[{"name": "<add>"}], options={"enable_thinking": False}
    ) == (
        '<|im_start|>system\nTools:\n{"name": "<add>"}<|im_end|>\n'
        "<|im_start|>system\nBe good. <|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    marked = "{% generation %}{{ messages[0].content }}\n{% endgeneration %}\n."
    assert written(marked, ONE) == "  Hi <é>\n\n."


def test_templates_for_base_models():
    assert written(NAMED["plain"], MANY[:2]) == "Be good. \n\n1+1?"
    assert written(NAMED["hh"], MANY[1:]) == (
        "\n\nHuman: 1+1?\n\nAssistant: <think>\nhm\n</think>\n\n2\n\nHuman: Sure?\n\nAssistant:"
    )
    below = "Below is an instruction that describes a task"
    write = ". Write a response that appropriately completes the request.\n\n"
    assert written(NAMED["alpaca"], MANY[1:2]) == (
        f"{below}{write}### Instruction:\n1+1?\n\n### Response:\n"
    )
    two = {**message("user", "Sum.\n\n1, 1"), "instruction": "Sum.", "input": "1, 1"}
    assert written(NAMED["alpaca"], [two]) == (
        f"{below}, paired with an input that provides further context{write}"
        "### Instruction:\nSum.\n\n### Input:\n1, 1\n\n### Response:\n"
    )


TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
LOOPS = "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('no\nway') }}", "fails: no way"),
        ("\n{% if", "does not compile: line 2: unexpected 'end of template'"),
        ("{{ messages[3].content }}", "fails: .*no element 3"),
        ("{% include '/etc/passwd' %}", "fails: no loader"),
        ("{{ ''.__class__ }}", "fails: it may not reach '__class__' of a str"),
        ("{{ messages.append(1) }}", "fails: it may not reach 'append' of a list"),
        ("{{ cycler.__init__.__globals__.os }}", "fails: it may not reach '__init__' of a type"),
        (LOOPS, "fails: it takes more than 1000 turns"),
        (TWICE, "fails: it takes more than 1000 turns"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion depth"),
        ("{{ range(100000000) | list }}", "fails: Range too big"),
        ("{{ ['a'] * 99999999 }}", "fails: it repeats something to more than 10000000 items"),
        ("{{ 9 ** 9 ** 9 }}", "fails: it may not take powers"),
    ],
)
def test_a_bad_template_is_one_line(template, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(JaxdynError, match=f"^the chat template {words}") as caught:
        written(template, ONE)
    assert "\n" not in str(caught.value)


def test_what_one_rendering_used_up_the_next_has_again():
    near = "{% for i in range(450) %}{% endfor %}" * 2 + "."
    assert [written(near, ONE) for _ in range(2)] == [".", "."]
