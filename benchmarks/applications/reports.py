"""Prompts of the suffix benchmark: readings that are to be made into reports of one form, and questions that differ."""

import random
from dataclasses import dataclass
from typing import Final

_RULES: Final = (
    "Shift reports of the pumping station. Every report has the same form.\n\n"
    "Reading: pump 3, 71 C, 2.1 bar, low vibration, operator Weber\n"
    "Report: Pump 3 was inspected at the end of the shift. The temperature of the bearing is 71 C and the pressure is "
    "2.1 bar. The vibration is low. No further action is required. Signed by Weber.\n\n"
)
_OPERATORS: Final = ("Weber", "Okafor", "Lindqvist", "Moreau", "Tanaka", "Silva")
_VIBRATION: Final = ("low", "normal", "raised")

_SUBJECTS: Final = (
    "a harbour in winter", "the invention of paper", "how bees find flowers", "a train that never stops",
    "learning to play the violin", "why bridges sway", "the first day at a new school", "baking bread at high altitude",
    "a map of an unknown island", "how vaccines are tested", "an old clockmaker", "the colours of minerals",
    "moving to another country", "why leaves fall", "a library under the sea", "repairing a bicycle",
    "the history of chess", "a conversation between two rivers", "how glass is made", "saving money for a journey",
    "a storm on the lake", "training for a marathon", "the uses of salt", "a letter to a lost friend",
)  # fmt: skip
_FORMS: Final = ("Write a short paragraph about {}.", "Tell me something surprising about {}, in your own words.")

QUESTIONS: Final = tuple(form.format(subject) for form in _FORMS for subject in _SUBJECTS)
"""All of them differ, and so do the answers."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one report is about."""

    pump: int
    temperature: int
    pressure: float
    vibration: str
    operator: str

    @classmethod
    def of(cls, number: int) -> "Reading":
        """Return the reading of a number, always the same one."""
        rng = random.Random(number)
        return cls(
            rng.randint(1, 24),
            rng.randint(48, 96),
            rng.randint(12, 39) / 10,
            rng.choice(_VIBRATION),
            rng.choice(_OPERATORS),
        )


def report_prompt(number: int) -> str:
    """Return the prompt of a report, to be continued."""
    reading = Reading.of(number)
    return (
        f"{_RULES}Reading: pump {reading.pump}, {reading.temperature} C, {reading.pressure} bar, "
        f"{reading.vibration} vibration, operator {reading.operator}\nReport:"
    )
