"""Facts of a GGUF: shapes and sizes from its header, vocabulary and ends as llama.cpp reads them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fleet_cli.models.pair.facts import Form, LayerShape, ModelFacts
from fleet_cli.models.pair.gguf_header import GgufHeader, ModelUnreadable, read_header
from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.gguf import GgufModel

__all__ = ["gguf_facts", "layers_of"]

_MOST_LAYERS: Final = 4096
_EVERY: Final = "attention.sliding_window_pattern"


def gguf_facts(path: Path) -> ModelFacts:
    """Read a GGUF.

    Raises:
        ModelUnreadable: It is no GGUF, is cut off, has no vocabulary, or is of an architecture that llama.cpp does not
            know.
    """
    header = read_header(path)
    if not header.tensors:
        raise ModelUnreadable(f"The GGUF {path} has no weights; give a file of the whole model.")
    try:
        model = GgufModel(path, vocabulary_only=True)
    except DrafterError as error:
        raise ModelUnreadable(str(error)) from error
    try:
        kind = model.unlike_a_decoder
        ends = model.end_tokens
        return ModelFacts(
            source=str(path),
            form=Form.GGUF,
            architecture=header.architecture,
            number_format=_number_format(header),
            vocabulary=model.vocabulary,
            end_tokens=ends,
            end_texts=tuple(model.stored_text(token) for token in ends),
            chat_template=model.chat_template,
            bos=model.special_text("bos"),
            eos=model.special_text("eos"),
            context=header.number("context_length"),
            parameters=header.parameters,
            weight_bytes=header.weight_bytes,
            layers=layers_of(header, path),
            refusal="" if kind is None else f"is of the {kind} kind, which takes no tokens back",
        )
    finally:
        model.close()


def _number_format(header: GgufHeader) -> str:
    """Return the file type in llama.cpp's words, such as Q4_0; the commonest tensor type where it is not stated."""
    from gguf.constants import GGMLQuantizationType, LlamaFileType

    stated = header.metadata.get("general.file_type")
    for kind in LlamaFileType:
        if kind == stated:
            return str(kind.name).removeprefix("MOSTLY_").removeprefix("ALL_")
    sizes = Counter[int]()
    for tensor in header.tensors:
        sizes[tensor.kind] += tensor.parameters
    names = {int(kind): str(kind.name) for kind in GGMLQuantizationType}
    return names.get(sizes.most_common(1)[0][0], "unknown")


def layers_of(header: GgufHeader, path: Path) -> tuple[LayerShape, ...]:
    """Return what each layer keeps of a token.

    Raises:
        ModelUnreadable: The header does not say.
    """
    count = header.number("block_count") - header.number("nextn_predict_layers")
    heads = _by_layer(header, "attention.head_count", count)
    width = header.number("embedding_length")
    if not 0 < count <= _MOST_LAYERS or max(heads, default=0) < 1 or width < 1:
        raise ModelUnreadable(f"The GGUF {path} does not say which layers it has; convert the model again.")
    kv_heads = _by_layer(header, "attention.head_count_kv", count) or heads
    dim = width // max(heads)
    key, value = (header.number(f"attention.{what}_length", dim) for what in ("key", "value"))
    window = header.number("attention.sliding_window") or None
    slides = _sliding(header, count)
    key_slides = header.number("attention.key_length_swa", key)
    value_slides = header.number("attention.value_length_swa", value)
    layers = [
        LayerShape(kv_heads[layer], key_slides, value_slides, window)
        if window and slides[layer]
        else LayerShape(kv_heads[layer], key, value)
        for layer in range(count)
    ]
    shared = header.number("attention.shared_kv_layers")  # the last layers look at what others have stored
    return tuple(layers[: count - shared] if 0 < shared < count else layers)


def _by_layer(header: GgufHeader, key: str, count: int) -> Sequence[int]:
    """Return a number that holds for all layers, or is stated for each; nothing if it is not stated."""
    found = header.of(key)
    if isinstance(found, tuple):
        return [int(number) for number in found[:count]] if len(found) >= count and _whole(found) else []
    return [found] * count if isinstance(found, int) and count <= _MOST_LAYERS else []


def _whole(numbers: Sequence[int | float]) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _sliding(header: GgufHeader, count: int) -> Sequence[bool]:
    """Return which layers look back by a window: as stated, or all where nothing is."""
    pattern = header.of(_EVERY)
    if isinstance(pattern, tuple) and len(pattern) >= count:
        return [bool(each) for each in pattern[:count]]
    if isinstance(pattern, int) and pattern > 1:
        return [(layer + 1) % pattern != 0 for layer in range(count)]
    return [True] * count
