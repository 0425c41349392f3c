"""Check whether a draft model and a target fit, with advice if they do not.

The same tokens do not say that two tokenizers split text alike, so that they are compared on texts.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fleet_admin.models.facts import ModelFacts, ModelFormat, ModelUnreadable, folder_facts, gguf_facts
from fleet_common.checks import Check, CheckStatus
from fleet_device.drafters.contract import DrafterError, ModelNotFound
from fleet_device.drafters.model_file import GgufModel, hugging_face, locate_model
from fleet_device.drafters.unlike import MIN_OVERLAP, CommonTokens
from fleet_device.requests.structured import ChatMessage
from fleet_device.requests.template import ChatError, ChatTemplate
from fleet_edge.verifiers.blocks.kv import PAGE, page_bytes, state_bytes
from fleet_edge.verifiers.blocks_engine import open_weights
from fleet_edge.verifiers.contract import UnsupportedModel

_SHOWN: Final = 6
_CHATS: Final = (
    (("user", "Why?"),),
    (("system", "Be brief."), ("user", "Why?")),
    (("user", "Why?"), ("assistant", "Because."), ("user", "And then?")),
)
"""Chats that templates are compared on."""

_SHOWN_TEXT: Final = 40

_NOON: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)  # some templates contain the time

_BILLION: Final = 1e9

_LARGER: Final = 1.05
"""A model with more weights than this multiple of the target's is no draft model."""


def _fits(aspect: str, sentence: str) -> Check:
    return Check(aspect, CheckStatus.OK, sentence)


def _note(aspect: str, sentence: str) -> Check:
    return Check(aspect, CheckStatus.NOTE, sentence)


def _refused(aspect: str, sentence: str) -> Check:
    return Check(aspect, CheckStatus.FAILED, sentence)


def findings_of(draft: ModelFacts, target: ModelFacts, *, overlap: Callable[[], CommonTokens | None]) -> list[Check]:
    """Judge a pair; `overlap` is called if the vocabularies differ and returns None where it is unknown."""
    return [
        _kind(draft, target),
        _sizes(draft, target),
        _vocabulary(draft, target, overlap),
        *([_tokenizers(draft, target)] if draft.vocabulary == target.vocabulary else []),
        _ends(draft, target),
        _chats(draft, target),
        _context(draft, target),
    ]


def _kind(draft: ModelFacts, target: ModelFacts) -> Check:
    for role, model in (("draft model", draft), ("target", target)):
        if model.refusal:
            return _refused(
                "architecture",
                f"The {role} {model.source} ({model.architecture}) {model.refusal}, as every rejection asks; choose a "
                "decoder.",
            )
    return _fits("architecture", f"{draft.architecture} drafts for {target.architecture}: both take tokens back.")


def _sizes(draft: ModelFacts, target: ModelFacts) -> Check:
    sizes = f"{_millions(draft.parameters)} of weights draft for {_millions(target.parameters)}"
    if draft.parameters > _LARGER * target.parameters:
        return _refused(
            "size",
            f"The draft model is the larger one, {_millions(draft.parameters)} of weights for a target of "
            f"{_millions(target.parameters)}; name the small model first, the large one second.",
        )
    return _fits("size", f"{sizes}.")


def _vocabulary(draft: ModelFacts, target: ModelFacts, overlap: Callable[[], CommonTokens | None]) -> Check:
    if draft.vocabulary == target.vocabulary:
        return _fits("vocabulary", f"Both have the same {draft.vocabulary.size:,} tokens.")
    apart = (
        f"The vocabularies differ ({draft.vocabulary.size:,} tokens in the draft model, "
        f"{target.vocabulary.size:,} in the target)"
    )
    common = overlap()
    if common is None:
        return _refused(
            "vocabulary",
            f"{apart}, and a folder does not show what they have in common; name a GGUF of the target, in any "
            "quantization, with --target-vocabulary.",
        )
    if common.overlap < MIN_OVERLAP:
        return _refused(
            "vocabulary",
            f"{apart}, and have too little in common: {common.describe()}, {MIN_OVERLAP:.0%} is the least; choose a "
            "draft model of the target's family.",
        )
    return _note(
        "vocabulary",
        f"{apart}, and enough is common to draft with: {common.describe()}; make the file for the devices with `fleet "
        "models vocabulary`, and name it there as target_vocabulary.",
    )


def _tokenizers(draft: ModelFacts, target: ModelFacts) -> Check:
    aspect = "tokenizer"
    try:
        text = first_difference(draft, target)
    except ModelUnreadable as error:
        return _note(aspect, f"The tokens are the same; whether texts are split alike is not known. {error}")
    if text is None:
        return _fits(aspect, f"Both split {len(TEXTS)} texts of several scripts alike.")
    return _note(
        aspect,
        f"The tokens are the same, and the tokenizers split texts differently, such as {text[:_SHOWN_TEXT]!r}: devices "
        "encode prompts as the draft model does, which the target was not trained with. Convert the draft model with "
        "the target's tokenizer, or choose another file of it.",
    )


