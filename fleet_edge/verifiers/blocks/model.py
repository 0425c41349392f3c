"""Forward pass over weights in blocks of 32, for many sequences at once, without padding.

Products have quantized inputs; the rest is float32. Each row is computed in an order of its own, so that its logits are
the same to the bit whatever is computed with it, and on every processor.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numba
import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.architectures import Geometry, refusal
from fleet_edge.verifiers.blocks.kv import PAGE, Pages, ProcessMemory
from fleet_edge.verifiers.blocks.layout import BLOCK
from fleet_edge.verifiers.blocks.loops import ROWS_AT_ONCE, Integers, loops
from fleet_edge.verifiers.blocks.portable import Floats
from fleet_edge.verifiers.blocks.products import Inputs, multiply
from fleet_edge.verifiers.blocks.weights import Weights, rows

_NONE: Final = np.empty(0, np.float32)
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

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> list[Weights]: ...

    def pack_expert(self, names: Sequence[str], expert: int) -> list[Weights]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part of a step: its pages, the number of tokens before, the new tokens, the rows wanted."""

    table: Sequence[int]
    start: int
    tokens: Sequence[int]
    rows: int


class Workspace:
    """Buffers that steps reuse: to allocate them for each product would take as long as some products."""

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}
        self._inputs: dict[int, Inputs] = {}

    def floats(self, name: str, count: int, width: int) -> Floats:
        """Return `[count, width]`, valid until `name` is asked for again."""
        size = count * width
        kept = self._floats.get(name, _NONE)
        if len(kept) < size:
            kept = np.empty(size, np.float32)
            if size <= _MOST_KEPT:
                self._floats[name] = kept
        return kept[:size].reshape(count, width)

    def inputs(self, count: int, width: int) -> Inputs:
        """Return inputs of a product, valid until the same width is asked for again."""
        kept = self._inputs.get(width)
        if kept is None or len(kept.values) < count:
            kept = Inputs.empty(count, width)
            if kept.values.size <= _MOST_KEPT:
                self._inputs[width] = kept
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
        self.nbytes = sum(each.nbytes for each in weights)

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
class _Layer:
    """One layer; norms that it does not have are empty."""

    attn_norm: Floats
    qkv: Product
    q_norm: Floats
    k_norm: Floats
    o: Product
    after_attention: Floats
    ffn_norm: Floats
    router: Floats
    feed: list[tuple[Product, Product]]  # gate and up, down; one pair, or one per expert
    after_feed: Floats
    rope: int
    window: int


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """A step's rows: pages, and by row its part and position; where pieces of a sequence begin that share keys."""

    tables: Integers
    places: Integers
    positions: Integers
    starts: Integers


