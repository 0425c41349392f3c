"""Unsupported parameters of OpenAI's API, and those that can be ignored.

Such a parameter is refused, unless it is set to what happens anyway: an application that asks for log-probabilities
must not get an answer without them and go on as if they were there.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from fleet_device.api.problems import ApiProblem

# With the values that ask for nothing.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),  # of other requests than those that have it
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What tells us nothing that we would act on.
_IGNORED: Final = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})


def supported(fields: Mapping[str, Any], *, known: Collection[str]) -> dict[str, Any]:
    """Return the fields that a device has.

    Args:
        fields: Of a request.
        known: Names that a device has.

    Raises:
        ApiProblem: One of the others asks for something, or is none of OpenAI's.
    """
    kept = {}
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        elif name in _NEUTRAL:
            if not _asks_nothing(name, value):
                raise ApiProblem(
                    400,
                    f"The parameter {name!r} is not supported with that value; leave it out.",
                    code="unsupported_parameter",
                    param=name,
                )
        elif name not in _IGNORED:
            raise ApiProblem(400, f"There is no parameter {name[:100]!r}.", code="unknown_parameter", param=name[:100])
    return kept


def _asks_nothing(name: str, value: object) -> bool:
    # With its type: `logprobs` as 0 asks for something, as False it does not, and Python calls them equal.
    return value is None or any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name])
