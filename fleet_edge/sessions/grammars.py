"""Grammars of an edge: compiled apart from the thread that answers devices, and granted or refused with the session.

Compiling takes some tenths of a second at worst, and the first grammar a second more, since the vocabulary is prepared
for it. A grammar that is known is there at once.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.constraint import Constraint
from fleet_runtime.grammar.compiler import GrammarCompiler
from fleet_runtime.grammar.errors import GrammarError
from schemas.messages import Open
from schemas.reasons import RefusalCode

__all__ = ["Grammars", "Prepared"]

_MOST: Final = 64
_MOST_OF_A_DEVICE: Final = 4
"""Opens that wait for their grammars."""

_SHORT: Final = 64
"""Tokens of a text that is resumed which a known grammar follows at once: a longer one takes milliseconds."""

Prepared = Callable[[Constraint | OpenRefused], None]
"""Told, by the way that `call` is, what has become of a grammar."""


@dataclass(slots=True)
class Grammars:
    """Makes constraints.

    Attributes:
        compiler: None where the engine's tokens are not known, or not all of a row: then no grammar is served.
        call: Has a function called on the thread that answers devices.
    """

    compiler: GrammarCompiler | None = None
    call: Callable[[Callable[[], None]], object] = lambda function: function()
    _waiting: dict[tuple[str, bytes], int] = field(default_factory=dict)  # by session, the attempt
    _pool: ThreadPoolExecutor | None = None

    def waits(self, device: str, message: Open) -> bool:
        """Whether an Open is a repetition of one whose grammar is being prepared."""
        return self._waiting.get((device, message.session)) == message.attempt

    def forget(self, device: str, session: bytes) -> None:
        """A session is closed before it was granted: nobody is to be told of its grammar."""
        self._waiting.pop((device, session), None)

    def at_once(self, message: Open) -> Constraint | None:
        """Return the constraint of an Open if that takes no time; else None, and it is to be prepared.

        Raises:
            OpenRefused: Its grammar cannot be used.
        """
        compiler, grammar = self._compiler(), message.policy.grammar
        assert grammar is not None
        if compiler.knows(grammar) and len(message.resume or ()) <= _SHORT:
            return _constraint(compiler, message)
        return None

    def prepare(self, device: str, message: Open, then: Prepared) -> None:
        """Have the constraint of an Open made, and the result told, unless the session is closed before.

        Raises:
            OpenRefused: Too many wait already.
        """
        compiler, key = self._compiler(), (device, message.session)
        of_device = Counter(owner for owner, _ in self._waiting)[device]
        if len(self._waiting) >= _MOST or of_device >= _MOST_OF_A_DEVICE:
            raise OpenRefused(
                RefusalCode.BUSY, "The edge has as many grammars to prepare as it can; try again shortly."
            )
        self._waiting[key] = message.attempt
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._pool.submit(self._prepare, compiler, key, message, then)

    def _prepare(self, compiler: GrammarCompiler, key: tuple[str, bytes], message: Open, then: Prepared) -> None:
        found: Constraint | OpenRefused
        try:
            found = _constraint(compiler, message)
        except OpenRefused as error:
            found = error
        except Exception:  # noqa: BLE001 - whatever it is, the device is not to wait for ever
            found = OpenRefused(RefusalCode.GRAMMAR, "The edge could not prepare the grammar; its log may say more.")
        self.call(lambda: self._tell(key, message, found, then))

    def _tell(self, key: tuple[str, bytes], message: Open, found: Constraint | OpenRefused, then: Prepared) -> None:
        if self._waiting.get(key) == message.attempt:
            del self._waiting[key]
            then(found)

    def _compiler(self) -> GrammarCompiler:
        if self.compiler is None:
            raise OpenRefused(
                RefusalCode.GRAMMAR,
                "This edge's engine serves no grammars (response_format, tools, grammar); leave them out, or use an "
                "edge with the engine llama.cpp or torch.",
            )
        return self.compiler


def _constraint(compiler: GrammarCompiler, message: Open) -> Constraint:
    assert message.policy.grammar is not None
    try:
        matcher = compiler.matcher(message.policy.grammar)
        matcher.check(message.resume or ())
    except GrammarError as error:
        raise OpenRefused(RefusalCode.GRAMMAR, str(error)) from None
    return Constraint(matcher)