class Model:
    """A loaded model."""

    def __init__(self, file: WeightFile, *, threads: int) -> None:
        """Load and pack the weights of a file.

        Raises `UnsupportedModel` if they cannot be served.
        """
        self.geometry = its = file.geometry
        if its.hidden % BLOCK or its.inner % BLOCK or its.heads * its.head_dim % BLOCK or its.head_dim % 4:
            raise refusal(its.kind, f"a width of it is no multiple of {BLOCK}")
        file.require_shapes()
        self._threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        self._loops = loops(parallel=self._threads > 1)
        self._workspace = Workspace()
        self._eps = np.float32(its.eps)
        self._ropes, self._rope_of = _turns(its)
        self._embedding = file.pack(["token_embd.weight"])[0]
        head = file.pack(["output.weight"]) if "output.weight" in file else [self._embedding]
        self._head = Product("head", head, None, self._workspace)
        self._norm = self._vector(file, "output_norm.weight")
        self._layers = [self._load(file, 0)]
        with ThreadPoolExecutor(self._threads + 1) as pool:
            # The loops of a forward pass take seconds to compile, in which other threads pack weights.
            compiling = pool.submit(self.forward, [Part([0], 0, [0], 1)], _one_page(its))
            others = list(pool.map(lambda number: self._load(file, number), range(1, its.layers)))
            compiling.result()
        self._layers += others

    def _vector(self, file: WeightFile, name: str) -> Floats:
        found = file.vector(name)
        return _NONE if found is None else found

    def _load(self, file: WeightFile, number: int) -> _Layer:
        its, prefix = self.geometry, f"blk.{number}."

        def vector(name: str) -> Floats:
            return self._vector(file, f"{prefix}{name}.weight")

        gemma = its.kind == "gemma3"
        return _Layer(
            attn_norm=vector("attn_norm"),
            qkv=self._queries(file, prefix),
            q_norm=vector("attn_q_norm"),
            k_norm=vector("attn_k_norm"),
            o=self._product(file, prefix, ["attn_output"]),
            after_attention=vector("post_attention_norm") if gemma else _NONE,
            ffn_norm=vector("ffn_norm"),
            router=vector("ffn_gate_inp") if its.experts else _NO_COLUMNS,
            feed=self._feed(file, prefix),
            after_feed=vector("post_ffw_norm") if gemma else _NONE,
            rope=self._rope_of[number],
            window=its.windows[number],
        )

    def _queries(self, file: WeightFile, prefix: str) -> Product:
        its = self.geometry
        if f"{prefix}attn_qkv.weight" in file:
            return self._product(file, prefix, ["attn_qkv"])
        orders = [_apart(its.heads, its.head_dim), _apart(its.kv_heads, its.head_dim), None]
        return self._product(file, prefix, ["attn_q", "attn_k", "attn_v"], orders if its.neighbours else ())

    def _product(
        self,
        file: WeightFile,
        prefix: str,
        names: Sequence[str],
        orders: Sequence[npt.NDArray[np.intp] | None] = (),
    ) -> Product:
        weights = file.pack([f"{prefix}{name}.weight" for name in names], orders=orders)
        found = [file.vector(f"{prefix}{name}.bias") for name in names]
        bias = None
        if any(each is not None for each in found):
            ordered = [
                each if order is None or each is None else each[order]
                for each, order in zip(found, orders or [None] * len(names), strict=True)
            ]
            bias = np.concatenate([each for each in ordered if each is not None])
            assert len(bias) == sum(each.outputs for each in weights), "all of these have a bias, or none"
        return Product(names[0], weights, bias, self._workspace)

    def _feed(self, file: WeightFile, prefix: str) -> list[tuple[Product, Product]]:
        if not self.geometry.experts:
            both = ["ffn_gate", "ffn_up"] if f"{prefix}ffn_gate.weight" in file else ["ffn_up"]
            return [(self._product(file, prefix, both), self._product(file, prefix, ["ffn_down"]))]
        both, down = ([f"{prefix}ffn_{each}_exps.weight" for each in names] for names in (("gate", "up"), ("down",)))
        return [
            (
                Product("ffn_gate", file.pack_expert(both, expert), None, self._workspace),
                Product("ffn_down", file.pack_expert(down, expert), None, self._workspace),
            )
            for expert in range(self.geometry.experts)
        ]

    def forward(self, parts: Sequence[Part], pages: Pages) -> Floats:
        """Compute the tokens of each part; return the logits of its last `rows`, `[sum of rows, vocabulary]`."""
        its = self.geometry
        numba.set_num_threads(self._threads)  # which holds for the calling thread alone
        layout = _lay_out(parts)
        x = rows(self._embedding, [token for part in parts for token in part.tokens])
        if its.embedding_scale != 1:
            x *= np.float32(its.embedding_scale)
        more = np.empty((len(x), 0), np.float32)
        for number, layer in enumerate(self._layers):
            normal = self._normalize(x, more, layer.attn_norm)
            found = layer.o(self._attend(number, layer, layer.qkv(normal), layout, pages))
            more = self._added(x, found, layer.after_attention)
            normal = self._normalize(x, more, layer.ffn_norm)
            found = self._route(x, normal, layer) if its.experts else self._fed(normal, layer.feed[0])
            more = self._added(x, found, layer.after_feed)
        wanted, end = list[int](), 0
        for part in parts:
            end += len(part.tokens)
            wanted += range(end - part.rows, end)
        return self._head(self._normalize(x[wanted], more[wanted], self._norm))[:, : its.rows]

    def _normalize(self, x: Floats, more: Floats, weight: Floats) -> Inputs:
        """Add `more` to `x` in place; return the normalized rows."""
        into = self._workspace.inputs(len(x), x.shape[1])
        self._loops.normalize(x, more, weight, self._eps, into.values, into.scales, into.sums)
        return into

    def _added(self, x: Floats, more: Floats, norm: Floats) -> Floats:
        """Return what is left to be added to `x`: nothing where it is normalized first."""
        if not len(norm):
            return more
        self._loops.add_normalized(x, more, norm, self._eps)
        return more[:, :0]

    def _attend(self, number: int, layer: _Layer, qkv: Floats, layout: _Layout, pages: Pages) -> Inputs:
        its = self.geometry
        cos, sin = self._ropes[layer.rope]
        where = (layout.tables, layout.places, layout.positions)
        scale = np.float32(its.attention_scale)
        norms = (layer.q_norm, layer.k_norm)
        self._loops.place(qkv, *norms, self._eps, scale, cos, sin, *where, number, pages.keys, pages.values, its.heads)
        attended = self._workspace.floats("attended", len(qkv), its.heads * its.head_dim)
        shared = its.heads // its.kv_heads
        self._loops.attend(qkv, *where, layout.starts, layer.window, number, pages.keys, pages.values, shared, attended)
        into = self._workspace.inputs(len(qkv), attended.shape[1])
        self._loops.quantize(attended, into.values, into.scales, into.sums)
        return into

    def _fed(self, normal: Inputs, feed: tuple[Product, Product]) -> Floats:
        its, (gate_up, down) = self.geometry, feed
        both = gate_up(normal)
        into = self._workspace.inputs(len(both), its.inner)
        self._loops.gate(both, its.inner, its.gelu, into.values, into.scales, into.sums)
        return down(into)

    def _route(self, x: Floats, normal: Inputs, layer: _Layer) -> Floats:
        """Return the weighted sum of the experts of each row, added in the order of the experts."""
        its = self.geometry
        logits = np.empty((len(x), its.experts), np.float32)
        self._loops.route(x, layer.ffn_norm, layer.router, self._eps, logits)
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, : its.experts_used]
        shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        shares = np.take_along_axis(shares, chosen, 1)
        if its.experts_normalized:
            shares /= shares.sum(1, keepdims=True)
        total = np.zeros((len(x), its.hidden), np.float32)
        for expert in np.unique(chosen):
            places, ranks = np.nonzero(chosen == expert)
            part = Inputs(normal.values[places], normal.scales[places], normal.sums[places])
            found = self._fed(part, layer.feed[expert])[:, : its.hidden]
            total[places] += found * shares[places, ranks].astype(np.float32)[:, None]
        return total


