"""Architecture check: whether a model can be served, found out from the model itself, not from a list of names.

A model is served if one forward of it makes every layer call our attention function, once, with what we
honour, and if its configuration names no kind of layer that keeps a state of another kind. `trial` compares the
packed logits with the model's own on top of that, so that what was not thought of is refused rather than
silently wrong.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch

from fleet_edge.verifiers.contract import Item, UnsupportedModel, Verifier
from fleet_edge.verifiers.packed.attention import IMPLEMENTATION, Call, register, running
from fleet_edge.verifiers.packed.kv import LayerShape

_SERVED_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})
_NEEDED_ARGUMENTS: Final = ("input_ids", "position_ids", "use_cache", "logits_to_keep")

# Kinds of rotary embedding that change with the longest sequence in the batch once it exceeds the original
# context: below it each is constant, and sequences do not influence each other.
_STRETCHING: Final = frozenset({"dynamic", "longrope"})


def inspect_model(model: Any) -> tuple[LayerShape, ...]:  # noqa: ANN401 - transformers has no type information
    """Switch a model to our attention function and return what each of its layers stores.

    Raises:
        UnsupportedModel: It cannot be served.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise refusal(model, "It has an encoder of its own.")
    missing = [name for name in _NEEDED_ARGUMENTS if name not in inspect.signature(model.forward).parameters]
    if missing:
        raise refusal(model, f"Its forward pass does not take {', '.join(missing)}.")
    foreign = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - _SERVED_LAYERS)
    if foreign:
        raise refusal(model, f"It has layers of kind {', '.join(foreign)}.")
    register()
    recorder = _Recorder()
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.inference_mode(), running(recorder):
            model(
                input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device),
                position_ids=torch.arange(2, device=model.device).unsqueeze(0),
                use_cache=False,
            )
    except UnsupportedModel as error:
        raise refusal(model, str(error)) from error
    except Exception as error:  # what a foreign forward pass raises is anyone's guess
        raise refusal(model, "Its forward pass does not work with packed sequences.") from error
    recorder.check(model)
    return tuple(recorder.shapes[layer] for layer in range(config.num_hidden_layers))


def refusal(model: Any, reason: str) -> UnsupportedModel:  # noqa: ANN401
    """Return the error that refuses a model by its architecture's name.

    Args:
        model: The model.
        reason: A sentence.
    """
    kind = getattr(model.config, "model_type", None) or type(model).__name__
    return UnsupportedModel(
        f"The architecture {kind} cannot be served by the packed verifier; choose another target model. {reason}"
    )


def context_of(config: Any) -> int:  # noqa: ANN401
    """Return the most tokens of a sequence for which the model's positions are defined.

    Raises:
        UnsupportedModel: The configuration does not say.
    """
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise UnsupportedModel("The model's configuration names no max_position_embeddings; add it to config.json.")
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if rope.get("rope_type") in _STRETCHING and isinstance(original, int):
            context = min(context, original)
    return context


class _Recorder:
    """A step that computes nothing and notes who asked for what."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self._windows: dict[int, int | None] = {}

    def attend(self, call: Call) -> torch.Tensor:
        if call.layer in self.shapes:
            raise UnsupportedModel("Its layers share one attention layer.")
        rows, heads = call.query.shape[:2]
        if heads % call.key.shape[1]:
            raise UnsupportedModel("Its query heads are not a multiple of its key heads.")
        self.shapes[call.layer] = LayerShape(call.key.shape[1], call.key.shape[2], call.value.shape[2])
        self._windows[call.layer] = call.window
        return call.query.new_zeros(rows, heads, call.value.shape[2])

    def check(self, model: Any) -> None:  # noqa: ANN401
        """Hold what was asked for against the configuration.

        Raises:
            UnsupportedModel: Layers without attention, or whose windows are not what the configuration says.
        """
        config = model.config
        if sorted(self.shapes) != list(range(config.num_hidden_layers)):
            raise refusal(
                model,
                f"Only {len(self.shapes)} of its {config.num_hidden_layers} layers are attention layers.",
            )
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if kinds is None:
            slides = window is not None and getattr(config, "use_sliding_window", True)
            kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
        for layer, kind in enumerate(kinds):
            wanted = window if kind == "sliding_attention" else None
            if self._windows[layer] != wanted:
                raise refusal(model, "Its attention layers do not say which window they use.")


def _ropes(parameters: object) -> list[Mapping[str, Any]]:
    """Return the rotary embeddings of a configuration: one, or one a kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    if "rope_type" in parameters:
        return [parameters]
    return [rope for rope in parameters.values() if isinstance(rope, Mapping)]


