"""Forward pass over weights in blocks of 32, for many sequences at once, without padding.

Products have quantized inputs; the rest is float32. Each row is computed in an order of its own, so that its logits are
the same to the bit whatever is computed with it, and on every processor.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numba
import numpy as np

from fleet_edge.verifiers.blocks.architectures import refusal
from fleet_edge.verifiers.blocks.geometry import LOGGED, Attention, Convolution, Geometry, Recurrence
from fleet_edge.verifiers.blocks.kv import PAGE, Pages, ProcessMemory
from fleet_edge.verifiers.blocks.layout import BLOCK
from fleet_edge.verifiers.blocks.loops import ROWS_AT_ONCE, loops
from fleet_edge.verifiers.blocks.parts import (
    NONE,
    AttentionPart,
    ConvolutionPart,
    DenseAndExperts,
    EmbeddingPart,
    ExpertsPart,
    FeedForward,
    Layout,
    Loader,
    MtpPart,
    Numbers,
    Product,
    RecurrencePart,
    WeightFile,
    Workspace,
    fits_blocks,
)
from fleet_edge.verifiers.blocks.portable import Floats
from fleet_edge.verifiers.blocks.products import Inputs
from fleet_edge.verifiers.blocks.states import NO_REPLAY, Replay
from fleet_edge.verifiers.blocks.weights import rows


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part of a step: its pages, the number of tokens before, the new tokens, the rows wanted.

    `replay` is for recurrent layers. For the layer that proposes tokens, `again` is the number of tokens that it has
    seen already, and `before` the normalized row `[1, hidden]` of the token before the part, if it is known.
    """

    table: Sequence[int]
    start: int
    tokens: Sequence[int]
    rows: int
    replay: Replay = NO_REPLAY
    again: int = 0
    before: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One layer; norms that it does not have are empty."""

    mixer_norm: Floats
    mix: AttentionPart | ConvolutionPart | RecurrencePart | None
    after_mixer: Floats
    feed_norm: Floats
    feed: Callable[[Floats, Inputs], Floats] | None
    after_feed: Floats
    embed: EmbeddingPart | None
    scale: np.float32


class _LayerEmbeddings:
    """The embeddings of Gemma 4 E: for each token and layer some numbers, added to a product with its embedding."""

    def __init__(self, file: WeightFile, numbers: Numbers) -> None:
        self._weights = file.pack(["per_layer_token_embd.weight"])[0]
        self._product = Product("by layer", file.pack(["per_layer_model_proj.weight"]), None, numbers.workspace)
        norm = file.vector("per_layer_proj_norm.weight")
        self._norm, self._numbers = NONE if norm is None else norm, numbers

    def __call__(self, tokens: Sequence[int], x: Floats) -> Floats:
        """Return `[layers, rows, width]`."""
        its = self._numbers.geometry
        layers, width = len(its.layers), its.per_layer
        found = rows(self._weights, tokens) * np.float32(width**0.5)
        projected = self._product(self._numbers.quantized(x))[:, : layers * width] * np.float32(its.hidden**-0.5)
        flat = found.reshape(-1, width)
        self._numbers.loops.add_normalized(flat, projected.reshape(-1, width), self._norm, self._numbers.eps)
        flat *= np.float32(2**-0.5)
        return np.ascontiguousarray(flat.reshape(len(x), layers, width).swapaxes(0, 1))


class Model:
    """A loaded model.

    Attributes:
        hidden: With a layer that proposes tokens, the normalized rows of the last step, of all its tokens.
        no_row: Such a row where there is none, `[1, hidden]`.
    """

    def __init__(self, file: WeightFile, *, threads: int) -> None:
        """Load and pack the weights of a file.

        Raises `UnsupportedModel` if they cannot be served.
        """
        self.geometry = its = file.geometry
        if not fits_blocks(its):
            raise refusal(its.kind, f"a width of it is no multiple of {BLOCK}")
        file.require_shapes()
        self._threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        self._numbers = Numbers(its, loops(parallel=self._threads > 1), Workspace(), np.float32(its.eps))
        self._turns = _turns(its)
        self._embedding = file.pack(["token_embd.weight"])[0]
        head = file.pack(["output.weight"]) if "output.weight" in file else [self._embedding]
        self._head = Product("head", head, None, self._numbers.workspace)
        norm = file.vector(f"{its.output_norm}.weight")
        self._norm = NONE if norm is None else norm * np.float32(its.logit_scale)
        self._by_layer = _LayerEmbeddings(file, self._numbers) if its.per_layer else None
        self.hidden, self.no_row = (np.zeros((count, its.hidden), np.float32) for count in (0, 1))
        self._mtp = None
        if its.mtp is not None:
            number = len(its.layers)
            loader = Loader(file, number, self._numbers)
            self._mtp = MtpPart(loader, its.mtp, self._turns[number], its.place(number), self._norm)
        self._layers = [self._load(file, 0)]
        with ThreadPoolExecutor(self._threads + 1) as pool:
            # The loops of a forward pass take seconds to compile, in which other threads pack weights.
            memory = ProcessMemory(its.pools, 1, its.states(1))
            compiling = pool.submit(self.forward, [Part([0], 0, [0], 1)], Pages(memory), memory.states)
            others = list(pool.map(lambda number: self._load(file, number), range(1, len(its.layers))))
            compiling.result()
        self._layers += others

    def _load(self, file: WeightFile, number: int) -> _Layer:
        its, loader = self.geometry, Loader(file, number, self._numbers)
        layer = its.layers[number]
        scale = loader.vector("layer_output_scale.weight") if its.sandwich else NONE
        return _Layer(
            mixer_norm=loader.vector("attn_norm.weight"),
            mix=(
                None
                if layer.mixer is None
                else ConvolutionPart(loader, layer.mixer, its.place(number))
                if isinstance(layer.mixer, Convolution)
                else RecurrencePart(loader, layer.mixer, its.place(number)[1])
                if isinstance(layer.mixer, Recurrence)
                else AttentionPart(loader, layer.mixer, self._turns[number], its.place(number))
            ),
            after_mixer=loader.vector("post_attention_norm.weight") if its.sandwich else NONE,
            feed_norm=loader.vector(f"{its.feed_norm}.weight"),
            feed=(
                DenseAndExperts(loader, layer.inner, layer.experts)
                if layer.inner and layer.experts is not None
                else ExpertsPart(loader, layer.experts)
                if layer.experts is not None
                else FeedForward(loader, layer.inner)
                if layer.inner
                else None
            ),
            after_feed=loader.vector("post_ffw_norm.weight") if its.sandwich else NONE,
            embed=EmbeddingPart(loader) if its.per_layer else None,
            scale=np.float32(scale[0] if len(scale) else 1),
        )

    def forward(self, parts: Sequence[Part], pages: Pages, states: Sequence[Floats] = ()) -> Floats:
        """Compute the tokens of each part; return the logits of its last `rows`, `[sum of rows, vocabulary]`.

        `states` are the arrays of the memory.
        """
        its, numbers = self.geometry, self._numbers
        numba.set_num_threads(self._threads)  # which holds for the calling thread alone
        layout = _lay_out(parts, states)
        tokens = [token for part in parts for token in part.tokens]
        x = rows(self._embedding, tokens)
        if its.embedding_scale != 1:
            x *= np.float32(its.embedding_scale)
        by_layer = None if self._by_layer is None else self._by_layer(tokens, x)
        more = np.empty((len(x), 0), np.float32)
        for number, layer in enumerate(self._layers):
            if layer.mix is not None:
                found = layer.mix(x, numbers.normalized(x, more, layer.mixer_norm), layout, pages)
                more = self._added(x, found, layer.after_mixer)
            if layer.feed is not None:
                found = layer.feed(x, numbers.normalized(x, more, layer.feed_norm))
                more = self._added(x, found, layer.after_feed)
            if layer.embed is not None and by_layer is not None:
                layer.embed(x, by_layer[number])
            if layer.scale != 1:
                x *= layer.scale
        wanted, end = list[int](), 0
        for part in parts:
            end += len(part.tokens)
            wanted += range(end - part.rows, end)
        logits = self._head(numbers.normalized(x[wanted], more[wanted], self._norm))
        if its.cap:
            numbers.loops.bound(logits, np.float32(its.cap))
        if self._mtp is not None:
            self.hidden = numbers.rows_normalized(x + more[:, : its.hidden], self._norm)
            self._follow(parts, pages)
        return logits[:, : its.rows]

    def propose(self, parts: Sequence[Part], pages: Pages) -> tuple[Floats, Floats]:
        """Compute the layer that proposes tokens, for one token of each part.

        Returns the logits, `[parts, vocabulary]`, and the normalized rows, which are `before` of the next token.
        """
        assert self._mtp is not None
        numba.set_num_threads(self._threads)
        found = self._propose(parts, np.concatenate([self._before(part) for part in parts]), pages)
        head = self._mtp.head or self._head
        return head(self._numbers.quantized(found))[:, : self.geometry.rows], found

    def _follow(self, parts: Sequence[Part], pages: Pages) -> None:
        """Compute keys and values of a step's tokens in the layer that proposes tokens."""
        new, before, end = list[Part](), list[Floats](), 0
        for part in parts:
            begin, end = end + part.again, end + len(part.tokens)
            if begin < end:
                new.append(replace(part, start=part.start + part.again, tokens=part.tokens[part.again :]))
                before.append(self.hidden[begin - 1 : begin] if part.again else self._before(part))
                before.append(self.hidden[begin : end - 1])
        if new:
            self._propose(new, np.concatenate(before), pages)

    def _propose(self, parts: Sequence[Part], before: Floats, pages: Pages) -> Floats:
        assert self._mtp is not None
        tokens = [token for part in parts for token in part.tokens]
        embedded = rows(self._mtp.embedding or self._embedding, tokens)
        return self._mtp(embedded, before, _lay_out(parts, ()), pages)

    def _before(self, part: Part) -> Floats:
        return self.no_row if part.before is None else part.before

    def _added(self, x: Floats, more: Floats, norm: Floats) -> Floats:
        """Return the rest to add to `x`; it has no columns where `x` has the sum already."""
        if not len(norm):
            return more
        self._numbers.loops.add_normalized(x, more, norm, self._numbers.eps)
        return more[:, :0]


