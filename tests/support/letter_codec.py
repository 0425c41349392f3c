"""A codec whose tokens are characters, with any chat template; those above 0x10FFFF are the given control tokens."""

from collections.abc import Sequence

_CONTROL = 0x110000


class LetterCodec:
    end_tokens = (0,)

    def __init__(self, chat_template: str, control_texts: Sequence[str] = ()) -> None:
        self.chat_template: str | None = chat_template
        self.control_texts = tuple(control_texts)

    def special_text(self, _name: str) -> str:
        return ""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        found = list[int]()
        while text:
            control = next((each for each in self.control_texts if special and text.startswith(each)), None)
            found.append(ord(text[0]) if control is None else _CONTROL + self.control_texts.index(control))
            text = text[len(control or text[0]) :]
        return found

    def piece(self, token: int) -> bytes:
        return b"" if token >= _CONTROL or token in self.end_tokens else chr(token).encode()


def in_pieces(text: str) -> list[list[int]]:
    """Return the tokens of `text` in batches of three."""
    return [[*map(ord, text[at : at + 3])] for at in range(0, len(text), 3)]
