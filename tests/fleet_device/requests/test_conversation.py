"""A conversation's next turn begins with the very tokens of the last, where it is certain that they say the same."""

import pytest

from fleet_device.requests.chat import ConversationCodec

END, TURN = 0, 1
WORDS = {END: "<end>", TURN: "<turn>", 2: "a", 3: "b", 4: "ab", 5: "é", 6: " ", 8: "b "}


class PairsFirst:
    """A vocabulary that has two spellings of `ab`, of which its tokenizer knows one."""

    end_tokens = (END,)
    chat_template = None
    control_texts = ("<end>", "<turn>")

    def special_text(self, name: str) -> str:
        return {"eos": "<end>"}.get(name, "")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        tokens = []
        while text:
            known = [4, 2, 3, 5, 6, *((END, TURN) if special else ())]
            token = next(each for each in known if text.startswith(WORDS[each]))
            text = text[len(WORDS[token]) :]
            tokens.append(token)
        return tokens

    def piece(self, token: int) -> bytes:
        return b"" if token in (END, TURN) else b"\xc3" if token == 7 else WORDS[token].encode()


def codec() -> ConversationCodec:
    return ConversationCodec(PairsFirst())


def test_the_next_turn_begins_with_the_tokens_that_were_written() -> None:
    codec_ = codec()
    prompt = codec_.encode("<turn>ab<turn>", special=True)
    assert prompt == [1, 4, 1]
    codec_.remember(prompt, "abab", [2, 3, 4, END])
    second = codec_.encode("<turn>ab<turn>abab<end><turn>b<turn>", special=True)
    assert second == [1, 4, 1, 2, 3, 4, END, 1, 3, 1]
    codec_.remember(second, "ab", [2, 3])
    third = codec_.encode("<turn>ab<turn>abab<end><turn>b<turn>ab<end><turn>a<turn>", special=True)
    assert third == [*second, 2, 3, END, 1, 2, 1]


@pytest.mark.parametrize(
    ("text", "written", "kept"),
    [
        ("ab  ", [2, 3, 6, 6], [2, 3]),
        ("ab ", [2, 3, 6, END], [2, 3]),
        ("a b", [2, 6, 3], None),
        ("ab ", [2, 8], None),  # the last token is "b ": it cannot be told apart
    ],
)
def test_white_space_at_the_end_that_the_next_turn_leaves_out_costs_nothing(
    text: str, written: list[int], kept: list[int] | None
) -> None:
    codec_ = codec()
    codec_.remember(codec_.encode("<turn>a<turn>", special=True), text, written)
    then = codec_.encode(f"<turn>a<turn>{text.rstrip()}<end><turn>b", special=True)
    again = PairsFirst().encode(text.rstrip())
    middle = kept or (written if text == text.rstrip() else again)
    assert then == [TURN, 2, TURN, *middle, END, TURN, 3]
    whole = codec_.encode(f"<turn>a<turn>{text}<end>", special=True)
    assert whole == [TURN, 2, TURN, *(token for token in written if token != END), END], "nor does it where it stands"


def test_conversations_may_take_turns() -> None:
    codec_ = codec()
    for number in range(3):
        user = "a" * (number + 1)
        codec_.remember(codec_.encode(f"<turn>{user}<turn>", special=True), "ab", [2, 3, END])
    for number in range(3):
        user = "a" * (number + 1)
        tokens = codec_.encode(f"<turn>{user}<turn>ab<end>", special=True)
        assert tokens == [1, *[2] * len(user), 1, 2, 3, END]


@pytest.mark.parametrize(
    ("text", "tokens", "then", "why"),
    [
        ("ab", [2, 3], "<turn>a<turn>ab", "nothing parts the text from what comes behind it"),
        ("ab", [2, 3], "<turn>a<turn>abb<end>", "it goes on otherwise"),
        ("ab", [2, 3], "<turn>a<turn>ba<end>", "it is another text"),
        ("ab", [2, 1, 3], "<turn>a<turn>ab<end>", "a control token was written, which is in no text"),
        ("ab", [2, 3, 7], "<turn>a<turn>ab<end>", "the text ends within a character"),
        ("ab", [2, 3, 6, 6], "<turn>a<turn>ab<end>", "a stop string is not part of the text"),
    ],
)
def test_where_it_is_not_certain_that_they_say_the_same_all_is_encoded_anew(
    text: str, tokens: list[int], then: str, why: str
) -> None:
    codec_ = codec()
    codec_.remember(codec_.encode("<turn>a<turn>", special=True), text, tokens)
    assert codec_.encode(then, special=True) == PairsFirst().encode(then, special=True), why


def test_a_text_that_is_no_chat_is_encoded_anew() -> None:
    codec_ = codec()
    codec_.remember(codec_.encode("<turn>a<turn>", special=True), "ab", [2, 3])
    codec_.remember([1, 2, 3, 4], "ab", [2, 3])
    assert codec_.encode("abab") == [4, 4]
    assert codec_.encode("<turn>b<turn>ab<end>", special=True) == [1, 3, 1, 4, END]


def test_all_else_is_the_vocabulary_s() -> None:
    codec_ = codec()
    assert (codec_.end_tokens, codec_.chat_template, codec_.control_texts) == ((END,), None, ("<end>", "<turn>"))
    assert (codec_.special_text("eos"), codec_.piece(4)) == ("<end>", b"ab")
