"""Parts of layers: products, attention, dense feed-forward parts and experts, with their weights."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.geometry import (
    Activation,
    Attention,
    Convolution,
    Experts,
    Geometry,
    Layer,
    Recurrence,
)
from fleet_edge.verifiers.blocks.kv import Pages
from fleet_edge.verifiers.blocks.layout import BLOCK
from fleet_edge.verifiers.blocks.loops import LANES, Integers, Loops
from fleet_edge.verifiers.blocks.portable import Floats
from fleet_edge.verifiers.blocks.products import Inputs, multiply, multiply_experts
from fleet_edge.verifiers.blocks.weights import Weights

NONE: Final = np.empty(0, np.float32)
_NO_COLUMNS: Final = np.empty((0, 0), np.float32)
_MOST_KEPT: Final = 1 << 23
"""Largest array that is kept: 32 MiB."""


class WeightFile(Protocol):
    """Weights by the names that they have in a GGUF."""

    geometry: Geometry

    def __contains__(self, name: str) -> bool: ...

    def require_shapes(self) -> None:
        """Raise `UnsupportedModel` if a tensor is missing, or does not fit the geometry."""

    def vector(self, name: str) -> npt.NDArray[np.float32] | None: ...

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> list[Weights]:
        """Return tensors as packed weights; the matrices of all experts follow each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A step's rows: pages, and by row its part and position; where pieces of a sequence begin that share keys.

    For recurrent layers the arrays of states, and `replays` and `of_row` of the loop `extend`.
    """

    tables: Integers
    places: Integers
    positions: Integers
    starts: Integers
    _: KW_ONLY
    replays: Integers
    of_row: Integers
    states: Sequence[Floats]


class Workspace:
    """Buffers that steps reuse: to allocate them for each product would take as long as some products."""

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}
        self._inputs: dict[tuple[str, int], Inputs] = {}

    def floats(self, name: str, count: int, width: int) -> Floats:
        """Return `[count, width]`, valid until `name` is asked for again."""
        size = count * width
        kept = self._floats.get(name, NONE)
        if len(kept) < size:
            kept = np.empty(size, np.float32)
            if size <= _MOST_KEPT:
                self._floats[name] = kept
        return kept[:size].reshape(count, width)

    def inputs(self, name: str, count: int, width: int) -> Inputs:
        """Return inputs of a product, valid until the same name and width are asked for again."""
        kept = self._inputs.get((name, width))
        if kept is None or len(kept.values) < count:
            kept = Inputs.empty(count, width)
            if kept.values.size <= _MOST_KEPT:
                self._inputs[name, width] = kept
        return Inputs(kept.values[:count], kept.scales[:count], kept.sums[:count])


class Product:
    """Products with weights that share their inputs; the results lie next to each other."""

    def __init__(self, name: str, weights: Sequence[Weights], bias: Floats | None, workspace: Workspace) -> None:
        self._name, self._weights, self._bias, self._workspace = name, list(weights), list[Floats | None](), workspace
        begin = 0
        for each in weights:
            padded = None
            if bias is not None:
                padded = np.zeros(each.padded_outputs, np.float32)
                padded[: each.outputs] = bias[begin : begin + each.outputs]
            self._bias.append(padded)
            begin += each.outputs

    def __call__(self, x: Inputs) -> Floats:
        """Return `[rows, outputs, rounded up]`, valid until the next product of this name."""
        width = sum(each.outputs for each in self._weights[:-1]) + self._weights[-1].padded_outputs
        out = self._workspace.floats(self._name, len(x.values), width)
        column = 0
        for weights, bias in zip(self._weights, self._bias, strict=True):
            multiply(weights, x, bias, out, column)
            column += weights.outputs
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """What parts of layers need of their model besides weights."""

    geometry: Geometry
    loops: Loops
    workspace: Workspace
    eps: np.float32

    def normalized(self, x: Floats, more: Floats, weight: Floats) -> Inputs:
        """Add `more` to `x` in place; return the normalized rows."""
        into = self.workspace.inputs("normal", len(x), x.shape[1])
        self.loops.normalize(x, more, weight, self.eps, into.values, into.scales, into.sums)
        return into

    def rows_normalized(self, x: Floats, weight: Floats) -> Floats:
        """Return the normalized rows in float32."""
        found = np.zeros(x.shape, np.float32)
        self.loops.add_normalized(found, x.copy(), weight, self.eps)
        return found

    def quantized(self, x: Floats) -> Inputs:
        into = self.workspace.inputs("quantized", len(x), x.shape[1])
        self.loops.quantize(x, into.values, into.scales, into.sums)
        return into

    def gated(self, both: Floats, inner: int, activation: Activation) -> Inputs:
        """Return the product of the activated gate and of up."""
        into = self.workspace.inputs("gated", len(both), inner)
        self.loops.gate(both, inner, int(activation), into.values, into.scales, into.sums)
        return into


class Loader:
    """Weights of one layer."""

    def __init__(self, file: WeightFile, number: int, numbers: Numbers) -> None:
        self._file, self.prefix, self.numbers = file, f"blk.{number}.", numbers

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}.weight" in self._file

    def vector(self, name: str) -> Floats:
        """Return a vector, by its name with the ending; empty if there is none."""
        found = self._file.vector(f"{self.prefix}{name}")
        return NONE if found is None else found

    def pack(self, name: str) -> list[Weights]:
        return self._file.pack([f"{self.prefix}{name}.weight"])

    def product(self, names: Sequence[str], orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> Product:
        weights = self._file.pack([f"{self.prefix}{name}.weight" for name in names], orders=orders)
        found = [self._file.vector(f"{self.prefix}{name}.bias") for name in names]
        bias = None
        if any(each is not None for each in found):
            ordered = [
                each if order is None or each is None else each[order]
                for each, order in zip(found, orders or [None] * len(names), strict=True)
            ]
            bias = np.concatenate([each for each in ordered if each is not None])
            assert len(bias) == sum(each.outputs for each in weights), "all of these have a bias, or none"
        return Product(names[0], weights, bias, self.numbers.workspace)


class AttentionPart:
    """Attention of a layer, with keys and values in pages."""

    def __init__(self, loader: Loader, its: Attention, turns: tuple[Floats, Floats], place: tuple[int, int]) -> None:
        self._its, self._numbers, self._turns, self._place = its, loader.numbers, turns, place
        self._queries = self._product(loader)
        self._norms = loader.vector("attn_q_norm.weight"), loader.vector("attn_k_norm.weight")
        self._output = loader.product(["attn_output"])
        sinks = loader.vector("attn_sinks.weight")
        self._sinks = sinks if len(sinks) else np.full(its.heads, -np.inf, np.float32)

    def _product(self, loader: Loader) -> Product:
        its = self._its
        if "attn_qkv" in loader:
            return loader.product(["attn_qkv"])
        if its.is_gated:
            rows = np.arange(2 * its.heads * its.dim).reshape(its.heads, 2, its.dim)
            queries, gates = rows[:, 0].reshape(-1), rows[:, 1].reshape(-1)
            return loader.product(["attn_q", "attn_k", "attn_v", "attn_q"], [queries, None, None, gates])
        names = ["attn_q"] if its.source is not None else ["attn_q", "attn_k", "attn_v"][: 2 + its.has_values]
        if not loader.numbers.geometry.neighbours:
            return loader.product(names)
        return loader.product(names, [_apart(its.heads, its.dim), _apart(its.kv_heads, its.dim), None][: len(names)])

    def __call__(self, _x: Floats, normal: Inputs, layout: Layout, pages: Pages) -> Floats:
        its, numbers, loops = self._its, self._numbers, self._numbers.loops
        found = self._queries(normal)
        where = (layout.tables, layout.places, layout.positions)
        pool, layer = self._place
        keys, values = pages.keys[pool], pages.values[pool]
        kv_heads = its.kv_heads if its.source is None else 0
        values_at = (its.heads + (its.kv_heads if its.has_values else 0)) * its.dim
        loops.place(
            found, *self._norms, its.values_normalized, numbers.eps, np.float32(its.scale), *self._turns, *where,
            layer, keys, values, its.heads, kv_heads, values_at,
        )  # fmt: skip
        attended = numbers.workspace.floats("attended", len(found), its.heads * its.dim)
        shared, cap = its.heads // its.kv_heads, np.float32(its.cap)
        loops.attend(
            found, *where, layout.starts, its.window, cap, self._sinks, layer, keys, values, shared, attended
        )  # fmt: skip
        if its.is_gated:
            loops.gate_heads(attended, found, (its.heads + 2 * its.kv_heads) * its.dim)
        return self._output(numbers.quantized(attended))


def _apart(heads: int, dim: int) -> npt.NDArray[np.intp]:
    """Return the order of rows in which the halves of a head are rotated together, and not neighbours."""
    return np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _columns(matrices: Sequence[Floats]) -> Floats:
    """Return the rows of matrices as columns, with zeros up to whole vectors."""
    found = np.concatenate(matrices).T
    return np.ascontiguousarray(np.pad(found, ((0, 0), (0, -found.shape[1] % LANES))))


class ConvolutionPart:
    """Short convolution of a layer, with what it mixes in pages."""

    def __init__(self, loader: Loader, its: Convolution, place: tuple[int, int]) -> None:
        self._its, self._numbers, self._place = its, loader.numbers, place
        self._input, self._output = loader.product(["shortconv.in_proj"]), loader.product(["shortconv.out_proj"])
        weight = loader.vector("shortconv.conv.weight").reshape(its.width, its.kernel)
        self._weight = np.ascontiguousarray(weight.T)

    def __call__(self, _x: Floats, normal: Inputs, layout: Layout, pages: Pages) -> Floats:
        numbers, loops = self._numbers, self._numbers.loops
        mixed = self._input(normal)
        pool, layer = self._place
        where = (layout.tables, layout.places, layout.positions, layer, pages.keys[pool], pages.values[pool])
        loops.keep_gated(mixed, *where)  # all rows, before the first reads those of other tokens
        out = numbers.workspace.floats("attended", len(mixed), self._its.width)
        loops.convolve(mixed, self._weight, *where, out)
        return self._output(numbers.quantized(out))


class RecurrencePart:
    """Gated delta rule or Mamba-2 of a layer, with its states in memory of their own.

    What decides decay and rate of the delta rule is computed in float32, since a state keeps its rounding for all later
    tokens. Mamba-2 has it in one product with the rest.
    """

    def __init__(self, loader: Loader, its: Recurrence, place: int) -> None:
        self._its, self._numbers, self._place = its, loader.numbers, place
        self._bias, order = loader.vector("ssm_dt.bias"), np.arange(its.channels)
        if its.is_mamba:
            # A file has gates, values, keys, queries and time steps: the delta rule's order is queries, keys, values.
            order = np.concatenate(np.split(order, [its.values, its.values + its.key_heads * its.key_dim])[::-1])
            others = np.delete(np.arange(its.inputs), its.values + order)
            self._input = loader.product(["ssm_in"], [np.concatenate([its.values + order, others])])
        else:
            self._input = loader.product(["attn_qkv", "attn_gate"])
            self._before, self._router = loader.vector("attn_norm.weight"), self._load_router(loader)
            heads = its.value_heads
            self._bias = np.pad(self._bias, (heads, self._router.shape[1] - 2 * heads))
        weight, bias = loader.vector("ssm_conv1d.weight"), loader.vector("ssm_conv1d.bias")
        self._weight = np.ascontiguousarray(weight.reshape(its.channels, its.kernel)[order].T)
        self._weight_bias = bias[order] if len(bias) else np.zeros(its.channels, np.float32)
        self._speeds, self._skips = loader.vector("ssm_a").reshape(-1), loader.vector("ssm_d").reshape(-1)
        self._norm = np.resize(loader.vector("ssm_norm.weight"), its.values)  # that of a head for all of them
        self._output = loader.product(["ssm_out"])

    def _load_router(self, loader: Loader) -> Floats:
        """Return `[hidden, logits]`: for the rates of all heads, then for their decays."""
        if "ssm_ba" not in loader:
            return _columns([loader.vector("ssm_beta.weight"), loader.vector("ssm_alpha.weight")])
        both = loader.vector("ssm_ba.weight")
        by_key = both.reshape(self._its.key_heads, 2, -1, both.shape[1])
        return _columns([by_key[:, each].reshape(-1, both.shape[1]) for each in (0, 1)])

    def _logits(self, x: Floats, found: Floats) -> Floats:
        its, numbers = self._its, self._numbers
        if its.is_mamba:
            return found[:, its.inputs - its.value_heads : its.inputs] + self._bias
        logits = numbers.workspace.floats("router", len(x), self._router.shape[1])
        numbers.loops.route(x, self._before, self._router, self._bias, numbers.eps, logits)
        return logits

    def __call__(self, x: Floats, normal: Inputs, layout: Layout, _pages: Pages) -> Floats:
        its, numbers, loops, place = self._its, self._numbers, self._numbers.loops, self._place
        found = self._input(normal)
        logits = self._logits(x, found)
        matrices, inputs, logs = layout.states
        count, tail = len(layout.of_row), its.kernel - 1
        whole = numbers.workspace.floats("before convolution", count, its.channels)
        mixed = numbers.workspace.floats("convolved", count, its.channels)
        changes = numbers.workspace.floats("changes", count, 2 * its.value_heads)
        dots = numbers.workspace.floats("dots", count, its.key_heads)
        which = (layout.replays, layout.of_row)
        loops.extend(found, logits, its.is_mamba, self._speeds, *which, place, inputs, logs, tail, whole, changes)
        loops.mix(whole, self._weight, self._weight_bias, *which, its.key_dim, its.is_mamba, mixed, dots)
        out = numbers.workspace.floats("attended", len(found), its.values)
        loops.recur(mixed, changes, dots, self._skips, layout.replays, tail, its.in_turn, place, matrices, out)
        loops.log(whole, changes, layout.replays, tail, place, inputs, logs)
        width = its.values // its.key_heads if its.is_mamba else its.value_dim
        loops.finish_heads(out, self._norm, width, np.float32(its.eps), found, its.channels, its.is_mamba)
        return self._output(numbers.quantized(out))


class FeedForward:
    """A feed-forward part; `end` is that of its tensors' names."""

    def __init__(self, loader: Loader, inner: int, *, end: str = "") -> None:
        has_gate = loader.numbers.geometry.activation.has_gate and f"ffn_gate{end}" in loader
        both = [f"ffn_gate{end}", f"ffn_up{end}"] if has_gate else [f"ffn_up{end}"]
        self._both, self._down = loader.product(both), loader.product([f"ffn_down{end}"])
        self._inner, self._numbers = inner, loader.numbers

    def __call__(self, _x: Floats, normal: Inputs) -> Floats:
        activation = self._numbers.geometry.activation
        return self._down(self._numbers.gated(self._both(normal), self._inner, activation))


