"""Models of transformers: which can be served, and the attention function that replaces theirs.

Every layer calls `attend`; the running *step* knows which sequences the rows belong to and where their keys are. It is
a context variable, because not every architecture passes unknown arguments on to its attention layers.

The model itself shows whether it can be served, not a list of names: one forward must make every layer call our
attention function once, with supported arguments, and its configuration must name no layer that keeps another kind of
state. `run_trial` also compares the logits with the model's own, so that an unforeseen difference is refused.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from fleet_edge.verifiers.blocks.kv import PAGE
from fleet_edge.verifiers.contract import RUNNING_STATE, Item, UnsupportedModel, Verifier, VerifierError, running_state
from fleet_edge.verifiers.torch_engine.layout import FEW_ROWS, Group, StepLayout


@dataclass(frozen=True, slots=True)
class LayerShape:
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class TensorPages:
    """Pages of all layers, as many as a budget holds.

    Attributes:
        keys: By layer `[pages, kv_heads, PAGE * key_dim]`: a view, since memory is ordered by heads first, so that a
            head's keys of one sequence lie together once its pages are gathered.
        values: Likewise.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate memory, which a CPU takes as pages are written to; raises `VerifierError` if there is none."""
        self.count = budget_bytes // (PAGE * sum(shape.numbers for shape in shapes) * dtype.itemsize)
        self._dtype, self._device = dtype, device
        try:
            self._by_head = [
                [self._zeros(shape.kv_heads, PAGE * dim) for dim in (shape.key_dim, shape.value_dim)]
                for shape in shapes
            ]
        except (RuntimeError, MemoryError) as error:  # torch's own class for this is a RuntimeError
            raise VerifierError(
                f"The machine has no memory for keys and values of {budget_bytes} bytes; set a smaller kv_bytes."
            ) from error
        self.keys, self.values = ([pair[which].transpose(0, 1) for pair in self._by_head] for which in (0, 1))
        self._gathered = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def provide(self, page: int) -> None:
        """Do nothing."""

    def forget(self, page: int, kept: int = 0) -> None:
        """Do nothing."""

    def store(self, layer: int, places: torch.Tensor, new: Sequence[torch.Tensor]) -> None:
        """Store keys and values `[rows, kv_heads, dim]` at these places: pages * PAGE + offsets."""
        for stored, its in zip(self._by_head[layer], new, strict=True):
            stored.view(len(stored), -1, its.shape[-1]).index_copy_(1, places, its.transpose(0, 1).to(stored.dtype))

    def gather(self, layer: int, pages: torch.Tensor) -> list[torch.Tensor]:
        """Return copies of keys and of values, `[kv_heads, pages, PAGE * dim]`, valid until the next call."""
        found = []
        for which, stored in enumerate(self._by_head[layer]):
            heads, _, width = stored.shape
            size = heads * len(pages) * width
            if len(self._gathered[which]) < size:  # reused: allocation costs as much as copying
                self._gathered[which] = torch.empty(size, dtype=self._dtype, device=self._device)
            out = self._gathered[which][:size].view(heads, len(pages), width)
            found.append(torch.index_select(stored, 1, pages, out=out))
        return found

    def _zeros(self, heads: int, width: int) -> torch.Tensor:
        """Return zeros: a masked position is multiplied by zero, and uninitialised memory may be NaN."""
        shape = heads, self.count, width
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # torch writes its zeros, so that all memory would be taken at once.
        zeros = np.zeros(math.prod(shape) * self._dtype.itemsize, np.uint8)
        return torch.from_numpy(zeros).view(self._dtype).view(shape)


IMPLEMENTATION: Final = "packed_sequences"
"""Name in transformers' registry. No mask function has this name, so transformers builds no mask."""

_STEP: ContextVar["Step"] = ContextVar("torch step")

