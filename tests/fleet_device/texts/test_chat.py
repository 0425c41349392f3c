"""Chat templates: rendered as their models expect, harmless whoever wrote them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.scripted import WordCodec
from fleet_device.texts import chat
from fleet_device.texts.chat import ChatError, ChatMessage, ChatTemplate, encode_chat
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import CHAT_TEMPLATE, END, tiny_gguf

HELLO = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hello!")]


def test_messages_become_a_prompt_up_to_the_assistant_s_turn() -> None:
    assert ChatTemplate(CHAT_TEMPLATE).render(HELLO) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


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
    with pytest.raises(ChatError, match=r"declines these messages: Roles must alternate\.$"):
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
    with pytest.raises(ChatError, match="chat"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("source", ["{% for %}", "{{", "x" * (1 << 19)])
def test_what_is_no_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(ChatError, match="chat template"):
        ChatTemplate(source)


def test_a_template_may_not_write_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MAX_PROMPT", 1000)
    assert len(ChatTemplate("{% for i in range(100) %}0123456789{% endfor %}").render(HELLO)) == 1000
    with pytest.raises(ChatError, match="more than 1000 characters"):
        ChatTemplate("{% for i in range(101) %}0123456789{% endfor %}").render(HELLO)


def test_a_message_is_data_not_a_template() -> None:
    assert "{{ 7 * 7 }}" in ChatTemplate(CHAT_TEMPLATE).render([ChatMessage("user", "{{ 7 * 7 }}")])


def test_no_messages_are_refused() -> None:
    with pytest.raises(ChatError, match="at least one message"):
        ChatTemplate(CHAT_TEMPLATE).render([])


def test_a_chat_is_encoded_with_its_control_tokens(tmp_path: Path) -> None:
    model = GgufModel(tiny_gguf(tmp_path / "tiny.gguf"), vocabulary_only=True)
    assert encode_chat(model, HELLO).count(END) == 2
    model.close()


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(ChatError, match="has no chat template"):
        encode_chat(WordCodec(("a", "b")), HELLO)


@pytest.mark.models
def test_the_real_template_renders_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared("target"))
    model = GgufModel(prepared("Q4_0.gguf"), vocabulary_only=True)
    for messages in (HELLO, HELLO[1:]):
        plain = [{"role": message.role, "content": message.content} for message in messages]
        expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        assert encode_chat(model, messages) == expected
    model.close()