class ExpertsPart:
    """Experts of a layer: each row goes to some of them, by the logits of a router in float32."""

    def __init__(self, loader: Loader, its: Experts) -> None:
        self._its, self._numbers = its, loader.numbers
        hidden = loader.numbers.geometry.hidden
        self._norm = loader.vector(f"{loader.numbers.geometry.feed_norm}.weight")
        self._own_norm = NONE
        self._factors = np.ones(its.count, np.float32)
        if its.scaled:
            self._norm = loader.vector("ffn_gate_inp.scale") * np.float32(hidden**-0.5)
            self._own_norm = loader.vector("pre_ffw_norm_2.weight")
            self._factors = loader.vector("ffn_down_exps.scale")
        self._router, self._router_bias = self._load_router(loader)
        self._choice_bias = loader.vector("exp_probs_b.bias")
        self._has_gate = loader.numbers.geometry.activation.has_gate
        names = ["ffn_gate_up_exps"] if "ffn_gate_up_exps" in loader else ["ffn_gate_exps", "ffn_up_exps"]
        self._up = [self._load(loader, name) for name in (names if self._has_gate else ["ffn_up_exps"])]
        self._down = self._load(loader, "ffn_down_exps")
        self._shared = FeedForward(loader, its.shared, end="_shexp") if its.shared else None
        self._shrink, self._widen = (
            loader.product([f"ffn_latent_{name}"]) if its.latent else None for name in ("down", "up")
        )

    def _load_router(self, loader: Loader) -> tuple[Floats, Floats]:
        """Return the router `[hidden, logits]` with its bias; a shared expert's gate is the last logit."""
        its = self._its
        rows = [loader.vector("ffn_gate_inp.weight")]
        if its.shared and its.shared_gated:
            rows.append(loader.vector("ffn_gate_inp_shexp.weight").reshape(1, -1))
        router = _columns(rows)
        bias = loader.vector("ffn_gate_inp.bias") if its.has_biases else NONE
        return router, np.pad(bias, (0, router.shape[1] - len(bias)))

    def _load(self, loader: Loader, name: str) -> tuple[Weights, Floats | None]:
        (weights,) = loader.pack(name)
        bias = loader.vector(f"{name}.bias") if self._its.has_biases else None
        return weights, None if bias is None else np.ascontiguousarray(bias.reshape(-1))

    def __call__(self, x: Floats, normal: Inputs) -> Floats:
        """Return the weighted sum of the experts of each row, added in the order of the experts."""
        its, numbers, loops = self._its, self._numbers, self._numbers.loops
        count = len(x)
        logits = numbers.workspace.floats("router", count, self._router.shape[1])
        loops.route(x, self._norm, self._router, self._router_bias, numbers.eps, logits)
        shape = (count, its.used)
        chosen, places, shares = np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.float32)
        starts, rows = np.empty(its.count + 1, np.int32), np.empty(count * its.used, np.int32)
        if its.groups:
            limits = its.groups, its.used_groups, its.normalized, np.float32(its.factor)
            loops.choose_by_sigmoid(logits, self._choice_bias, *limits, chosen, shares)
        else:
            loops.choose(logits, self._factors, its.normalized, chosen, shares)
        loops.sort(chosen, starts, rows, places)
        if its.scaled:
            normal = numbers.normalized(x, x[:, :0], self._own_norm)
        inputs, width = normal, its.latent or numbers.geometry.hidden
        if self._shrink is not None:
            inputs = numbers.quantized(self._shrink(normal)[:, :width])
        both = numbers.workspace.floats("experts up", len(rows), (1 + self._has_gate) * its.inner)
        for place, (weights, bias) in enumerate(self._up):
            multiply_experts(weights, inputs, rows, starts, bias, both, place * its.inner)
        gated = numbers.gated(both, its.inner, numbers.geometry.activation)
        found = numbers.workspace.floats("experts down", len(rows), width)
        own_rows = np.arange(len(rows), dtype=np.int32)
        multiply_experts(self._down[0], gated, own_rows, starts, self._down[1], found)
        total = numbers.workspace.floats("experts", count, width)
        loops.combine(found, places, shares, total)
        if self._widen is not None:
            total = self._widen(numbers.quantized(total))
        if self._shared is not None and its.shared_gated:
            loops.add_gated(total, self._shared(x, normal), logits, its.count)
        elif self._shared is not None:
            total += self._shared(x, normal)[:, : total.shape[1]]
        return total


