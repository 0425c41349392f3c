"""GGUF file opened by llama.cpp: its identity, its vocabulary and its text side.

With `vocabulary_only` the weights stay on disk: that is all that drafting by prompt lookup needs.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.llama_library import library, native_reason
from schemas.vocabulary import MAX_VOCABULARY, Vocabulary, token_strings

__all__ = ["GgufModel"]

_MAGIC = b"GGUF"
_GUESSED = 1024  # llama.cpp's bit for a file type that the file does not state
_PIECE_BYTES = 256


class GgufModel:
    """A model file. Not for use from several threads at once.

    Args:
        path: The file.
        vocabulary_only: Leave the weights on disk.
        gpu_layers: How many layers to put on a GPU, where llama.cpp was built for one.

    Attributes:
        path: The file.
        rows: Rows of logits, padding among them.
        vocabulary: Size and fingerprint, padding rows left out.

    Raises:
        DrafterError: The file is missing, is no GGUF, is damaged, or has no vocabulary.
    """

    def __init__(self, path: Path, *, vocabulary_only: bool = False, gpu_layers: int = 0) -> None:
        _require_gguf(path)
        self._library = library()
        self.path = path
        parameters = self._library.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        parameters.n_gpu_layers = gpu_layers
        native_reason()  # what was said before is none of this file's
        self._handle = self._library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._handle:
            raise DrafterError(f"llama.cpp cannot load {path}: {native_reason()}.")
        self.rows: int = self._library.llama_vocab_n_tokens(self._vocab)
        try:
            self.vocabulary = self._read_vocabulary()
        except DrafterError:
            self.close()
            raise
        self._pieces: dict[int, bytes] = {}

    @property
    def handle(self) -> Any:  # noqa: ANN401 - a native pointer
        """llama.cpp's model.

        Raises:
            DrafterError: It is closed; the native library would crash.
        """
        if not self._handle:
            raise DrafterError(f"The model {self.path} is closed.")
        return self._handle

    @property
    def _vocab(self) -> Any:  # noqa: ANN401
        return self._library.llama_model_get_vocab(self.handle)

    @property
    def quantization(self) -> str:
        """The file type in llama.cpp's words, such as Q4_0."""
        kind = self._library.llama_model_ftype(self.handle) & ~_GUESSED
        for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
            for constant, value in vars(self._library).items():
                if constant.startswith(prefix) and value == kind:
                    return str(constant.removeprefix(prefix))
        return f"type {kind}"

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """All ids that end a text or a turn, as llama.cpp finds them."""
        is_end, vocab = self._library.llama_vocab_is_eog, self._vocab
        return tuple(token for token in range(self.vocabulary.size) if is_end(vocab, token))

    @property
    def chat_template(self) -> str | None:
        """The file's own chat template."""
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
            text = self._stored(token).decode("utf-8", "replace")
            if text and (attributes & control or (text in template and any(map(str.isalnum, text)))):
                texts.add(text)
        return tuple(sorted(texts))

    def special_text(self, name: str) -> str:
        """Return the text of the `bos` or `eos` token, empty if there is none."""
        find = {"bos": self._library.llama_vocab_bos, "eos": self._library.llama_vocab_eos}[name]
        token = find(self._vocab)
        return self._stored(token).decode("utf-8", "replace") if token >= 0 else ""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; see `TextCodec`."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # a token has at least a byte; the rest is for those that are added
        while True:
            tokens = (self._library.llama_token * room)()
            count = self._library.llama_tokenize(self._vocab, raw, len(raw), tokens, room, not special, special)
            if count >= 0:
                return list(tokens[:count])
            if -count <= room:
                raise DrafterError(f"A text of {len(raw)} bytes is too long to tokenize.")
            room = -count

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; see `TextCodec`."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._read_piece(token)
        return found

    def close(self) -> None:
        """Free the native memory."""
        if self._handle:
            self._library.llama_model_free(self._handle)
            self._handle = None

    def _read_piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocabulary.size:
            raise DrafterError(f"Token {token} is outside the vocabulary of {self.path.name}.")
        room = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            count: int = self._library.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)  # noqa: FBT003
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def _stored(self, token: int) -> bytes:
        """Return the string of a token, as llama.cpp has read it from the file."""
        return self._library.llama_vocab_get_text(self._vocab, token) or b""

    def _read_vocabulary(self) -> Vocabulary:
        """Fingerprint the vocabulary: 49,152 tokens take some 50 ms, so nothing is cached on disk."""
        kind = self._library.llama_vocab_type(self._vocab)
        if kind == self._library.LLAMA_VOCAB_TYPE_NONE or self.rows == 0:
            raise DrafterError(f"{self.path} has no vocabulary; convert the model together with its tokenizer.")
        if self.rows > MAX_VOCABULARY:
            raise DrafterError(f"{self.path} has {self.rows} tokens; at most {MAX_VOCABULARY} are supported.")
        strings = token_strings(self._stored(row).decode("utf-8", "surrogateescape") for row in range(self.rows))
        if len(strings) < 2:  # noqa: PLR2004 - a vocabulary offers a choice
            raise DrafterError(f"{self.path} has no vocabulary but padding; convert the model again.")
        return Vocabulary.of(strings)


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except FileNotFoundError:
        raise DrafterError(f"The model file {path} does not exist; check the configuration key 'model'.") from None
    except OSError as error:
        raise DrafterError(f"The model file {path} cannot be read: {error.strerror or error}.") from error
    if magic != _MAGIC:
        raise DrafterError(f"{path} is not a GGUF file; convert the model, or fetch one that is.")
