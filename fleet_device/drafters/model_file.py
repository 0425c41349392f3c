"""Draft model files: the forms of the setting `model`, the file's text side, memory, and the drafter to load.

Three forms of `model`::

    /data/models/draft.gguf                          a file
    owner/name:file.gguf, owner/name:*q4_0.gguf      a file of a Hugging Face repository, by name or pattern
    smollm2-135m:Q4_0, smollm2-135m                  smollm2-135m/Q4_0.gguf in `models_dir`, or the only file there

A new drafter is a module with a `load` function, and a line in `DRAFTERS` of the settings. Its module is only imported
when it is loaded, so that a machine needs no library but those of the drafter that it uses.
"""

import fnmatch
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Final

from fleet_common.host import available_memory
from fleet_common.llama import GgufFile
from fleet_device.drafters.contract import Drafter, DrafterError, ModelNotFound
from fleet_device.settings import DRAFTERS, DeviceSettings

if TYPE_CHECKING:
    from fleet_device.drafters.hugging_face import HuggingFace


class GgufModel(GgufFile):
    """A draft model's file: `GgufFile` with the text side of `TextCodec`, whose errors are `DrafterError`s.

    With `vocabulary_only` the weights stay on disk. The text side may be used from several threads at once.
    """

    error = DrafterError

    @property
    def chat_template(self) -> str | None:
        raw = self._library.llama_model_chat_template(self.handle, None)
        return raw.decode("utf-8", "replace") if raw else None

    @functools.cached_property
    def control_texts(self) -> tuple[str, ...]:
        """Strings that are read as control tokens in chats of the file's own template."""
        return self.control_texts_with(self.chat_template or "")

    def control_texts_with(self, template: str) -> tuple[str, ...]:
        """Return the strings that are read as control tokens, as llama.cpp finds them.

        Files differ in how they mark the tokens between the turns of a chat, so those that the template itself contains
        count too, except whitespace tokens.
        """
        library = self._library
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
        find = {"bos": self._library.llama_vocab_bos, "eos": self._library.llama_vocab_eos}[name]
        token = find(self._vocab)
        return self.stored_text(token) if token >= 0 else ""

    def stored_text(self, token: int) -> str:
        return self._stored(token).decode("utf-8", "replace")