class DenseAndExperts:
    """A dense part and experts next to each other, each with a norm after it."""

    def __init__(self, loader: Loader, inner: int, experts: Experts) -> None:
        self._parts: list[Callable[[Floats, Inputs], Floats]] = [
            FeedForward(loader, inner),
            ExpertsPart(loader, experts),
        ]
        self._norms = [loader.vector(f"post_ffw_norm_{number}.weight") for number in (1, 2)]
        self._numbers = loader.numbers

    def __call__(self, x: Floats, normal: Inputs) -> Floats:
        total = np.zeros(x.shape, np.float32)
        for part, norm in zip(self._parts, self._norms, strict=True):
            self._numbers.loops.add_normalized(total, part(x, normal), norm, self._numbers.eps)
        return total


class EmbeddingPart:
    """What a layer adds of an embedding of its own, by a gate that the row decides."""

    def __init__(self, loader: Loader) -> None:
        self._gate, self._output = loader.product(["inp_gate"]), loader.product(["proj"])
        self._norm, self._numbers = loader.vector("post_norm.weight"), loader.numbers

    def __call__(self, x: Floats, embedded: Floats) -> None:
        numbers, width = self._numbers, embedded.shape[1]
        both = numbers.workspace.floats("embedding gate", len(x), 2 * width)
        both[:, :width] = self._gate(numbers.quantized(x))[:, :width]
        both[:, width:] = embedded
        found = self._output(numbers.gated(both, width, Activation.GELU))
        numbers.loops.add_normalized(x, found, self._norm, numbers.eps)


