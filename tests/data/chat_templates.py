"""Chat templates in the manner of known models', conversations for them, and a tokenizer."""

from jaxdyn.data import Tokenizer, character_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>")
LETTERS = "".join(map(chr, range(32, 127))) + "\né"

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A default system message, and every turn between two tokens, as SmolLM2's."""

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if strftime_now is defined %}
    {%- set date = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\nToday: ' + date + '\\n\\n' + system + '<|eot|>' }}
{%- for turn in turns %}
    {%- if turn.role not in ['user', 'assistant'] %}
        {{- raise_exception('no role ' + turn.role) }}
    {%- endif %}
    {{- '<|start|>' + turn.role + '<|end|>\\n\\n' + turn.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
"""The sequence's beginning, the date and headers, as Llama 3's."""

THINKING = """\
{%- macro turn(role, text) %}
    {{- '<|im_start|>' ~ role ~ '\\n' ~ text ~ '<|im_end|>\\n' }}
{%- endmacro %}
{%- if tools %}
    {%- set lines = namespace(text='') %}
    {%- for tool in tools %}
        {%- set lines.text = lines.text ~ '\\n' ~ (tool | tojson) %}
    {%- endfor %}
    {{- turn('system', 'Tools:' ~ lines.text) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {{- turn('assistant', message.content.split('</think>')[-1].lstrip('\\n')) }}
    {%- elif message.content is string %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
    {%- if loop.index > 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""Tools as JSON, thoughts left out, a switch for them, as Qwen 3's."""


def message(role, content):
    return {"role": role, "content": content}


ONE = [message("user", "  Hi <é>\n")]
MANY = [
    message("system", "Be good. "),
    message("user", "1+1?"),
    message("assistant", "<think>\nhm\n</think>\n\n2"),
    message("user", "Sure?"),
]


def chat_tokenizer(template: str | None, add_bos: bool = True) -> Tokenizer:
    """One token a character, the marks one token each, and `<s>` before every text or not."""
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.backend.add_special_tokens(list(MARKS))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": add_bos,
    }
    stop = tokenizer.backend.token_to_id("<|im_end|>")
    return Tokenizer(tokenizer.backend, 0, (stop, 2), 1, settings=settings, chat_template=template)
