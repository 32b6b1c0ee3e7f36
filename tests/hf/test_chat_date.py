"""Chat templates that print the date: always the same one, in any format, and nothing else of the template changes."""

import datetime

import pytest

from mara_jax.hf import tokenizer as tokenizers

TOKENIZER = tokenizers.nano(["a fixed date"])
USER = "{{ messages[0]['content'] }}"


def rendered(template: str) -> str:
    """One user message, "hi", in a chat template."""
    TOKENIZER.chat_template = template
    (ids,) = tokenizers.encode_prompts(TOKENIZER, ["hi"], chat=True)
    return tokenizers.decode(TOKENIZER, ids)


@pytest.mark.parametrize(
    ("format", "date"),
    [
        ("%d %b %Y", "26 Jul 2024"),
        ("%B %d, %Y", "July 26, 2024"),
        ("%Y-%m-%dT%H:%M:%S", "2024-07-26T00:00:00"),
        ("%A %-d.%-m.%y, day %j", "Friday 26.7.24, day 208"),
        ("100%% on %F", "100% on 2024-07-26"),
        ("%%d is %d", "%d is 26"),
        ("none", "none"),
    ],
)
def test_today_is_one_date_in_any_format(format, date):
    assert rendered("{{ strftime_now('" + format + "') }} " + USER) == f"{date} hi"
    assert rendered("{% set f = '" + format + "' %}{{ strftime_now(format=f) }} " + USER) == f"{date} hi"


# As Llama 3.x has it: the caller's date, else today's, else one that is written there.
LLAMA = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 1970" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string }} """


def test_llamas_template_prints_it():
    assert rendered(LLAMA + USER) == "Today Date: 26 Jul 2024 hi"


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n  ", "  ", "   {% if true %}x{% endif %}\n", "{%- if true %}\n y{% endif %}"]
)
def test_the_rest_of_a_template_is_as_it_was(start):
    """White space at its start is what Jinja's own rules make of it: as where the date is written out."""
    assert rendered(start + "{{ strftime_now('%d') }}" + USER) == rendered(start + "26" + USER)


def test_it_is_not_the_clock_that_is_asked(monkeypatch):
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            raise AssertionError("the clock was asked")

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert rendered("{% macro m() %}{{ strftime_now('%Y') }}{% endmacro %}{{ m() }} " + USER + " ") == "2024 hi "
