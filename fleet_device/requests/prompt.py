"""From a text, a chat or token ids, and options, to a request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import TIMEOUT_MAX
from typing import Any, Final, Literal, TypedDict, Unpack

from pydantic import ValidationError

from fleet_common.validation import field_at, plain_sentence
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import InvalidRequest
from fleet_device.requests.chat import encode_chat
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.structured import ChatMessage, RequestMessage, ToolOffer, ToolOptions, UnusableParameter
from fleet_device.settings import MAX_TEMPERATURE, DeviceSettings, OfflinePolicy, Outages, Truncate
from schemas.fields import MAX_TOKENS, MAX_TOP_LOGPROBS
from schemas.policy import Grammar, Mode, SamplingPolicy

Prompt = str | Sequence[ChatMessage | Mapping[str, Any]] | Sequence[int]

_Encode = Callable[[TextCodec], Sequence[int]]
_Shorten = Callable[[TextCodec, int, Truncate], Sequence[int] | None]

MOST_STOPS: Final = 4
LONGEST_STOP: Final = 256

_SYSTEM: Final = "system"

_NEARER: Final = 0.95  # fraction of what should fit: tokens differ in length
_CUT: Final = "…"  # replaces what was left out of a message
_TRIES: Final = 12

_SAMPLING: Final = ("mode", "temperature", "top_k", "top_p", "seed", "grammar")


class TextOptions(TypedDict, total=False):
    """Options of `Device.generate`, which describes them, for a function that passes them on."""

    raw: bool
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    mode: Mode | Literal["residual", "coupled"] | None
    seed: int | None
    stop: str | Sequence[str] | None
    truncate: Truncate | Literal["refuse", "start", "middle"] | None
    logprobs: int | None
    offline: OfflinePolicy | Literal["fail", "wait", "local"] | None
    grammar: Grammar | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    speculation: bool
    timeout: float | None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request. `encode` makes it one with token ids, by the draft model's codec.

    It raises `ChatError` without a chat template, or if that fails or declines the messages.
    """

    policy: SamplingPolicy
    encode: Callable[[TextCodec], GenerateRequest]


def prepare_request(prompt: Prompt, defaults: DeviceSettings, **options: Unpack[TextOptions]) -> PreparedRequest:
    """Check a prompt and options, and return what makes them a request.

    The two steps are separate because a vocabulary serves one request at a time: errors (InvalidRequest) are reported
    at once, and the prompt is encoded when the request's turn has come.
    """
    offer = _offer(options)
    encode, shorten = _encoder(prompt, offer, raw=options.get("raw", False))
    how = _truncate(defaults, options.get("truncate"))
    policy, stop = _policy(defaults, options), _stops(options.get("stop"))
    if offer is not None:
        policy = policy.model_copy(update={"grammar": _grammar_of(offer, options)})
    limit = _number("max_new_tokens", options.get("max_new_tokens"), MAX_TOKENS)
    most = defaults.max_new_tokens if limit is None else limit
    logprobs = _number("logprobs", options.get("logprobs"), MAX_TOP_LOGPROBS)
    _check_timeout(options.get("timeout"))
    outages = _outages(defaults, options)
    if logprobs is not None and outages.policy is OfflinePolicy.LOCAL:
        # Without an edge there are no log-probabilities of the target.
        outages = replace(outages, policy=OfflinePolicy.FAIL)

    def prepare(codec: TextCodec) -> GenerateRequest:
        cut = None if how is Truncate.REFUSE else lambda tokens: shorten(codec, tokens, how)
        prompt, speculation = tuple(encode(codec)), options.get("speculation", True)
        return GenerateRequest(prompt, policy, most, stop, cut, logprobs, outages, speculation=speculation, offer=offer)

    return PreparedRequest(policy, prepare)