def _turns(its: Geometry) -> list[tuple[Floats, Floats]]:
    """Return by layer the cosines and sines of positions, which layers with the same rotary embedding share."""
    made: dict[int, tuple[Floats, Floats]] = {}
    ropes = [layer.mixer.rope if isinstance(layer.mixer, Attention) else None for layer in its.all_layers]
    for rope in ropes:
        if id(rope) not in made:
            angles = np.arange(its.context)[:, None] * (np.empty(0) if rope is None else rope.frequencies)
            scale = 1.0 if rope is None else rope.scale
            cos, sin = ((turn(angles) * scale).astype(np.float32) for turn in (np.cos, np.sin))
            made[id(rope)] = cos, sin
    return [made[id(rope)] for rope in ropes]


def _lay_out(parts: Sequence[Part], states: Sequence[Floats]) -> Layout:
    longest = max(-(-(part.start + len(part.tokens)) // PAGE) for part in parts)
    tables = np.zeros((len(parts), longest), np.int32)
    places, positions, starts = list[int](), list[int](), [0]
    replays, of_row = list[tuple[int, ...]](), list[int]()
    tail = states[1].shape[2] - LOGGED if states else 0
    for number, part in enumerate(parts):
        pages = part.table[:longest]
        tables[number, : len(pages)] = pages
        count, its = len(part.tokens), part.replay
        replays.append(
            (len(of_row), len(places), count, its.source, its.logged, its.into, its.settled, its.copy, its.copied)
        )
        of_row += [number] * (tail + its.logged + count if states else 0)
        places += [number] * count
        positions += range(part.start, part.start + count)
        starts += range(starts[-1] + ROWS_AT_ONCE, len(positions), ROWS_AT_ONCE)
        starts.append(len(positions))
    where = (np.array(each, np.int32) for each in (places, positions, starts))
    return Layout(tables, *where, replays=np.array(replays, np.int32), of_row=np.array(of_row, np.int32), states=states)
