"""What is asked in the benchmark's conversations, and the rules that many devices begin with."""

from collections.abc import Callable
from typing import Final

# Of about one length, so that the turns' times to the first token can be compared.
QUESTIONS: Final = (
    "Which vegetables grow well on a small balcony in spring?",
    "How much water does each of them need on a hot day?",
    "What kind of soil should I buy for the first pots?",
    "Which of these plants should not stand beside each other?",
    "How can I keep snails away without using any poison?",
    "When is the best time of the year to sow beans?",
    "How do I know that the tomatoes are ripe enough to pick?",
    "What should I do with the plants before the first frost?",
    "Which tools will I really need for all of this work?",
    "Can you sum up the most important points of what you said?",
)

_RULES: Final = (
    "Read the whole report of the machine before you answer anything about it.",
    "Name the part that has failed first, and then what may have led to its failure.",
    "Give every measured value with its unit, and say when it was measured.",
    "If a value is missing from the report, say so and do not make one up.",
    "Write short sentences that a mechanic can read on a small screen.",
    "Never advise anybody to open the housing while the machine has power.",
    "Say what to check next, in the order in which it takes the least time.",
    "Answer in the language in which the question was asked.",
)


def system_of(conversation: int) -> str:
    """Return what a conversation begins with; no two begin alike."""
    return f"Talk {conversation}: you help people who garden, and you answer in a few short sentences."


def rules(count: Callable[[str], int], *, tokens: int) -> str:
    """Return rules of at least that many tokens."""
    lines: list[str] = []
    while not lines or count("\n".join(lines)) < tokens:
        lines.append(f"Rule {len(lines) + 1}. {_RULES[len(lines) % len(_RULES)]}")
    return "\n".join(lines)