def _ends(draft: ModelFacts, target: ModelFacts) -> Check:
    aspect = "end tokens"
    if not target.end_tokens:
        return _note(aspect, "The target names no end token: its outputs end at max_new_tokens alone.")
    ends = _some(target.end_texts)
    if draft.vocabulary != target.vocabulary:
        return _fits(aspect, f"Outputs end at {ends}, as the target says.")
    if not set(draft.end_tokens) & set(target.end_tokens):
        own = f"ends at {_some(draft.end_texts)}" if draft.end_tokens else "knows no end"
        return _note(
            aspect,
            f"Outputs end at {ends}, as the target says, and the draft model {own}: what it drafts at an output's end "
            "is rejected. Is one of the two not tuned for chats?",
        )
    return _fits(aspect, f"Outputs end at {ends}, which the draft model knows.")


def _chats(draft: ModelFacts, target: ModelFacts) -> Check:
    aspect = "chat template"
    same = draft.vocabulary == target.vocabulary
    if target.chat is None and (draft.chat is None or not same):
        return _note(
            aspect,
            "There is no chat template, by which a device would make prompts: chats are refused, plain prompts (`raw`) "
            "work. Choose a target with a template for chats.",
        )
    if target.chat is None:
        return _note(
            aspect,
            "The target has no chat template, the draft model has: prompts are made by that. Is the target not tuned "
            "for chats?",
        )
    if draft.chat == target.chat or list(_rendered(draft)) == list(_rendered(target)):
        return _fits(aspect, "Both make the same prompts of a chat.")
    if not any(_rendered(target)):
        return _note(aspect, "The target's chat template makes no prompt of a chat: fetch the model again.")
    return _fits(aspect, "Devices make prompts by the target's, which the edge publishes.")


def _rendered(model: ModelFacts) -> Iterator[str | None]:
    """Yield the prompts that a model's template, if there is one, makes of some chats; None where it refuses."""
    if (its := model.chat) is None:
        return
    for chat in _CHATS:
        try:
            template = ChatTemplate(its.template, bos=its.bos, eos=its.eos, now=lambda: _NOON)
            yield template.render([ChatMessage(role, content) for role, content in chat])
        except ChatError:
            yield None


def _context(draft: ModelFacts, target: ModelFacts) -> Check:
    aspect = "context"
    if not draft.context or not target.context:
        which = "draft model" if not draft.context else "target"
        return _note(aspect, f"The {which}'s file does not say how many tokens it was trained for.")
    least = min(draft.context, target.context)
    sentence = (
        f"A text with its prompt can have {least:,} tokens: the draft model was trained for {draft.context:,}, the "
        f"target for {target.context:,}"
    )
    if draft.context < target.context:
        return _note(aspect, f"{sentence}; longer ones need a draft model for more.")
    return _fits(aspect, f"{sentence}.")


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(texts[:_SHOWN])
    return f"{shown} and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else shown


def _millions(parameters: int) -> str:
    return f"{parameters / _BILLION:,.1f} billion" if parameters >= _BILLION else f"{parameters / 1e6:,.0f} million"


@dataclass(frozen=True, slots=True)
class CheckedPair:
    draft: ModelFacts
    target: ModelFacts
    findings: Sequence[Check] = field(default=())

    @property
    def refused(self) -> list[Check]:
        return [finding for finding in self.findings if finding.status is CheckStatus.FAILED]


def check_pair(draft: str, target: str, *, models_dir: Path, target_vocabulary: Path | None = None) -> CheckedPair:
    """Check a pair; raises `FleetError` if a model cannot be found or read.

    `draft` is as in the device's setting `model`; `target` is a GGUF, a folder, a repository (`owner/name`), or one of
    its GGUFs (`owner/name:file.gguf`). For a folder, `target_vocabulary` is a GGUF of the target, or its vocabulary's
    file.
    """
    if Path(draft).expanduser().is_dir():
        raise ModelUnreadable(
            f"The draft model {draft} is a folder, and devices draft with a GGUF; convert it, or did you mean "
            f"`fleet models check {target} {draft}`?"
        )
    drafting = gguf_facts(locate_model(draft, folder=models_dir).path)
    path = locate_target(target)
    verifying = folder_facts(path) if path.is_dir() else gguf_facts(path)
    known = target_vocabulary.expanduser() if target_vocabulary is not None else None
    if known is None and verifying.form is ModelFormat.GGUF:
        known = path

    def overlap() -> CommonTokens | None:
        return None if known is None else _common(Path(drafting.source), known, verifying)

    return CheckedPair(drafting, verifying, findings_of(drafting, verifying, overlap=overlap))


