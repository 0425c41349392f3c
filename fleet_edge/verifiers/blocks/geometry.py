"""What a model is made of: a list of layers, each with its attention and its feed-forward part."""

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary embedding: the angle per position of each pair of numbers, and a factor of cosines and sines."""

    frequencies: npt.NDArray[np.float64]
    scale: float = 1.0


class Activation(IntEnum):
    """What becomes of the gate of a feed-forward layer; compiled loops know the numbers."""

    SILU = 0
    GELU = 1
    CLAMPED = 2  # gpt-oss: gate and up are limited, and up has one added
    SQUARED = 3  # Nemotron-H: there is no gate, and up goes through ReLU and is squared

    @property
    def has_gate(self) -> bool:
        return self is not Activation.SQUARED


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Attention:
    """Attention of a layer.

    Attributes:
        window: Number of tokens that a token sees; 0 is all.
        rope: None if queries and keys are not rotated.
        cap: Bound of the scores, which `tanh` approaches; 0 if there is none.
        source: The earlier layer whose keys and values it reads instead of its own.
        heads_normalized: Whether queries and keys of each head MUST have norms; optional otherwise.
        values_normalized: Whether values are normalized, without weights.
        has_values: Whether there is a product for values; if not, they are the keys as they were before their norm.
        has_sinks: Whether each head has a score that takes a share and adds nothing.
        is_gated: Whether each head's result is multiplied by a gate that comes with its queries.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    rope: Rope | None
    window: int = 0
    cap: float = 0.0
    source: int | None = None
    heads_normalized: bool = False
    values_normalized: bool = False
    has_values: bool = True
    has_sinks: bool = False
    is_gated: bool = False


