"""GGUF file opened by llama.cpp: what the model is, and its vocabulary.

With `vocabulary_only` the weights stay on disk.
"""

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Final

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.llama.errors import LlamaError
from fleet_common.llama.library import library, native_reason
from fleet_common.llama.thread import NativeThread
from schemas.errors import FleetError
from schemas.vocabulary import MAX_VOCABULARY, Vocabulary, token_strings

_MAGIC: Final = b"GGUF"
_GUESSED: Final = 1024  # llama.cpp's bit for a file type that the file does not state
_METADATA_BYTES: Final = 128
_FLOAT16: Final = 2

_LONG_RUN: Final = re.compile(r"\S{8192}|\s{8192}")
"""A run that llama.cpp is given apart from what follows. It splits text of some vocabularies with a recursive regular
expression, which overflows a stack of 8 MiB at a run of 16,000 to 32,000 characters."""

_PIECE_BYTES: Final = 256


class GgufFile:
    """A model file. Not for use from several threads at once.

    Args:
        path: The file.
        vocabulary_only: Leave the weights on disk.
        gpu_layers: How many layers to put on a GPU, where llama.cpp was built for one; -1 for all.

    Attributes:
        error: What is raised; a package that opens files may have its own.
        key: Of the setting that names the file.
        path: The file.
        thread: Where all computing with the model is to be done; it was loaded there.
        on_gpu: Whether layers are put on a GPU.
        rows: Rows of logits, padding among them.
        vocabulary: Size and fingerprint, padding rows left out.

    Raises:
        FleetError: An `error`: llama.cpp is not installed, or the file is missing, is no GGUF, is damaged, or has no
            vocabulary.
    """

    error: ClassVar[type[FleetError]] = LlamaError
    key: ClassVar[str] = "model"

    def __init__(self, path: Path, *, vocabulary_only: bool = False, gpu_layers: int = 0) -> None:
        self._require_gguf(path)
        try:
            self._library = library()
        except LlamaError as error:
            raise self.error(str(error)) from None
        self.path = path
        parameters = self._library.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        parameters.n_gpu_layers = gpu_layers
        native_reason()  # what was said before is none of this file's
        self.thread = NativeThread()
        load = self._library.llama_model_load_from_file
        self._handle = self.thread.call(load, os.fsencode(path), parameters)
        if not self._handle:
            self.thread.close()
            raise self.error(f"llama.cpp cannot load {path}: {native_reason()}; fetch it again, or choose another.")
        self.on_gpu = gpu_layers != 0 and bool(self._library.llama_supports_gpu_offload())
        self.rows: int = self._library.llama_vocab_n_tokens(self._vocab)
        try:
            self.vocabulary = self._read_vocabulary()
        except FleetError:
            self.close()
            raise

    @property
    def handle(self) -> Any:  # noqa: ANN401 - a native pointer
        """llama.cpp's model.

        Raises:
            FleetError: It is closed; the native library would crash.
        """
        if not self._handle:
            raise self.error(f"The model {self.path} is closed.")
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

    @property
    def context(self) -> int:
        """Tokens of context that the model was trained for; 0 where the file does not say."""
        return int(max(0, self._library.llama_model_n_ctx_train(self.handle)))

    @property
    def heads(self) -> int:
        """Heads of queries of a layer."""
        return int(max(1, self._library.llama_model_n_head(self.handle)))

    @property
    def window(self) -> int:
        """Tokens that a layer with a sliding window looks back; 0 where there is none."""
        return int(max(0, self._library.llama_model_n_swa(self.handle)))

    @property
    def unlike_a_decoder(self) -> str | None:
        """The kind of a model that takes no tokens back, since it keeps a running state or is no decoder; else None."""
        kinds = {
            "recurrent": self._library.llama_model_is_recurrent,
            "hybrid recurrent": self._library.llama_model_is_hybrid,
            "diffusion": self._library.llama_model_is_diffusion,
            "encoder": self._library.llama_model_has_encoder,
        }
        return next((kind for kind, applies in kinds.items() if applies(self.handle)), None)

    @property
    def width(self) -> int:
        return int(self._library.llama_model_n_embd(self.handle))

    @property
    def key_width(self) -> int:
        return self._number("attention.key_length") or self.width // self.heads

    @property
    def token_kv_bytes(self) -> int:
        """Bytes of a token's keys and values in float16, all layers; an upper bound where layers differ."""
        native, handle = self._library, self.handle
        heads = max(native.llama_model_n_head(handle), 1)
        dim = native.llama_model_n_embd(handle) // heads
        keys = self._number("attention.key_length") or dim
        values = self._number("attention.value_length") or dim
        return int(
            native.llama_model_n_layer(handle) * native.llama_model_n_head_kv(handle) * (keys + values) * _FLOAT16
        )

    @property
    def strings(self) -> list[str]:
        """The token strings by id, padding left out."""
        return token_strings(self._stored(row).decode("utf-8", "surrogateescape") for row in range(self.rows))

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """All ids that end a text or a turn, as llama.cpp finds them."""
        is_end, vocab = self._library.llama_vocab_is_eog, self._vocab
        return tuple(token for token in range(self.vocabulary.size) if is_end(vocab, token))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text. Callable on any thread.

        Args:
            text: Any.
            special: Whether control tokens are recognised in it, and none is put before it.
        """
        begin, found = 0, list[int]()
        for end in [*(run.end() for run in _LONG_RUN.finditer(text)), len(text)]:
            if begin < end or not text:
                found += self._encode(text[begin:end], begins=not begin and not special, special=special)
            begin = end
        return found

    def _encode(self, text: str, *, begins: bool, special: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # a token has at least a byte; the rest is for those that are added
        while True:
            tokens = (self._library.llama_token * room)()
            count = self._library.llama_tokenize(self._vocab, raw, len(raw), tokens, room, begins, special)
            if count >= 0:
                return list(tokens[:count])
            if -count <= room:
                raise self.error(f"A text of {len(raw)} bytes is too long to tokenize.")
            room = -count

    def piece(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, maybe half a character; nothing for control tokens. From any thread."""
        if not 0 <= token < self.vocabulary.size:
            raise self.error(f"Token {token} is outside the vocabulary of {self.path.name}.")
        room = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)  # one for each call: several texts are written at once
            count: int = self._library.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)  # noqa: FBT003
            if count >= 0:
                return ctypes.string_at(buffer, count)
            room = -count

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary for grammars. Callable on any thread.

        Raises:
            GrammarUnavailable: llguidance is not installed.
        """
        pieces = [self.piece(token) for token in range(self.vocabulary.size)]
        return GrammarTokenizer.of_pieces(pieces, end_tokens=self.end_tokens, encode=self.encode)

    def close(self) -> None:
        if self._handle:
            self.thread.close()
            self._library.llama_model_free(self._handle)
            self._handle = None

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(_METADATA_BYTES)
        length = self._library.llama_model_meta_val_str(self.handle, key.encode(), buffer, _METADATA_BYTES)
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None

    def _number(self, key: str) -> int | None:
        """Return a number that the file states under its architecture's name."""
        text = self._metadata(f"{self._metadata('general.architecture')}.{key}")
        return int(text) if text and text.isascii() and text.isdigit() else None

    def _stored(self, token: int) -> bytes:
        """Return the string of a token, as llama.cpp has read it from the file."""
        return self._library.llama_vocab_get_text(self._vocab, token) or b""

    def _read_vocabulary(self) -> Vocabulary:
        """Fingerprint the vocabulary: 49,152 tokens take some 50 ms, so nothing is cached on disk."""
        kind = self._library.llama_vocab_type(self._vocab)
        if kind == self._library.LLAMA_VOCAB_TYPE_NONE or self.rows == 0:
            raise self.error(f"{self.path} has no vocabulary; convert the model together with its tokenizer.")
        if self.rows > MAX_VOCABULARY:
            raise self.error(f"{self.path} has {self.rows} tokens; at most {MAX_VOCABULARY} are supported.")
        strings = self.strings
        if len(strings) < 2:  # noqa: PLR2004 - a vocabulary offers a choice
            raise self.error(f"{self.path} has no vocabulary but padding; convert the model again.")
        return Vocabulary.of(strings)

    def _require_gguf(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                magic = file.read(len(_MAGIC))
        except FileNotFoundError:
            raise self.error(
                f"The model file {path} does not exist; check the configuration key {self.key!r}."
            ) from None
        except OSError as error:
            raise self.error(f"The model file {path} cannot be read: {error.strerror or error}.") from error
        if magic != _MAGIC:
            raise self.error(f"{path} is not a GGUF file; convert the model, or fetch one that is.")
