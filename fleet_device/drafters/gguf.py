"""GGUF file as a device uses it: its identity, its vocabulary and its text side.

With `vocabulary_only` the weights stay on disk: that is all that drafting by prompt lookup needs.
"""

import functools

from fleet_common.llama.gguf_file import GgufFile
from fleet_device.drafters.contract import DrafterError


class GgufModel(GgufFile):
    """A draft model's file; `GgufFile` with a text side, as `TextCodec` has it, whose errors are `DrafterError`s.

    The text side may be used from several threads at once.
    """

    error = DrafterError

    @property
    def chat_template(self) -> str | None:
        raw = self._library.llama_model_chat_template(self.handle, None)
        return raw.decode("utf-8", "replace") if raw else None

    @functools.cached_property
    def control_texts(self) -> tuple[str, ...]:
        """Strings that are read as control tokens, as llama.cpp finds them.

        Files differ in how they mark the tokens that part the turns of a chat, so that those which the template itself
        writes count too; whitespace that has a token of its own does not.
        """
        library, template = self._library, self.chat_template or ""
        control = library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_UNKNOWN
        texts: set[str] = set()
        for token in range(self.vocabulary.size):
            attributes = library.llama_vocab_get_attr(self._vocab, token)
            if not attributes & (control | library.LLAMA_TOKEN_ATTR_USER_DEFINED):
                continue
            text = self.stored_text(token)
            if text and (attributes & control or (text in template and any(map(str.isalnum, text)))):
                texts.add(text)
        return tuple(sorted(texts))

    def special_text(self, name: str) -> str:
        """Return the text of the `bos` or `eos` token, empty if there is none."""
        find = {"bos": self._library.llama_vocab_bos, "eos": self._library.llama_vocab_eos}[name]
        token = find(self._vocab)
        return self.stored_text(token) if token >= 0 else ""

    def stored_text(self, token: int) -> str:
        """Return the string that the file has for a token, control tokens among them."""
        return self._stored(token).decode("utf-8", "replace")
