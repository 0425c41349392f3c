"""Verifier benchmark: one step of the packed verifier beside what bounds it and what it replaces.

    python -m benchmarks.verifier_step --target FOLDER [--json FILE]

For B sequences with T new tokens each: the step; the matrix products that any implementation has to do for as many
tokens (the bound); and, once, plain generation of one stream by transformers. All in one run on one machine and
interleaved, because ratios travel and absolute times do not.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from fleet_edge.verifiers.contract import Item, VerifierError
from fleet_edge.verifiers.packed.attention import IMPLEMENTATION
from fleet_edge.verifiers.packed.target import DTYPES, Target, load_target
from fleet_edge.verifiers.packed.verifier import PackedVerifier

__all__ = ["Generation", "Step", "main", "measure", "measure_generation"]

GENERATED = 32
WARM_UP = 2
KV_BYTES = 8 << 30
"""Enough for any step that can be asked for; memory is taken as sequences come."""


@dataclass(frozen=True, slots=True)
class Step:
    """One measured size of step.

    Attributes:
        sequences: B.
        new_tokens: T of each.
        context: Tokens computed before.
        step_ms: Median of the step.
        best_ms: Its minimum.
        bound_ms: Median of the matrix products alone.
        bound_best_ms: Its minimum.
    """

    sequences: int
    new_tokens: int
    context: int
    step_ms: float
    best_ms: float
    bound_ms: float
    bound_best_ms: float

    @property
    def over_bound(self) -> float:
        """How many times the bound the step takes, by the minima, which other work on the machine spares most."""
        return self.best_ms / self.bound_best_ms

    @property
    def tokens_per_s(self) -> float:
        """New tokens judged a second."""
        return 1e3 * self.sequences * self.new_tokens / self.step_ms


@dataclass(frozen=True, slots=True)
class Generation:
    """Plain generation of one stream.

    Attributes:
        tokens: Generated.
        token_ms: Mean of a token, prefill left out.
    """

    tokens: int
    token_ms: float


def measure(
    target: Target,
    *,
    sequences: Sequence[int],
    new_tokens: Sequence[int],
    context: int,
    repeats: int,
) -> list[Step]:
    """Measure every pair of `sequences` and `new_tokens`.

    Raises:
        VerifierError: The target cannot be served, or the context does not hold the step.
    """
    most = max(sequences)
    verifier = PackedVerifier(target, budget_bytes=KV_BYTES)
    size = target.info.vocabulary.size
    generator = torch.Generator().manual_seed(0)
    for sequence in range(most):
        verifier.open(sequence)
        text = torch.randint(size, (context,), generator=generator).tolist()
        for start in range(0, context, 256):
            verifier.score([Item(sequence, text[start : start + 256], 0)])
    steps = []
    for count in sequences:
        for new in new_tokens:
            draft = torch.randint(size, (count, new), generator=generator).tolist()
            items = [Item(sequence, draft[sequence], new) for sequence in range(count)]

            def step(items: Sequence[Item] = items) -> None:
                verifier.score(items)
                for item in items:
                    verifier.truncate(item.sequence, context)

            product = _products(target.model, rows=count * new)
            step_times, bound_times = _interleaved([step, product], repeats=repeats)
            steps.append(
                Step(
                    sequences=count,
                    new_tokens=new,
                    context=context,
                    step_ms=statistics.median(step_times),
                    best_ms=min(step_times),
                    bound_ms=statistics.median(bound_times),
                    bound_best_ms=min(bound_times),
                )
            )
    return steps


def measure_generation(target: Target, *, context: int) -> Generation:
    """Measure transformers' own greedy generation of one stream."""
    prompt = torch.randint(target.info.vocabulary.size, (1, context), generator=torch.Generator().manual_seed(0))
    target.model.set_attn_implementation("sdpa")

    def generate(tokens: int) -> float:
        start = time.perf_counter()
        target.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    try:
        generate(2)
        prefill = generate(1)
        whole = generate(GENERATED + 1)
    finally:
        target.model.set_attn_implementation(IMPLEMENTATION)
    return Generation(GENERATED, 1e3 * (whole - prefill) / GENERATED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks verifier-step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="folder, GGUF or repository id of the target model")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--sequences", type=_positive, nargs="+", default=[1, 4, 16, 64], metavar="B")
    parser.add_argument("--tokens", type=_positive, nargs="+", default=[1, 3, 5, 9], metavar="T")
    parser.add_argument("--context", type=_positive, default=256)
    parser.add_argument("--repeats", type=_positive, default=7)
    parser.add_argument("--threads", type=_positive, help="of torch; by default what torch chooses")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        target = load_target(options.target, dtype=options.dtype)
        steps = measure(
            target,
            sequences=options.sequences,
            new_tokens=options.tokens,
            context=options.context,
            repeats=options.repeats,
        )
    except VerifierError as error:
        print(error, file=sys.stderr)
        return 2
    generation = measure_generation(target, context=options.context)
    _print(target, steps, generation)
    if options.json is not None:
        figures = {
            "target": target.info.name,
            "dtype": str(target.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "generation": asdict(generation),
            "steps": [
                asdict(step) | {"over_bound": step.over_bound, "tokens_per_s": step.tokens_per_s} for step in steps
            ],
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _products(model: Any, *, rows: int) -> Callable[[], None]:  # noqa: ANN401 - transformers has no type information
    """Return a function that multiplies `rows` rows by every weight matrix of a forward, the head included."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {width: torch.randn(rows, width, dtype=model.dtype) for width in {weight.shape[1] for weight in weights}}

    def multiply() -> None:
        with torch.inference_mode():
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

    return multiply


def _interleaved(functions: Sequence[Callable[[], None]], *, repeats: int) -> list[list[float]]:
    """Return milliseconds by function; they take turns, so that a slow moment of the machine meets all."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(WARM_UP + repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn >= WARM_UP:
                taken.append(1e3 * (time.perf_counter() - start))
    return times


def _print(target: Target, steps: Sequence[Step], generation: Generation) -> None:
    dtype = str(target.model.dtype).removeprefix("torch.")
    print(f"{target.info.name}, {dtype}, {torch.get_num_threads()} threads, context {steps[0].context}")
    print(f"transformers generate, one stream: {generation.token_ms:.1f} ms a token")
    print("   B   T   step ms  best ms   bound   best/bound   tokens/s")
    for step in steps:
        print(
            f"{step.sequences:4d} {step.new_tokens:3d} {step.step_ms:9.1f} {step.best_ms:8.1f} "
            f"{step.bound_best_ms:7.1f} {step.over_bound:12.2f} {step.tokens_per_s:10.0f}"
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
