"""A model that thinks, calls a function about a lamp, and answers, in the tokens and the template of a real one."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.without_model import ScriptedDrafter

CONTEXT = 32_768
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ messages[0].content }}
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}"""
"""In the form of Qwen3's: the format of its calls, and its thinking."""

THOUGHT = "SECRET: what does the person want?"
PARIS = "The capital of France is Paris."
STORY = "Once upon a time there was a lamp. " + " ".join(f"Then came day {day}." for day in range(1, 80))
CALL = '<tool_call>\n{"name": "intent__HassTurnOn", "arguments": {"name": "Desk lamp"}}\n</tool_call>'
DONE = "The desk lamp is on."
CUT = 300
"""Characters of the story after which the edge goes away."""


class ScriptedModel(GgufModel):
    @property
    def chat_template(self) -> str:
        return TEMPLATE

    @functools.cache  # noqa: B019 - there is one
    def piece(self, token: int) -> bytes:
        return super().piece(token)


class Answers:
    """A language whose only text is the answer to what the prompt asks; the draft model is wrong now and then."""

    def __init__(self, file: GgufModel, *, draft: bool = False) -> None:
        self._file, self._draft = file, draft
        [self._start] = file.encode("<|im_start|>", special=True)
        self.reached_cut = threading.Event()

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        turns = [""]
        pieces: list[bytes] = []
        for token in prefix:
            if token == self._start:
                turns.append(b"".join(pieces).decode(errors="replace"))
                pieces = []
            else:
                pieces.append(self._file.piece(token))
        said = b"".join(pieces).decode(errors="replace").removeprefix("assistant\n")
        thought = "<think>\n\n</think>\n\n"
        if not said.startswith(thought):
            thought = f"<think>\n{THOUGHT}\n</think>\n\n"
        whole = thought + _answer(turns[-1])
        rest = whole.removeprefix(said) if whole.startswith(said) else ""
        if len(said) > CUT:
            self.reached_cut.set()
        token = self._file.encode(rest)[0] if rest else self._file.end_tokens[0]
        if self._draft and len(said) % 7 == 0:
            token = self._file.encode("!")[0]
        logits = np.full(self._file.vocabulary.size, -50.0, np.float32)
        logits[token] = 50.0
        return logits


def _answer(question: str) -> str:
    if "<tool_response>" in question:
        return DONE
    if "story" in question:
        return STORY
    return CALL if "lamp" in question else PARIS


class Draft(ScriptedDrafter):
    def __init__(self, file: GgufModel) -> None:
        super().__init__(Answers(file, draft=True), file.strings, context=CONTEXT, end_tokens=file.end_tokens)
        self.codec = file
        self.owns_file = False

    def another(self) -> "Draft":
        return Draft(self.codec)  # type: ignore[arg-type]
