"""llama.cpp's native library, the thread that calls it, and GGUF files, as both ends use them."""

import ctypes
import functools
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar, Final, ParamSpec, TypeVar

from fleet_common.extras import install_command
from fleet_common.gguf_files import read_header
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.errors import FleetError
from schemas.fields import MAX_VOCABULARY
from schemas.vocabulary import Vocabulary, token_strings

_log = logging.getLogger(__name__)


class LlamaError(FleetError):
    """llama.cpp is not installed, or a model file cannot be used. The message is one sentence for the user."""


_ERROR = 4
_log = logging.getLogger("fleet_common.llama_cpp")
_complaints: Final[deque[str]] = deque(maxlen=16)


@functools.cache
def library() -> Any:  # noqa: ANN401 - the binding is untyped
    """Return the module `llama_cpp`, which logs to Python at debug level; raise LlamaError if it is unusable."""
    try:
        import llama_cpp  # noqa: PLC0415 - what does without llama.cpp may lack it
    except ImportError:
        raise LlamaError(
            "Drafting, and an edge's engine llama.cpp, need llama-cpp-python; install it with: "
            f"{install_command('device')}"
        ) from None
    except RuntimeError as error:
        raise LlamaError(
            f"llama.cpp cannot be loaded ({error}): install what is missing (libgomp1 on Debian), or a wheel that was "
            "built on a system as old as this one."
        ) from error
    if not hasattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_ENABLED"):
        # Older structures would silently ignore our settings.
        raise LlamaError(
            f"llama-cpp-python {llama_cpp.__version__} is too old; upgrade it with: "
            "pip install -U 'llama-cpp-python>=0.3.30'"
        )
    # The callback must outlive the library's use of it: the module holds it.
    llama_cpp.fleet_log_callback = llama_cpp.llama_log_callback(_on_log)
    llama_cpp.llama_log_set(llama_cpp.fleet_log_callback, ctypes.c_void_p(0))
    _load_kernels(llama_cpp.llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


def _load_kernels(binding: Any) -> None:  # noqa: ANN401 - likewise
    """Load the kernels for this processor, if the package has several (scripts/llama-wheel); otherwise they are there.

    llama.cpp itself looks for them in the folder of the program, which is Python's.
    """
    native, folder = binding._lib, binding._base_path  # noqa: SLF001 - the binding has no function for it
    if native.ggml_backend_reg_count() == 0:
        native.ggml_backend_load_all_from_path(os.fsencode(folder))
    if native.ggml_backend_reg_count() == 0:
        raise LlamaError(
            f"The package llama-cpp-python in {folder} has no kernels for this processor: build it on this machine."
        )


def native_reason() -> str:
    """Return and clear the library's first error message since the last call."""
    reason = _complaints[0] if _complaints else "no reason given"
    _complaints.clear()
    return reason.rstrip(".")


def _on_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    _log.debug("%s", line)
    if level == _ERROR:
        # Without the name of the C function.
        _complaints.append(line.split(": ", 1)[-1].removeprefix("error loading model: "))


_MADV_DONTNEED: Final = 4  # madvise(2); a page of a file that is only read is found in the file again
_MAPS: Final = Path("/proc/self/maps")


def give_back_mapped(path: Path) -> int:
    """Release the pages of a read-only mapped file; return the size of their address ranges in bytes.

    llama.cpp maps a model file and repacks most weights for the processor in separate memory. The pages read for that
    stay with the process, so the weights are there twice. Released pages stay in the page cache while memory is free.
    Does nothing where the system does not list mappings.
    """
    try:
        name, lines = os.path.realpath(path), _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return 0
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    given = 0
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != name or "w" in fields[1]:  # noqa: PLR2004 - proc(5)
            continue
        begin, end = (int(address, 16) for address in fields[0].split("-"))
        if advise(begin, end - begin, _MADV_DONTNEED) == 0:
            given += end - begin
    return given


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class NativeThread:
    """One thread on which a model is loaded and computes.

    llama.cpp's worker threads belong to the calling thread. A second caller, even one that only loads the model, has
    its own. With more workers than cores OpenMP puts them to sleep at each of the hundreds of barriers of a forward
    pass, and a token takes half as long again. Also, torch and llama.cpp clear each other's matrix registers (AMX):
    where an application uses torch in the thread that calls llama.cpp, the next call of llama.cpp is an illegal
    instruction.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")

    def call(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        running = self._pool.submit(function, *args, **kwargs)
        try:
            return running.result()
        finally:
            # A caller that is interrupted (Ctrl-C) must not free or change what is in use.
            wait([running])

    def close(self) -> None:
        self._pool.shutdown()


class FairLock:
    """Lock that is granted in the order of requests.

    The thread that releases a `threading.Lock` may take it again while others wait.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __enter__(self) -> None:
        mine = threading.Event()
        with self._changing:
            if not self._taken:
                self._taken = True
                return
            self._waiting.append(mine)
        try:
            mine.wait()
        except BaseException:  # Ctrl-C while waiting: the next thread must not wait for this one
            with self._changing:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                else:
                    self._hand_on()
            raise

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._taken = False


GGUF_MAGIC: Final = b"GGUF"
_GUESSED: Final = 1024  # llama.cpp's bit for a file type that the file does not state
_METADATA_BYTES: Final = 128
_FLOAT16: Final = 2
_FLOAT32: Final = 4

_LONG_RUN: Final = re.compile(r"\S{8192}|\s{8192}")
"""A run that is tokenized separately. For some vocabularies llama.cpp splits text with a recursive regular expression,
which overflows a stack of 8 MiB at a run of 16,000 to 32,000 characters."""

_PIECE_BYTES: Final = 256


class GgufFile:
    """Model file opened by llama.cpp. Not thread-safe, except where noted.

    Raise the class attribute `error` if llama.cpp is not installed, or the file is missing, not a GGUF, damaged, or has
    no vocabulary.

    Args:
        vocabulary_only: Leave the weights on disk.
        gpu_layers: Number of layers on a GPU, if llama.cpp was built for one; -1 for all.

    Attributes:
        key: Setting that names the file.
        rows: Rows of logits, including padding.
        vocabulary: Size and fingerprint, without padding.
    """

    error: ClassVar[type[FleetError]] = LlamaError
    key: ClassVar[str] = "model"

    def __init__(
        self,
        path: Path,
        *,
        vocabulary_only: bool = False,
        gpu_layers: int = 0,
        on_progress: Callable[[float], None] = lambda _share: None,
    ) -> None:
        self._require_gguf(path)
        try:
            self._library = library()
        except LlamaError as error:
            raise self.error(str(error)) from None
        self.path = path
        parameters = self._library.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        parameters.n_gpu_layers = gpu_layers

        def note_progress(share: float, _data: object) -> bool:
            on_progress(share)
            return True  # go on

        parameters.progress_callback = callback = self._library.llama_progress_callback(note_progress)
        native_reason()  # drop messages about other files
        self.thread = NativeThread()
        load = self._library.llama_model_load_from_file
        self._handle = self.thread.call(load, os.fsencode(path), parameters)
        del callback  # which must live as long as the call
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
        """llama.cpp's model; raises if it is closed, where the native library would crash."""
        if not self._handle:
            raise self.error(f"The model {self.path} is closed.")
        return self._handle

    @property
    def _vocab(self) -> Any:  # noqa: ANN401
        return self._library.llama_model_get_vocab(self.handle)

    @property
    def quantization(self) -> str:
        """File type as llama.cpp names it, such as Q4_0."""
        kind = self._library.llama_model_ftype(self.handle) & ~_GUESSED
        for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
            for constant, value in vars(self._library).items():
                if constant.startswith(prefix) and value == kind:
                    return str(constant.removeprefix(prefix))
        return f"type {kind}"

    @property
    def context(self) -> int:
        """Context length that the model was trained for; 0 if unknown."""
        return int(max(0, self._library.llama_model_n_ctx_train(self.handle)))

    @property
    def heads(self) -> int:
        return int(max(1, self._library.llama_model_n_head(self.handle)))

    @property
    def window(self) -> int:
        """Length of the sliding window; 0 if there is none."""
        return int(max(0, self._library.llama_model_n_swa(self.handle)))

    @property
    def unlike_a_decoder(self) -> str | None:
        """Kind of a model whose tokens cannot be taken back (recurrent state, or no decoder); None for others."""
        kinds = {
            "recurrent": self._library.llama_model_is_recurrent,
            "hybrid recurrent": self._library.llama_model_is_hybrid,
            "diffusion": self._library.llama_model_is_diffusion,
            "encoder": self._library.llama_model_has_encoder,
        }
        return next((kind for kind, applies in kinds.items() if applies(self.handle)), None)

    @property
    def is_hybrid(self) -> bool:
        """Some layers have a running state instead of keys and values."""
        return bool(self._library.llama_model_is_hybrid(self.handle))

    @property
    def width(self) -> int:
        return int(self._library.llama_model_n_embd(self.handle))

    @property
    def key_width(self) -> int:
        return self._number("attention.key_length") or self.width // self.heads

    @property
    def token_kv_bytes(self) -> int:
        """KV cache bytes per token in float16, all layers; an upper bound where layers differ."""
        values = self._number("attention.value_length") or self.width // self.heads
        return sum(self._kv_heads) * (self.key_width + values) * _FLOAT16

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's running state in float32, all layers; 0 without one."""
        if not self.is_hybrid:
            return 0
        sizes = {name: self._number(f"ssm.{name}") or 0 for name in ("inner_size", "state_size", "group_count")}
        inputs = sizes["inner_size"] + 2 * sizes["group_count"] * sizes["state_size"]
        convolution = max(0, (self._number("ssm.conv_kernel") or 1) - 1) * inputs
        convolution += max(0, (self._number("shortconv.l_cache") or 1) - 1) * self.width
        return self._layers * (convolution + sizes["inner_size"] * sizes["state_size"]) * _FLOAT32

    @property
    def _layers(self) -> int:
        return int(self._library.llama_model_n_layer(self.handle))

    @property
    def _kv_heads(self) -> list[int]:
        """Number of the heads of keys of each layer."""
        count = int(self._library.llama_model_n_head_kv(self.handle))
        if not self.is_hybrid:
            return [count] * self._layers
        kind = self._metadata("general.architecture")
        stored = read_header(self.path).metadata.get(f"{kind}.attention.head_count_kv", count)
        if isinstance(stored, list):
            return [int(each) for each in stored]
        every = self._number("full_attention_interval") or 1
        return [int(stored)] * (self._layers // every)

    @property
    def strings(self) -> list[str]:
        return token_strings(self._stored(row).decode("utf-8", "surrogateescape") for row in range(self.rows))

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a generation or a turn."""
        is_end, vocab = self._library.llama_vocab_is_eog, self._vocab
        return tuple(token for token in range(self.vocabulary.size) if is_end(vocab, token))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text, without an initial token. Callable on any thread.

        `special` recognises control tokens.
        """
        begin, found = 0, list[int]()
        for end in [*(run.end() for run in _LONG_RUN.finditer(text)), len(text)]:
            if begin < end or not text:
                found += self._encode(text[begin:end], begins=not begin and not special, special=special)
            begin = end
        return found

    def _encode(self, text: str, *, begins: bool, special: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # a token has at least one byte; some are added
        while True:
            tokens = (self._library.llama_token * room)()
            count = self._library.llama_tokenize(self._vocab, raw, len(raw), tokens, room, begins, special)
            if count >= 0:
                return list(tokens[:count])
            if -count <= room:
                raise self.error(f"A text of {len(raw)} bytes is too long to tokenize.")
            room = -count

    def piece(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, none for control tokens. Callable on any thread."""
        if not 0 <= token < self.vocabulary.size:
            raise self.error(f"Token {token} is outside the vocabulary of {self.path.name}.")
        room = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)  # per call: several requests run at once
            count: int = self._library.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)  # noqa: FBT003
            if count >= 0:
                return ctypes.string_at(buffer, count)
            room = -count

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary for grammars; raise GrammarUnavailable without llguidance. Callable on any thread."""
        pieces = [self.piece(token) for token in range(self.vocabulary.size)]
        return GrammarTokenizer(
            vocabulary=len(pieces), pieces=tuple(pieces), end_tokens=self.end_tokens, encode=self.encode
        )

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
        text = self._metadata(f"{self._metadata('general.architecture')}.{key}")
        return int(text) if text and text.isascii() and text.isdigit() else None

    def _stored(self, token: int) -> bytes:
        return self._library.llama_vocab_get_text(self._vocab, token) or b""

    def _read_vocabulary(self) -> Vocabulary:
        """Fingerprint the vocabulary: 49,152 tokens take about 50 ms, so nothing is cached on disk."""
        kind = self._library.llama_vocab_type(self._vocab)
        if kind == self._library.LLAMA_VOCAB_TYPE_NONE or self.rows == 0:
            raise self.error(f"{self.path} has no vocabulary; convert the model together with its tokenizer.")
        if self.rows > MAX_VOCABULARY:
            raise self.error(f"{self.path} has {self.rows} tokens; at most {MAX_VOCABULARY} are supported.")
        strings = self.strings
        if len(strings) < 2:  # noqa: PLR2004
            raise self.error(f"{self.path} has no vocabulary but padding; convert the model again.")
        return Vocabulary.of(strings)

    def _require_gguf(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                magic = file.read(len(GGUF_MAGIC))
        except FileNotFoundError:
            raise self.error(
                f"The model file {path} does not exist; check the configuration key {self.key!r}."
            ) from None
        except OSError as error:
            raise self.error(f"The model file {path} cannot be read: {error.strerror or error}.") from error
        if magic != GGUF_MAGIC:
            raise self.error(f"{path} is not a GGUF file; convert the model, or fetch one that is.")