# Further arguments that a model may pass: the step's own numbers in another form.
_HARMLESS: Final = frozenset({"position_ids", "position_embeddings", "cache_position"})


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Arguments of one layer.

    `query` is `[rows, heads, key_dim]`, `key` and `value` `[rows, kv_heads, dim]`. A token sees `window` tokens, itself
    included. Scores are multiplied by `scale` and squeezed into plus or minus `softcap`. None: no limit.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None


class Step(Protocol):
    def attend(self, call: Call) -> torch.Tensor:
        """Store the new keys and values and return the attention's output, `[rows, heads, value_dim]`."""


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Let `step` answer the attention layers of a model called inside."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **extra: Any,  # noqa: ANN401 - transformers passes on whatever the model's forward was given
) -> tuple[torch.Tensor, None]:
    """Answer one layer, with the signature that transformers calls.

    Takes `[1, heads, rows, dim]` and returns `[1, rows, heads, value_dim]` and no weights. The layer MUST know its
    `layer_idx`; `scaling` is by default one over the root of key_dim. Raises `UnsupportedModel` for a mask, dropout, or
    other tensors that change the result.
    """
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel("Its attention layers are not numbered.")
    if is_causal is False or not getattr(module, "is_causal", True) or dropout:
        raise UnsupportedModel("Its attention looks at later tokens, or drops some at random.")
    own = sorted(name for name, given in extra.items() if isinstance(given, torch.Tensor) and name not in _HARMLESS)
    if attention_mask is not None:
        own.append("attention_mask")
    if own:
        raise UnsupportedModel(f"Its attention uses {', '.join(own)}, which is not supported here.")
    output = _STEP.get().attend(
        Call(
            layer=layer,
            query=query[0].transpose(0, 1),
            key=key[0].transpose(0, 1),
            value=value[0].transpose(0, 1),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
        )
    )
    return output.unsqueeze(0), None


SCORES = 1 << 24
"""Most scores in memory at once where they are made explicit (soft caps only): 64 MiB in float32. Elsewhere
torch's kernel works in blocks, and a sequence with many new tokens costs its mask alone: rows * context."""


class PagedStep:
    """The step that `attention.attend` finds in the forward's arguments."""

    def __init__(self, layout: StepLayout, pages: TensorPages) -> None:
        self._layout = layout
        self._pages = pages

    def attend(self, call: Call) -> torch.Tensor:
        """Store the new keys and values and return the output, `[rows, heads, value_dim]`."""
        self._pages.store(call.layer, self._layout.places.tensor, (call.key, call.value))
        rows, heads = call.query.shape[:2]
        output = call.query.new_empty(rows, heads, call.value.shape[-1])
        for group in self._layout.groups:
            output[group.begin : group.end] = self._answer(group, call)
        return output

    def _answer(self, group: Group, call: Call) -> torch.Tensor:
        kv_heads = call.key.shape[1]
        shared = call.query.shape[1] // kv_heads  # query heads that share a key head
        n, width = group.sequences, group.width
        query = call.query[group.begin : group.end]
        if group.gather is not None:
            query = query.index_select(0, group.gather.tensor)
        query = query.reshape(n, width, kv_heads, shared, -1)
        is_prefill = width > FEW_ROWS
        if is_prefill:
            # One sequence, and its heads are the batch; the mask need not be repeated.
            query = query[0].permute(2, 1, 0, 3)  # [shared, kv_heads, width, dim]
        else:
            query = query.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, shared * width, -1)
        pages, seen, mask = group.seen(call.window, heads=1 if is_prefill else shared, dtype=query.dtype)
        batch = query.shape[0]
        keys, values = (  # [batch, kv_heads, keys, dim]
            found.view(kv_heads, n, -1, new.shape[-1]).transpose(0, 1)[:, :, seen].expand(batch, -1, -1, -1)
            for found, new in zip(self._pages.gather(call.layer, pages), (call.key, call.value), strict=True)
        )
        if call.softcap is None:
            found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=call.scale)
        else:
            found = _capped(query, keys, values, mask, scale=call.scale, softcap=call.softcap)
        if is_prefill:
            return found.permute(2, 1, 0, 3).reshape(width, kv_heads * shared, -1)
        found = found.view(n, kv_heads, shared, width, -1).permute(0, 3, 1, 2, 4)
        found = found.reshape(n * width, kv_heads * shared, -1)
        return found if group.scatter is None else found.index_select(0, group.scatter.tensor)