def locate_target(target: str) -> Path:
    """Find a target's file or folder, or fetch `owner/name:file.gguf` or `owner/name`; raises `ModelUnreadable`."""
    path = Path(target).expanduser()
    if path.exists():
        return path
    if target.count("/") == 1:
        try:
            return locate_model(target, folder=Path()).path if ":" in target else hugging_face().folder(target)
        except ModelNotFound as error:
            raise ModelUnreadable(f"There is no file or folder {target}. {error}") from error
    raise ModelUnreadable(f"There is no file or folder {target}; correct the path, or name a repository, owner/name.")


def _common(draft: Path, target: Path, verifying: ModelFacts) -> CommonTokens:
    try:
        with (
            closing(GgufModel(draft, vocabulary_only=True)) as own,
            closing(GgufModel(target, vocabulary_only=True)) as other,
        ):
            if other.vocabulary != verifying.vocabulary:
                raise ModelUnreadable(
                    f"The file {other.path} has another vocabulary than the target {verifying.source}; name a GGUF of "
                    "the same model with --target-vocabulary."
                )
            return CommonTokens(own, own.vocabulary.size, other, other.vocabulary.size)
    except DrafterError as error:
        raise ModelUnreadable(str(error)) from error


UNIT: Final = 1000
"""Tokens of a sequence for which KV memory is given."""

_HALF: Final = 2
_WHOLE: Final = 4


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory of an engine, without its working memory of about 100 MB (llama.cpp) or 300 MB (torch)."""

    engine: str
    number_format: str
    weight_bytes: int
    kv_bytes: int  # of a sequence of `UNIT` tokens


def device_need(draft: ModelFacts) -> EngineMemory:
    """Return the memory for drafting, which a device allocates for its whole `context`."""
    return _llama(draft)


def edge_needs(target: ModelFacts) -> list[EngineMemory]:
    """Return the memory to verify one session, for each engine that can run the model."""
    torch = [
        EngineMemory("torch", name, target.parameters * size, target.kv_bytes(tokens=UNIT, number_bytes=size))
        for name, size in (("bfloat16", _HALF), ("float32", _WHOLE))
    ]
    return [*_blocks(target), *([_llama(target)] if target.form is ModelFormat.GGUF else []), *torch]


def file_bytes(model: ModelFacts) -> int:
    path = Path(model.source)
    return (
        path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    )


def _blocks(target: ModelFacts) -> list[EngineMemory]:
    every = (8,) if target.form is ModelFormat.GGUF else (8, 4)  # a GGUF keeps its number format
    try:
        files = [open_weights(Path(target.source), bits=bits) for bits in every]
    except UnsupportedModel:
        return []
    its = files[0].geometry
    kv_bytes = UNIT * page_bytes(its.pools) // PAGE + state_bytes(its.state_shapes)
    return [EngineMemory("blocks", file.number_format, file.packed_bytes, kv_bytes) for file in files]


def _llama(model: ModelFacts) -> EngineMemory:
    kv_bytes = model.kv_bytes(tokens=UNIT, number_bytes=_HALF)
    return EngineMemory("llama.cpp", model.number_format, model.weight_bytes, kv_bytes)


Encode = Callable[[str], list[int]]

TEXTS: Final = (
    "The year 2026 has 365 days, 8760 hours; that's 31,536,000 seconds.",
    "I'LL SAY WE'VE DONE IT, haven't we?",
    "def main():\n    return [x**2 for x in range(10)]\n\n\n# done\t!",
    "  two spaces, three   more,\n\n and a line's end \r\n",
    "Grüße aus Köln: naïve café, Ångström; ещё раз — да!",
    "今天天气很好。東京は２０２６年も晴れです。안녕하세요 세계",
    "مرحبا بالعالم १२३ नमस्ते สวัสดี 👩‍🚀🚀",
    "https://example.org/a_b?c=1&d=%20#x user@example.org",
)
"""Numbers, contractions, code, white space, and scripts: what pre-tokenizers treat differently."""


def first_difference(one: ModelFacts, other: ModelFacts) -> str | None:
    """Return the first text that two models split differently; raise ModelUnreadable."""
    with _encoder(one) as encode_one, _encoder(other) as encode_other:
        return next((text for text in TEXTS if encode_one(text) != encode_other(text)), None)


@contextmanager
def _encoder(model: ModelFacts) -> Iterator[Encode]:
    path = Path(model.source)
    if model.form is ModelFormat.GGUF:
        try:
            file = GgufModel(path, vocabulary_only=True)
        except DrafterError as error:
            raise ModelUnreadable(str(error)) from error
        try:
            yield lambda text: file.encode(text, special=True)
        finally:
            file.close()
        return
    yield _folder_encoder(path)


def _folder_encoder(path: Path) -> Encode:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if (path / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(path / "tokenizer.json"))
            return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(path))
        return lambda text: list(slow.encode(text, add_special_tokens=False))
    except Exception as error:  # whatever the two libraries raise for a damaged file
        raise ModelUnreadable(f"The tokenizer in {path} cannot be read; fetch the model again.") from error