def _one_page(its: Geometry) -> Pages:
    return Pages(ProcessMemory(layers=its.layers, kv_heads=its.kv_heads, dim=its.head_dim, count=1))


def _turns(its: Geometry) -> tuple[list[tuple[Floats, Floats]], list[int]]:
    """Return cosines and sines by position, once for all layers that share them, and their place by layer."""
    distinct = list({id(rope): rope for rope in its.ropes}.values())
    made = []
    for rope in distinct:
        angles = np.arange(its.context)[:, None] * (np.empty(0) if rope is None else rope.frequencies)
        scale = 1.0 if rope is None else rope.scale
        made.append(tuple((turn(angles) * scale).astype(np.float32) for turn in (np.cos, np.sin)))
    places = [next(place for place, each in enumerate(distinct) if each is rope) for rope in its.ropes]
    return [(cos, sin) for cos, sin in made], places


def _apart(heads: int, dim: int) -> npt.NDArray[np.intp]:
    """Return the order of rows in which the halves of a head are rotated together, and not neighbours."""
    return np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _lay_out(parts: Sequence[Part]) -> _Layout:
    longest = max(-(-(part.start + len(part.tokens)) // PAGE) for part in parts)
    tables = np.zeros((len(parts), longest), np.int32)
    places, positions, starts = list[int](), list[int](), [0]
    for number, part in enumerate(parts):
        pages = part.table[:longest]
        tables[number, : len(pages)] = pages
        count = len(part.tokens)
        places += [number] * count
        positions += range(part.start, part.start + count)
        starts += range(starts[-1] + ROWS_AT_ONCE, len(positions), ROWS_AT_ONCE)
        starts.append(len(positions))
    return _Layout(tables, *(np.array(each, np.int32) for each in (places, positions, starts)))