def _capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores, a bounded number of query rows at a time."""
    batch, kv_heads, rows, _ = query.shape
    at_once = max(1, SCORES // (batch * kv_heads * keys.shape[2]))
    pieces = []
    for begin in range(0, rows, at_once):
        piece = slice(begin, begin + at_once)
        scores = torch.matmul(query[:, :, piece], keys.transpose(2, 3)) * scale
        scores = torch.tanh(scores / softcap) * softcap + mask[:, :, piece]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        pieces.append(torch.matmul(weights, values))
    return torch.cat(pieces, dim=2)


_SERVED_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})
_NEEDED_ARGUMENTS: Final = ("input_ids", "position_ids", "use_cache", "logits_to_keep")

# Kinds of rotary embedding that change with the longest sequence in the batch once it exceeds the original
# context: below it each is constant, and sequences do not influence each other.
_STRETCHING: Final = frozenset({"dynamic", "longrope"})


def inspect_model(model: Any) -> tuple[LayerShape, ...]:  # noqa: ANN401 - transformers has no type information
    """Switch a model to our attention function and return its layers' shapes; raises `UnsupportedModel`."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise refusal(model, "It has an encoder of its own.")
    missing = [name for name in _NEEDED_ARGUMENTS if name not in inspect.signature(model.forward).parameters]
    if missing:
        raise refusal(model, f"Its forward pass does not take {', '.join(missing)}.")
    foreign = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - _SERVED_LAYERS)
    if foreign:
        raise refusal(model, f"It has layers of kind {', '.join(foreign)}.")
    from transformers import AttentionInterface  # noqa: PLC0415 - 110 MB

    AttentionInterface.register(IMPLEMENTATION, attend)
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
    except Exception as error:  # a foreign forward pass may raise anything
        raise refusal(model, "Its forward pass does not work with several sequences.") from error
    recorder.check(model)
    return tuple(recorder.shapes[layer] for layer in range(config.num_hidden_layers))


def refusal(model: Any, reason: str) -> UnsupportedModel:  # noqa: ANN401
    """Return the error that refuses a model by its architecture's name."""
    kind = getattr(model.config, "model_type", None) or type(model).__name__
    if kind in RUNNING_STATE:
        return running_state(kind, "torch")
    return UnsupportedModel(
        f"The engine torch cannot serve the architecture {kind}; set engine to auto and target to a GGUF of it, "
        f"or choose another target model. {reason}"
    )


def context_of(config: Any) -> int:  # noqa: ANN401
    """Return the longest sequence for which positions are defined; raises `UnsupportedModel` if unknown."""
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
    """A step that computes nothing and records the calls."""

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
        """Compare the recorded calls with the configuration; raises `UnsupportedModel` if they differ."""
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
    """Return the rotary embeddings of a configuration: one, or one for each kind of layer."""
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
    """Compare a verifier's logits with those of its model's own attention; leaves no sequence open.

    Raises `UnsupportedModel` if they differ or the run fails.
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
    except Exception as error:  # a foreign forward pass may raise anything
        raise refusal(model, "A trial run failed.") from error
    size = verifier.info.vocabulary.size
    for mine, theirs in zip(packed, own, strict=True):
        reference = theirs[:, :size].float()
        distance = float((mine - reference).square().mean().sqrt() / reference.std().clamp_min(1e-9))
        if not distance <= _TOLERANCES[model.dtype]:  # also if it is not a number
            raise refusal(model, f"In a trial run its logits were off by {distance:.1e} of their spread.")


def _packed(verifier: _TensorVerifier, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return all rows of both sequences, the first in two chunks with a rollback between."""
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
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0] for text in texts
            ]
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