LOGGED: Final = 16
"""Most tokens after a state that are kept so that they can be taken back: as many as a draft usually has."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Recurrence:
    """Gated delta rule or Mamba-2 of a layer: a matrix for each head of values, which every token changes.

    A state is kept with what the `LOGGED` tokens after it change (see `states`). Queries, keys and values come from a
    convolution, whose last inputs belong to the state.

    Attributes:
        is_mamba: Whether it is Mamba-2, whose names are C, B and x for queries, keys and values.
        key_heads: Number of heads of queries and of keys (groups in Mamba-2); each serves several heads of values.
        in_turn: Whether head `n` of values has keys `n % key_heads`, as in a GGUF of Qwen3.5; if not, neighbours share.
        kernel: Number of tokens that the convolution mixes.
        eps: Epsilon of the norm of the results.
    """

    is_mamba: bool
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    eps: float
    in_turn: bool = False

    @property
    def channels(self) -> int:
        """Width of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def inputs(self) -> int:
        """Width of the product of Mamba-2: gates, what is convolved, and time steps."""
        return self.values + self.channels + self.value_heads

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of its matrices, of the inputs of its convolution, and of decays and rates of logged tokens."""
        return (
            (self.value_heads, self.key_dim, self.value_dim),
            (self.kernel - 1 + LOGGED, self.channels),
            (LOGGED, 2 * self.value_heads),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Convolution:
    """Short convolution of a layer: a token's numbers are mixed with those of the tokens before it.

    What it needs of earlier tokens lies in pages, half of it where attention has keys, and half where it has values: so
    a sequence is cut and forked at any token.
    """

    width: int
    kernel: int


Mixer = Attention | Convolution | Recurrence


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Experts:
    """Experts of a layer.

    Attributes:
        inner: Width of an expert.
        normalized: Whether the shares of the chosen experts are divided by their sum.
        shared: Width of the expert that every row uses; 0 if there is none.
        shared_gated: Whether that expert has a gate of its own.
        has_biases: Whether the router and all products have biases.
        scaled: Whether the router has norm and scales of its own, and each expert's share a factor, as in Gemma 4.
        groups: Number of groups of experts; of each row's experts, all are in `used_groups` of them. Shares are then
            sigmoids times `factor`, and experts are chosen by them with a bias added. 0 if shares are a softmax.
        latent: Width of what experts read and write, which products shrink and widen; 0 if that of the model.
    """

    count: int
    used: int
    inner: int
    normalized: bool = True
    shared: int = 0
    shared_gated: bool = True
    has_biases: bool = False
    scaled: bool = False
    groups: int = 0
    used_groups: int = 0
    factor: float = 1.0
    latent: int = 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Layer:
    """A layer: its mixer of tokens, then a dense feed-forward part of width `inner`, experts, or both together.

    Layers of Nemotron-H have either a mixer or a feed-forward part.
    """

    mixer: Mixer | None
    inner: int = 0
    experts: Experts | None = None


class Pool(NamedTuple):
    """Keys and values of one shape: the number of layers that have them, and their heads; a convolution has one."""

    layers: int
    kv_heads: int
    dim: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Geometry:
    """Shape and constants of a model.

    Attributes:
        rows: Size of the vocabulary, padding included.
        cap: Bound of the logits, which `tanh` approaches; 0 if there is none.
        logit_scale: Factor of the logits.
        neighbours: Whether rows of queries and keys lie such that neighbours are rotated together, as a GGUF of Llama
            has them, and not the first with the second half of a head.
        sandwich: Whether the results of attention and feed-forward parts are normalized before they are added.
        feed_norm: Name in a GGUF of the norm before the feed-forward part.
        output_norm: Name in a GGUF of the norm before the head.
        per_layer: Width of the embedding that each layer adds, as in Gemma 4 E; 0 if there is none.
        mtp: The layer that proposes tokens (multi-token prediction), which follows the others; None if it is not used.
    """

    kind: str
    layers: tuple[Layer, ...]
    hidden: int
    rows: int
    context: int
    eps: float
    end_tokens: tuple[int, ...]
    activation: Activation = Activation.SILU
    embedding_scale: float = 1.0
    cap: float = 0.0
    logit_scale: float = 1.0
    neighbours: bool = False
    sandwich: bool = False
    feed_norm: str = "ffn_norm"
    output_norm: str = "output_norm"
    per_layer: int = 0
    mtp: Layer | None = None

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        return self.layers if self.mtp is None else (*self.layers, self.mtp)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """What pages hold of a token, by shape."""
        counts = Counter(shape for layer in self.all_layers if (shape := _shape(layer.mixer)) is not None)
        return tuple(Pool(count, *shape) for shape, count in counts.items())

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arrays that hold the states of all recurrent layers, which are alike; empty without any."""
        found = [layer.mixer for layer in self.layers if isinstance(layer.mixer, Recurrence)]
        return tuple((len(found), *shape) for shape in found[0].state_shapes) if found else ()

    def states(self, count: int) -> list[tuple[int, ...]]:
        """Return the shapes of arrays with a number of states."""
        return [(count, *shape) for shape in self.state_shapes]

    def place(self, number: int) -> tuple[int, int]:
        """Return the pool that a layer reads, and its place there; of a recurrent layer, its place among those."""
        mixer = self.all_layers[number].mixer
        if isinstance(mixer, Recurrence):
            return 0, sum(isinstance(layer.mixer, Recurrence) for layer in self.layers[:number])
        if isinstance(mixer, Attention) and mixer.source is not None:
            return self.place(mixer.source)
        shape = _shape(mixer)
        before = sum(_shape(layer.mixer) == shape for layer in self.layers[:number])
        shapes = [(pool.kv_heads, pool.dim) for pool in self.pools]
        return next(place for place, each in enumerate(shapes) if each == shape), before


def _shape(mixer: Mixer | None) -> tuple[int, int] | None:
    """Return the heads, and the size of a head, of what a layer keeps of a token; None if it keeps nothing."""
    if mixer is None or isinstance(mixer, Recurrence):
        return None
    if isinstance(mixer, Convolution):
        return 1, mixer.width // 2
    return None if mixer.source is not None else (mixer.kv_heads, mixer.dim)
