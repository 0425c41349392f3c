"""Options of the commands that generate: the sampling controls that are no settings of a device."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, Final

import typer

from fleet_cli.errors import CommandError
from fleet_cli.options import with_options
from fleet_device.requests.prompt import TextOptions
from schemas.fields import MAX_TOKENS

_PANEL: Final = "Sampling"
_BIAS: Final = re.compile(r"(\d{1,10})([+-]\d+(?:\.\d*)?)")


def _option(kind: type, flag: str, meaning: str) -> tuple[object, object]:
    return Annotated[kind | None, typer.Option(flag, help=meaning, rich_help_panel=_PANEL)], None


_SAMPLING: Final = {
    "min_p": _option(float, "--min-p", "Keep tokens of at least this share of the largest probability; 0 keeps all."),
    "presence_penalty": _option(float, "--presence-penalty", "-2 to 2: against tokens that the output has."),
    "frequency_penalty": _option(float, "--frequency-penalty", "-2 to 2: the same, for each time that it has them."),
    "repetition_penalty": _option(
        float, "--repetition-penalty", "Above 1: against tokens that the prompt or the output has."
    ),
    "logit_bias": _option(list[str], "--logit-bias", "TOKEN_ID+BIAS or TOKEN_ID-BIAS, such as 15043-100; repeatable."),
    "min_tokens": _option(int, "--min-tokens", "The output does not end before it has this number of tokens."),
    "ignore_eos": (
        Annotated[
            bool, typer.Option("--ignore-eos", help="The output does not end by itself.", rich_help_panel=_PANEL)
        ],
        False,
    ),
}


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a request's sampling, as `sampling`."""

    def read(given: dict[str, Any]) -> nullcontext[object]:
        given["logit_bias"] = dict(map(_read_bias, given["logit_bias"] or ()))
        if given.pop("ignore_eos"):
            given["min_tokens"] = MAX_TOKENS
        options: TextOptions = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
        return nullcontext(options)

    return with_options("sampling", _SAMPLING, read)(command)


def _read_bias(text: str) -> tuple[int, float]:
    found = _BIAS.fullmatch(text)
    if found is None:
        raise CommandError(
            f"--logit-bias {text[:100]} cannot be read; give the id of a token, + or -, and a number, such as "
            "15043-100."
        )
    return int(found[1]), float(found[2])