def _offer(options: TextOptions) -> ToolOffer | None:
    given = {name: value for name in ToolOptions.model_fields if (value := options.get(name)) is not None}
    try:
        return ToolOptions.model_validate(given).tool_offer()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, field_at(ToolOptions, first)))
        raise InvalidRequest(f"The option {where!r} cannot be used: {plain_sentence(first)}.") from None
    except UnusableParameter as error:
        raise InvalidRequest(str(error)) from None


def _grammar_of(offer: ToolOffer, options: TextOptions) -> Grammar:
    if options.get("grammar") is not None:
        raise InvalidRequest("The option 'tools' cannot be used: a request with the option 'grammar' cannot have it.")
    try:
        return offer.grammar()
    except UnusableParameter as error:
        raise InvalidRequest(str(error)) from None


def _encoder(prompt: object, offer: ToolOffer | None, *, raw: bool) -> tuple[_Encode, _Shorten]:
    if isinstance(prompt, str | Sequence) and not prompt:
        raise InvalidRequest("The prompt is empty; give some text, chat messages, or token ids.")
    if isinstance(prompt, str):
        if not raw:
            return _chat_encoder([ChatMessage("user", prompt)], offer)
        _check_chat(offer)
        return lambda codec: codec.encode(prompt), lambda codec, most, how: shorten_text(codec, prompt, most, how)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidRequest(
            f"A prompt cannot be of the type {type(prompt).__name__!r}; give a text, chat messages, or token ids."
        )
    if all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in prompt):
        ids = tuple(prompt)
        _check_chat(offer)
        return lambda _codec: ids, lambda _codec, most, how: shorten_tokens(ids, most, how)
    messages = [_message(each) for each in prompt]
    if not any(message.content for message in messages):
        raise InvalidRequest("There is no text in the chat messages; give some.")
    return _chat_encoder(messages, offer)


def _check_chat(offer: ToolOffer | None) -> None:
    if offer is not None:
        raise InvalidRequest("The option 'tools' cannot be used: functions are described in a chat, so give one.")


def _chat_encoder(messages: Sequence[ChatMessage], offer: ToolOffer | None) -> tuple[_Encode, _Shorten]:
    if offer is not None:
        messages = offer.chat(messages)
    return (
        lambda codec: encode_chat(codec, messages),
        lambda codec, most, how: shorten_chat(partial(encode_chat, codec), messages, most, how),
    )


def _truncate(defaults: DeviceSettings, value: object) -> Truncate:
    if value is None:
        return defaults.truncate
    try:
        return Truncate(str(value))
    except ValueError:
        raise InvalidRequest("The option 'truncate' cannot be used: it is refuse, start or middle.") from None


def _message(message: object) -> ChatMessage:
    """Return a message for a chat template; it is read as by the HTTP API, with tool calls and their results."""
    if isinstance(message, ChatMessage):
        message = {"role": message.role, "content": message.content}
    try:
        return RequestMessage.model_validate(dict(message) if isinstance(message, Mapping) else message).plain()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = ": ".join(filter(None, (".".join(map(str, field_at(RequestMessage, first))), plain_sentence(first))))
    raise InvalidRequest(
        f"A chat message cannot be used ({what}): give ChatMessage(role, content), or "
        '{"role": "user", "content": "…"}.'
    )


def _policy(defaults: DeviceSettings, options: TextOptions) -> SamplingPolicy:
    given: dict[str, Any] = dict(options)
    chosen = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    try:
        policy = SamplingPolicy.model_validate({**defaults.policy().model_dump(), **chosen})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(f"The option {first['loc'][0]!r} cannot be used: {plain_sentence(first)}.") from None
    if policy.temperature > MAX_TEMPERATURE:
        raise InvalidRequest(f"The option 'temperature' cannot be used: it must be at most {MAX_TEMPERATURE}.")
    return policy


def _outages(defaults: DeviceSettings, options: TextOptions) -> Outages:
    outages, policy = defaults.outages(), options.get("offline")
    try:
        policy = outages.policy if policy is None else OfflinePolicy(policy)
    except ValueError:
        raise InvalidRequest(f"The option 'offline' cannot be used: it is {', '.join(OfflinePolicy)}.") from None
    return replace(outages, policy=policy)