LENGTH: Final = 24  # more than `layout.FEW_ROWS` with a chunk before it, so that both kinds of group occur
SEED: Final = 20_250_716

# How far the logits may be from the model's own: root mean square of the difference over the standard deviation of
# the logits. Rounding makes 1e-6 in float32 and some 1e-2 in bfloat16; a forgotten state, mask or position 0.1 to 1.
_TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _TensorVerifier(Verifier, Protocol):
    """A verifier whose logits are tensors of their own, which stay valid."""

    def score(self, items: Sequence[Item]) -> torch.Tensor: ...


def run_trial(verifier: _TensorVerifier, model: Any) -> None:  # noqa: ANN401 - transformers has no type information
    """Hold a verifier's logits against those of its model's own attention; leaves no sequence behind.

    Raises:
        UnsupportedModel: They differ, or the run fails.
    """
    length = min(LENGTH, verifier.info.context)
    generator = torch.Generator().manual_seed(SEED)
    texts = [
        torch.randint(verifier.info.vocabulary.size, (size,), generator=generator).tolist()
        for size in (length, length // 2)
    ]
    try:
        packed = _packed(verifier, texts)
        own = _own(model, texts)
    except Exception as error:  # what a foreign forward pass raises is anyone's guess
        raise refusal(model, "A trial run failed.") from error
    size = verifier.info.vocabulary.size
    for mine, theirs in zip(packed, own, strict=True):
        reference = theirs[:, :size].float()
        distance = float((mine - reference).square().mean().sqrt() / reference.std().clamp_min(1e-9))
        if not distance <= _TOLERANCES[model.dtype]:  # also if it is not a number
            raise refusal(model, f"In a trial run its logits were off by {distance:.1e} of their spread.")


def rows_repeat(verifier: _TensorVerifier) -> bool:
    """Return whether a sequence has the same rows to the bit however it is cut, alone and among others."""
    size, length = verifier.info.vocabulary.size, min(2 * LENGTH, verifier.info.context)
    generator = torch.Generator().manual_seed(SEED)
    mine, *others = (torch.randint(size, (length,), generator=generator).tolist() for _ in range(4))
    keys = range(-1, -1 - len(others) - 1, -1)  # no session has these
    try:
        for key in keys:
            verifier.open(key)
        whole = verifier.score([Item(keys[0], mine, length)]).clone()
        verifier.truncate(keys[0], 0)
        pieces, begin, new = [], 0, 1
        while begin < length:
            piece = mine[begin : begin + new]
            items = [Item(key, other[:new], 1) for key, other in zip(keys[1:], others, strict=True)]
            rows = verifier.score([*items, Item(keys[0], piece, len(piece))])
            pieces.append(rows[len(items) :].clone())
            for key in keys[1:]:
                verifier.truncate(key, 0)
            begin, new = begin + len(piece), new % 5 + 1
    finally:
        for key in keys:
            verifier.close(key)
    return torch.equal(whole, torch.cat(pieces))


def _packed(verifier: _TensorVerifier, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return every row of both texts, the first in two chunks with a rollback between."""
    first, second = texts
    cut = len(first) // 4
    mine, other = -1, -2  # no session has these
    try:
        verifier.open(mine)
        verifier.open(other)
        head = verifier.score([Item(mine, first[:cut], cut)])
        verifier.score([Item(mine, second[:cut], 0)])
        verifier.truncate(mine, cut)
        rest = len(first) - cut
        tail = verifier.score([Item(other, second, len(second)), Item(mine, first[cut:], rest)])
    finally:
        verifier.close(mine)
        verifier.close(other)
    return [torch.cat([head, tail[len(second) :]]), tail[: len(second)]]


def _own(model: Any, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:  # noqa: ANN401
    """Return every row of each text by the model's own attention, one text at a time."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0] for text in texts
            ]
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