class MtpPart:
    """The layer that proposes tokens: one of attention, whose input is a token and the row of the token before it.

    Attributes:
        embedding: Its own embedding of tokens, if it does not share that of the model.
        head: Likewise its own head.
    """

    def __init__(
        self, loader: Loader, its: Layer, turns: tuple[Floats, Floats], place: tuple[int, int], norm: Floats
    ) -> None:
        """Load it; `norm` is the model's last one, which it shares unless it has its own."""
        assert isinstance(its.mixer, Attention)
        self._numbers = loader.numbers
        self.embedding = loader.pack("nextn.embed_tokens")[0] if "nextn.embed_tokens" in loader else None
        self.head = loader.product(["nextn.shared_head_head"]) if "nextn.shared_head_head" in loader else None
        self._token_norm, self._row_norm = (loader.vector(f"nextn.{name}.weight") for name in ("enorm", "hnorm"))
        self._input = loader.product(["nextn.eh_proj"])
        self._mixer_norm = loader.vector("attn_norm.weight")
        self._mix = AttentionPart(loader, its.mixer, turns, place)
        self._feed_norm = loader.vector(f"{loader.numbers.geometry.feed_norm}.weight")
        self._feed = FeedForward(loader, its.inner) if its.experts is None else ExpertsPart(loader, its.experts)
        own_norm = loader.vector("nextn.shared_head_norm.weight")
        self._norm = own_norm if len(own_norm) else norm

    def __call__(self, embedded: Floats, before: Floats, layout: Layout, pages: Pages) -> Floats:
        """Return the normalized rows of tokens, given their embeddings and the rows of the tokens before them."""
        numbers = self._numbers
        halves = numbers.rows_normalized(embedded, self._token_norm), numbers.rows_normalized(before, self._row_norm)
        x = self._input(numbers.quantized(np.concatenate(halves, axis=1)))[:, : embedded.shape[1]].copy()
        more = self._mix(x, numbers.normalized(x, x[:, :0], self._mixer_norm), layout, pages)
        more = self._feed(x, numbers.normalized(x, more, self._feed_norm))
        return numbers.rows_normalized(x + more[:, : x.shape[1]], self._norm)


def fits_blocks(its: Geometry) -> bool:
    """True if every width is a multiple of a block."""
    widths = [its.hidden, its.per_layer]
    for layer in its.layers:
        mixer = layer.mixer
        widths.append(layer.inner)
        if isinstance(mixer, Recurrence):
            widths += [mixer.values, 2 * mixer.value_dim]  # whole vectors
        elif mixer is not None:
            widths.append(mixer.width if isinstance(mixer, Convolution) else mixer.heads * mixer.dim)
        widths += [] if layer.experts is None else [layer.experts.inner, layer.experts.shared, layer.experts.latent]
    heads = [layer.mixer.dim for layer in its.layers if isinstance(layer.mixer, Attention)]
    return not any(width % BLOCK for width in widths) and not any(dim % 4 for dim in heads)