_LOCAL = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(?::(?P<quantization>\w+))?")
_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<pattern>[^:]+)")
_QUANTIZATION = re.compile(r"(i?q\d|tq\d|b?f16|f32)\w*", re.IGNORECASE)
_SHARD = re.compile(r"-(?P<part>\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A draft model on this machine; `name` is for the log."""

    path: Path
    name: str


def locate_model(model: str, *, folder: Path, hub: Callable[[], "HuggingFace"] | None = None) -> LocatedModel:
    """Find the file that the setting `model` names, in one of the three forms above.

    Only the second form calls `hub`. Raise ModelNotFound with the reason, and what to do.
    """
    text = model.strip()
    if not text:
        raise ModelNotFound(
            "No draft model is configured; name a .gguf file, owner/name:file.gguf, or a model in "
            "models_dir such as smollm2-135m:Q4_0."
        )
    path = Path(text).expanduser()
    if path.is_file():
        return LocatedModel(path, name_of_file(path))
    if match := _REPOSITORY.fullmatch(text):
        return _from_hub(match["repository"], match["pattern"], (hub or hugging_face)())
    if os.sep in text or text.lower().endswith(".gguf"):
        what = "is a folder, not a GGUF file" if path.is_dir() else "does not exist"
        raise ModelNotFound(f"The draft model {path} {what}; check the configuration key 'model'.")
    if match := _LOCAL.fullmatch(text):
        return _local(match["name"], match["quantization"], folder)
    raise ModelNotFound(
        f"{text!r} names no draft model; give a .gguf file, owner/name:file.gguf, or a model in models_dir "
        "such as smollm2-135m:Q4_0."
    )


def name_of_file(path: Path) -> str:
    """Return a model's name: its file's, or its folder's if the file is named by the quantization."""
    return path.absolute().parent.name if _QUANTIZATION.fullmatch(path.stem) else path.stem


def _local(name: str, quantization: str | None, folder: Path) -> LocatedModel:
    drafts = sorted((folder / name).glob("*.gguf"))
    if not drafts:
        raise ModelNotFound(
            f"There is no model {name} in {folder.absolute()}; name another folder as models_dir, or run "
            "`python -m fleet_admin.models.smollm2`, which makes the demo's models in ./models."
        )
    names = [draft.stem for draft in drafts]
    if quantization is None:
        if len(drafts) == 1:
            return LocatedModel(drafts[0], name)
        raise ModelNotFound(
            f"The model {name} has several quantizations; add one, such as {name}:{names[0]} "
            f"(there are {', '.join(names)})."
        )
    for draft in drafts:
        if draft.stem.lower() == quantization.lower():
            return LocatedModel(draft, name)
    raise ModelNotFound(f"The model {name} has no quantization {quantization}; there are {', '.join(names)}.")


def _from_hub(repository: str, pattern: str, hub: "HuggingFace") -> LocatedModel:
    name = repository.rsplit("/", 1)[1]
    if not any(character in pattern for character in "*?["):
        return LocatedModel(hub.fetch(repository, pattern), name)
    files = [file for file in hub.files(repository) if fnmatch.fnmatchcase(file.lower(), pattern.lower())]
    files = [file for file in files if file.lower().endswith(".gguf")]
    # Of a model in several files llama.cpp opens the first and finds the others in its folder.
    shards = [match for file in files if (match := _SHARD.search(file))]
    if files and len(shards) == len(files) and len({_SHARD.sub("", file) for file in files}) == 1:
        fetched = [hub.fetch(repository, file) for file in sorted(files)]
        return LocatedModel(fetched[0], name)
    if len(files) == 1:
        return LocatedModel(hub.fetch(repository, files[0]), name)
    if not files:
        raise ModelNotFound(f"No GGUF file of {repository} matches {pattern!r}; look at its list of files.")
    raise ModelNotFound(
        f"Several files of {repository} match {pattern!r} ({', '.join(sorted(files)[:4])}); name one of them."
    )


def hugging_face() -> "HuggingFace":
    """Return the client of the Hugging Face hub."""
    from fleet_device.drafters.hugging_face import HuggingFace  # noqa: PLC0415 - takes a while, and few models need it

    return HuggingFace()


MIN_CONTEXT: Final = 64

_SMALLEST_BATCH: Final = 32
_BATCH_SHARE: Final = 4
"""Fraction of the budget that buffers may take, if a smaller batch helps: it makes long prompts slower."""

_FREE_SHARE: Final = 2
"""Fraction of the free memory that a device takes by default: other programs need some too."""

_SMALL_KEYS: Final = (34 / 32 + 2) / (2 + 2)
"""Size of keys in q8_0 (34 bytes for 32) and values in float16, relative to both in float16. Values in q8_0 would need
flash attention, which is slow on a CPU."""

_MEGA: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model that decide on its memory: bytes of a token's keys and values in float16, and dimensions."""

    token_kv_bytes: int
    rows: int
    width: int
    heads: int
    key_width: int


@dataclass(frozen=True, slots=True)
class ContextMemory:
    """Sizes of a context, in tokens: of each sequence, of a batch, and of kept copies of earlier sequences.

    `small_keys` keeps keys in q8_0; `needed` is in bytes, without the copies.
    """

    context: int
    batch: int
    small_keys: bool
    kept: int
    needed: int


def automatic_budget(free: int | None, file_bytes: int) -> int | None:
    """Return the default budget: half of the free bytes beyond the model's file; None where these are unknown."""
    return None if free is None else max(0, free - file_bytes) // _FREE_SHARE


def fit_memory(
    sizes: ModelSizes | GgufModel, *, context: int, batch: int, sequences: int, budget: int | None
) -> ContextMemory:
    """Return the largest context up to the requested one, and the largest batch, that fit into the budget.

    Keys, values, llama.cpp's buffers and the copies of earlier sequences count. The weights do not: they are mapped
    from their file. If the whole context does not fit, keys are kept in half the size, if the model allows that.
    """
    batch = min(batch, context)
    if budget is None:
        return _memory_of(sizes, context, batch, sequences, small_keys=False, budget=None)
    while batch > _SMALLEST_BATCH and _batch_bytes(sizes, batch) * _BATCH_SHARE > budget:
        batch = max(_SMALLEST_BATCH, batch // 2)
    fitting = _fitting(sizes, batch, sequences, budget=budget, small_keys=False)
    small_keys = fitting < context and sizes.key_width % 32 == 0
    if small_keys:
        fitting = _fitting(sizes, batch, sequences, budget=budget, small_keys=True)
    if fitting < min(context, MIN_CONTEXT):
        least = _memory_of(
            sizes, min(context, MIN_CONTEXT), batch, sequences, small_keys=small_keys, budget=budget
        ).needed
        several, fewer = "", ""
        if sequences > 1:
            several, fewer = f" for each of {sequences} sequences", f"set 'requests_at_once' below {sequences}, "
        raise DrafterError(
            f"The draft model needs {least / _MEGA:,.0f} MB of memory for a context of {min(context, MIN_CONTEXT)} "
            f"tokens{several}, and may take {budget / _MEGA:,.0f} MB; raise 'memory_mb', {fewer}or "
            'draft without a model (drafter = "suffix" or "none").'
        )
    return _memory_of(sizes, min(context, fitting), batch, sequences, small_keys=small_keys, budget=budget)


def _batch_bytes(sizes: ModelSizes | GgufModel, batch: int) -> int:
    return batch * (4 * sizes.rows + 16 * sizes.width)


def _token_bytes(sizes: ModelSizes | GgufModel, *, small_keys: bool) -> float:
    return sizes.token_kv_bytes * (_SMALL_KEYS if small_keys else 1.0)


def _fitting(sizes: ModelSizes | GgufModel, batch: int, sequences: int, *, budget: int, small_keys: bool) -> int:
    left = budget - _batch_bytes(sizes, batch)
    # Scores of a batch over one sequence are computed in a buffer too.
    each = sequences * _token_bytes(sizes, small_keys=small_keys) + 4 * batch * sizes.heads
    return max(0, int(left / each))


def _memory_of(
    sizes: ModelSizes | GgufModel, context: int, batch: int, sequences: int, *, small_keys: bool, budget: int | None
) -> ContextMemory:
    token = _token_bytes(sizes, small_keys=small_keys)
    buffers = _batch_bytes(sizes, batch) + batch * 4 * sizes.heads * context
    needed = int(sequences * context * token) + buffers
    kept = context if budget is None else min(context, max(0, int((budget - needed) / token)))
    return ContextMemory(context, min(batch, context), small_keys, kept, needed)


def require_truncatable(model: GgufModel) -> None:
    """Raise DrafterError for a model with nothing but a running state, or one that is no decoder."""
    kind = model.unlike_a_decoder
    if kind is not None and not model.is_hybrid:
        raise DrafterError(
            f"{model.path} is a model of the {kind} kind, which cannot remove tokens; choose a "
            "transformer decoder, or a hybrid of both, as draft model."
        )


def require_memory(model: GgufModel, context: int, *, sequences: int = 1) -> None:
    """Raise DrafterError for a context whose keys and values do not fit, before the system kills the process."""
    needed = sequences * context * model.token_kv_bytes
    free = available_memory()
    if free is not None and needed > free:
        raise DrafterError(
            f"A context of {context} tokens for {model.path} needs {needed / _MEGA:,.0f} MB of memory, "
            f"{free / _MEGA:,.0f} MB are free; set a smaller context."
            if sequences == 1
            else f"{sequences} contexts of {context} tokens for {model.path} need {needed / _MEGA:,.0f} MB of memory, "
            f"{free / _MEGA:,.0f} MB are free; set 'requests_at_once' below {sequences}, or a smaller context."
        )


def load_drafter(settings: DeviceSettings) -> Drafter:
    drafter: Drafter = resolve_name(DRAFTERS[settings.drafter])(settings)
    if settings.target_vocabulary is not None:
        drafter = resolve_name("fleet_device.drafters.unlike:wrap")(drafter, settings)
    if settings.suffix:
        drafter = resolve_name("fleet_device.drafters.suffix:with_suffix")(drafter)
    return drafter