def _number(name: str, value: object, most: int) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most):
        return value
    raise InvalidRequest(f"The option {name!r} cannot be used: it is a number from 0 to {most}.")


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    usable = all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    if (value is not None and not isinstance(value, Sequence)) or not usable or len(stops) > MOST_STOPS:
        raise InvalidRequest(
            f"The option 'stop' cannot be used: it is a string of 1 to {LONGEST_STOP} characters, or up to "
            f"{MOST_STOPS} of them."
        )
    return stops


def _check_timeout(value: object) -> None:
    if value is None or (isinstance(value, int | float) and 0 < value <= TIMEOUT_MAX and value is not True):
        return
    raise InvalidRequest("The option 'timeout' cannot be used: it is a number of seconds above 0, or None.")


# Prompts that are too long for the context


def shorten_tokens(tokens: Sequence[int], most: int, how: Truncate) -> Sequence[int]:
    """Return at most `most` tokens, without their start or their middle."""
    if len(tokens) <= most:
        return tokens
    head = most // 2 if how is Truncate.MIDDLE else 0
    return [*tokens[:head], *tokens[len(tokens) - (most - head) :]]


def shorten_text(codec: TextCodec, text: str, most: int, how: Truncate) -> Sequence[int] | None:
    """Return the tokens of a text without its start or its middle, but with a beginning-of-text token."""
    tokens = codec.encode(text)
    begin = codec.encode("")
    if begin and tokens[: len(begin)] == begin:
        if most <= len(begin):
            return None
        return [*begin, *shorten_tokens(tokens[len(begin) :], most - len(begin), how)]
    return shorten_tokens(tokens, most, how)


def shorten_chat(
    encode: Callable[[Sequence[ChatMessage]], Sequence[int]], messages: Sequence[ChatMessage], most: int, how: Truncate
) -> Sequence[int] | None:
    """Return the tokens of a chat without its oldest turns, and if necessary without part of the last message.

    System messages and the whole chat template stay. None if these alone are too long.
    """
    system = [message for message in messages if message.role == _SYSTEM]
    spoken = [message for message in messages if message.role != _SYSTEM]
    asks = next((message.role for message in spoken), _SYSTEM)
    while len(spoken) > 1:
        # A turn is a message and the answers to it: the rest begins with such a message.
        del spoken[0]
        while len(spoken) > 1 and spoken[0].role != asks:
            del spoken[0]
        tokens = encode([*system, *spoken])
        if len(tokens) <= most:
            return tokens
    if not spoken:
        return None
    return _cut_last(encode, system, spoken[0], most, how)


def _cut_last(
    encode: Callable[[Sequence[ChatMessage]], Sequence[int]],
    system: Sequence[ChatMessage],
    last: ChatMessage,
    most: int,
    how: Truncate,
) -> Sequence[int] | None:
    bare = len(encode([*system, replace(last, content="")]))
    whole = encode([*system, last])
    if len(whole) <= most:
        return whole
    keep, count = len(last.content), len(whole)
    for _ in range(_TRIES):
        # Characters that should fit, by the present ratio of tokens to characters.
        keep = min(keep - 1, int(_NEARER * keep * max(0, most - bare) / max(1, count - bare)))
        if keep < 1:
            break
        tokens = encode([*system, replace(last, content=_cut(last.content, keep, how))])
        if len(tokens) <= most:
            return tokens
        count = len(tokens)
    tokens = encode([*system, replace(last, content="")])
    return tokens if len(tokens) <= most else None


def _cut(text: str, keep: int, how: Truncate) -> str:
    head = keep // 2 if how is Truncate.MIDDLE else 0
    return f"{text[:head]}{_CUT}{text[len(text) - (keep - head) :]}"
