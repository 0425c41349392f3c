import os
import signal
from datetime import UTC, datetime

import pytest

from fleet_device.requests import template
from fleet_device.requests.structured import ChatMessage
from fleet_device.requests.template import ChatError, ChatTemplate
from tests.support.tiny_gguf import CHAT_TEMPLATE

HELLO = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hello!")]


def test_a_template_may_use_what_real_ones_use() -> None:
    source = """{{ bos_token }}
{%- set state = namespace(n=0) %}
{%- for message in messages %}
    {%- if loop.first %}{% continue %}{% endif %}
    {%- set state.n = state.n + 1 %}
    {%- generation %}[{{ message['content'] | trim }}]{% endgeneration %}
{%- endfor %} {{ state.n }} {{ strftime_now('%Y') }}{{ eos_token }}{{ '=' * 3 }}"""
    template = ChatTemplate(source, bos="<s>", eos="</s>", now=lambda: datetime(2024, 5, 1, tzinfo=UTC))
    assert template.render(HELLO) == "<s>[Hello!] 1 2024</s>==="


def test_an_error_raised_by_a_template_is_one_sentence() -> None:
    template = ChatTemplate("{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(ChatError, match="Roles"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ [0] * 10000000000 }}",
        "{{ range(10000000000) }}",
        "{% for i in range(90000) %}{{ 'x' * 60000 }}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ missing.attribute }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_harmful_or_broken_template_ends_in_a_sentence(source: str) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(source).render(HELLO)


def test_a_template_may_not_write_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_MAX_PROMPT", 1000)
    assert len(ChatTemplate("{% for i in range(100) %}0123456789{% endfor %}").render(HELLO)) == 1000
    with pytest.raises(ChatError, match="1000"):
        ChatTemplate("{% for i in range(101) %}0123456789{% endfor %}").render(HELLO)


def test_a_message_is_data_not_a_template() -> None:
    assert "{{ 7 * 7 }}" in ChatTemplate(CHAT_TEMPLATE).render([ChatMessage("user", "{{ 7 * 7 }}")])


ENDLESS = [
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
    "{% for a in range(90000) %}{{ 'a b' | wordwrap(1) | length and '' }}{{ range(90000) | sum and '' }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | sort(reverse=true) | length and '' }}{% endfor %}",
]
HUGE = [
    "{% set x = namespace(t='0123456789') %}{% for i in range(90) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
    "{{ 'x' | center(10000000000) | length }}",
    "{{ '%09999999999d' | format(1) | length }}",
    "{{ 'x' | indent(9999999999) | length }}",
    "{% set x = namespace(t=[1]) %}{% for i in range(90) %}{% set x.t = x.t + x.t %}{% endfor %}",
    "{{ range(99999) | map('center', 99999) | list | length }}",
]


@pytest.mark.parametrize("source", ENDLESS + HUGE)
def test_a_template_has_no_end_of_time_and_memory(source: str) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(source).render(HELLO)
    assert "Hello!" in ChatTemplate(CHAT_TEMPLATE).render(HELLO), "the next request is served"


def test_a_deeply_nested_template_ends_in_a_sentence() -> None:
    with pytest.raises(ChatError):
        ChatTemplate("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}").render(HELLO)


def test_a_worker_that_somebody_has_ended_is_replaced() -> None:
    assert "Hello!" in ChatTemplate(CHAT_TEMPLATE).render(HELLO)
    process = template._worker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert "Hello!" in ChatTemplate(CHAT_TEMPLATE).render(HELLO)


def test_a_template_sees_the_time_of_its_request() -> None:
    times = iter([datetime(2024, 5, 1, tzinfo=UTC), datetime(2025, 6, 2, tzinfo=UTC)])
    clock = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: next(times))
    assert [clock.render(HELLO), clock.render(HELLO)] == ["01 May 2024", "02 Jun 2025"]


def test_messages_may_hold_any_character() -> None:
    text = '\ud800 \x00 \u2028 \n \U0001f600 "quoted"'
    assert ChatTemplate("{{ messages[0].content }}").render([ChatMessage("user", text)]) == text
