"""SGLang's dialect: one request for a whole draft, with log-probabilities of its input from a position on.

The radix cache is read up to `logprob_start_len`, and only what follows is computed. The first position asked for has
no log-probability, as nothing stands before it in what is computed: so the question begins one token earlier.
Source: SGLang's native API, `/generate`.
"""

from typing import Any, Final

from fleet_edge.verifiers.remote.dialect import Call, Question, TopRows, as_list, as_map, check_rows
from fleet_edge.verifiers.remote.errors import BadAnswer

__all__ = ["SgLang"]

_ANSWER_BYTES: Final = 1 << 14
_ENTRY_BYTES: Final = 96
_TRIPLE: Final = 3


class SgLang:
    """`Dialect` of SGLang."""

    name: Final = "SGLang"
    spare: Final = 8  # it keeps a few positions of its context for itself
    version_path: Final = "/get_model_info"

    def ask(self, question: Question, *, model: str) -> Call:
        """Ask for one more token, and for the most likely tokens of the positions before it."""
        del model  # a server has one
        tokens = list(question.tokens)
        body: dict[str, Any] = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "stream": False,
        }
        if question.rows:
            body |= {
                "return_logprob": True,
                "logprob_start_len": len(tokens) - question.rows,
                "top_logprobs_num": question.top,
                "return_text_in_logprobs": False,
            }
        rows = question.rows + 1
        return Call("/generate", body, _ANSWER_BYTES + rows * _ENTRY_BYTES * (question.top + 2))

    def read(self, answer: object, question: Question, *, vocabulary: int) -> TopRows:
        """Read `input_top_logprobs` behind its first, empty place, then `output_top_logprobs`."""
        meta = as_map(as_map(answer).get("meta_info"))
        if not question.rows:
            return check_rows([], question, vocabulary=vocabulary)
        before = as_list(meta.get("input_top_logprobs"), question.rows)
        last = as_list(meta.get("output_top_logprobs"), 1)
        rows = [[_pair(entry) for entry in as_list(row)] for row in (*before[1:], *last)]
        return check_rows(rows, question, vocabulary=vocabulary)

    def detokenize(self, token: int, *, model: str) -> Call:
        """Ask for a token's text, control tokens included."""
        return Call("/detokenize", {"model": model, "tokens": [token], "skip_special_tokens": False}, _ANSWER_BYTES)

    def read_text(self, answer: object) -> str:
        """Read `text`."""
        text = as_map(answer).get("text")
        if not isinstance(text, str):
            raise BadAnswer("a text is missing")
        return text

    def version(self, answer: object) -> str:
        """Check for `model_path`; the version stands elsewhere."""
        if not isinstance(as_map(answer).get("model_path"), str):
            raise BadAnswer("a model's path is missing")
        return ""


def _pair(entry: object) -> tuple[object, object]:
    """Return id and log-probability of an entry `[log-probability, id, text]`."""
    value, token, _text = as_list(entry, _TRIPLE)
    return token, value
