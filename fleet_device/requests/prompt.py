"""From a text, a chat or token ids, and options, to a request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import TIMEOUT_MAX
from typing import Annotated, Any, Final, Literal, TypedDict, Unpack, get_type_hints

from pydantic import ConfigDict, Field, PlainValidator, ValidationError, create_model

from fleet_common.validation import field_at, plain_sentence
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import InvalidRequest
from fleet_device.requests.chat import ChatPrompt, chat_prompt
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.structured import ChatMessage, RequestMessage, ToolOffer, ToolOptions
from fleet_device.requests.thinking import TemplateOptions, TemplateVariables, after_thinking
from fleet_device.settings import MAX_TEMPERATURE, DeviceSettings, OfflinePolicy, ReasoningEffort
from schemas.fields import MAX_TOKENS, MAX_TOP_LOGPROBS
from schemas.policy import MAX_GRAMMAR_BYTES, MAX_SEED, MAX_TOP_K, Grammar, GrammarKind, Mode, SamplingPolicy

Prompt = str | Sequence[ChatMessage | Mapping[str, Any]] | Sequence[int]

_Encode = Callable[[TextCodec], ChatPrompt]

MAX_STOPS: Final = 4
LONGEST_STOP: Final = 256

_SAMPLING: Final = ("mode", "temperature", "top_k", "top_p", "seed", "grammar")


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise ValueError(f"it is a string of 1 to {LONGEST_STOP} characters, or up to {MAX_STOPS} of them")
    return stops


class TextOptions(TypedDict, total=False):
    """Options of `Device.generate` and `Device.stream`; what is left out, or None, is as the device's settings say.

    Attributes:
        raw: Continue a text prompt as it is; otherwise it is a user's message, for the draft model's chat template.
        max_new_tokens: Most tokens to generate.
        temperature: 0 to 2; 0 is greedy.
        top_k: Number of tokens kept; 0 keeps all.
        top_p: Probability mass kept; 1 keeps all.
        mode: How drafts are verified.
        seed: 0 to 2^64 - 1; random for each request if neither this nor the setting is given.
        stop: A string, or several, before the first of which the generation ends.
        logprobs: 0 to 20: return the large model's log-probabilities of all tokens, and of this many alternatives each.
        offline: What the device does when no edge answers.
        grammar: Constraint on the text; none by default.
        tools: Functions that the model may call, in OpenAI's shape; the calls are the result's `tool_calls`.
        tool_choice: Whether it may call one (`auto`, the default), must (`required`, or a function by name), or must
            not.
        parallel_tool_calls: Whether it may call several at once; True by default.
        reasoning_effort: How long a model thinks, for chat templates that can set it; `none` turns thinking off.
        chat_template_kwargs: Further variables of the chat template.
        edge_only: Let the edge decode alone; False, the default, lets this device draft.
        timeout: Seconds, with the time in the queue, after which the request is cancelled; none by default. An edge
            that expects the first token later refuses the request at once (`too-late`).
    """

    raw: bool
    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, strict=True)] | None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K, strict=True)] | None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None
    mode: Mode | Literal["residual", "coupled"] | None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)] | None
    stop: Annotated[str | Sequence[str], PlainValidator(_stops)] | None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None
    offline: OfflinePolicy | Literal["fail", "wait", "local", "other-target"] | None
    grammar: Grammar | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: ReasoningEffort | Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None
    chat_template_kwargs: TemplateVariables | None
    edge_only: bool
    timeout: Annotated[float, Field(gt=0, le=TIMEOUT_MAX, strict=True)] | None


_HINTS: Final = get_type_hints(TextOptions, include_extras=True)
_FIELDS: Final[dict[str, Any]] = {name: (hint, None) for name, hint in _HINTS.items()}
_Options: Final = create_model("_Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **_FIELDS)


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
    try:
        chosen = {name: value for name, value in _Options.model_validate(options) if value is not None}
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequest(f"The option {first['loc'][0]!r} cannot be used: {plain_sentence(first)}.") from None
    offer = _offer(options)
    effort = chosen.get("reasoning_effort", defaults.reasoning_effort)
    template = TemplateOptions(effort and ReasoningEffort(effort), chosen.get("chat_template_kwargs", {}))
    encode = _encoder(prompt, offer, template, raw=options.get("raw", False))
    policy = SamplingPolicy.model_validate(
        {**defaults.policy().model_dump(), **{name: chosen[name] for name in _SAMPLING if name in chosen}}
    )
    if offer is not None:
        policy = policy.model_copy(update={"grammar": _grammar_of(offer, options)})
    most, stop = chosen.get("max_new_tokens", defaults.max_new_tokens), chosen.get("stop", ())
    logprobs = chosen.get("logprobs")
    outages = defaults.outages()
    outages = replace(outages, policy=OfflinePolicy(chosen.get("offline", outages.policy)))
    if logprobs is not None and outages.policy in (OfflinePolicy.LOCAL, OfflinePolicy.OTHER_TARGET):
        # There would be none, or those of another target.
        outages = replace(outages, policy=OfflinePolicy.FAIL)

    def prepare(codec: TextCodec) -> GenerateRequest:
        prompt, shaped = encode(codec), policy
        own = offer is not None or (policy.grammar is not None and policy.grammar.kind is not GrammarKind.LARK)
        if prompt.thinking is not None and policy.grammar is not None and own:
            try:
                shaped = policy.model_copy(update={"grammar": after_thinking(policy.grammar, prompt.thinking)})
            except ValidationError:
                raise InvalidRequest(
                    f"With the thinking before the answer, the grammar has more than {MAX_GRAMMAR_BYTES} bytes; make "
                    "it smaller, or send reasoning_effort 'none'."
                ) from None
        return GenerateRequest(
            tuple(prompt.tokens),
            shaped,
            most,
            stop,
            logprobs,
            outages,
            edge_only=options.get("edge_only", False),
            offer=offer,
            thinking=prompt.thinking,
        )

    return PreparedRequest(policy, prepare)


def _offer(options: TextOptions) -> ToolOffer | None:
    given = {name: value for name in ToolOptions.model_fields if (value := options.get(name)) is not None}
    try:
        return ToolOptions.model_validate(given).tool_offer()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, field_at(ToolOptions, first)))
        raise InvalidRequest(f"The option {where!r} cannot be used: {plain_sentence(first)}.") from None


def _grammar_of(offer: ToolOffer, options: TextOptions) -> Grammar:
    if options.get("grammar") is not None:
        raise InvalidRequest("The option 'tools' cannot be used: a request with the option 'grammar' cannot have it.")
    return offer.grammar()


def _encoder(prompt: object, offer: ToolOffer | None, template: TemplateOptions, *, raw: bool) -> _Encode:
    if isinstance(prompt, str | Sequence) and not prompt:
        raise InvalidRequest("The prompt is empty; give some text, chat messages, or token ids.")
    if isinstance(prompt, str):
        if not raw:
            return _chat_encoder([ChatMessage("user", prompt)], offer, template)
        _check_chat(offer)
        return lambda codec: ChatPrompt(codec.encode(prompt))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidRequest(
            f"A prompt cannot be of the type {type(prompt).__name__!r}; give a text, chat messages, or token ids."
        )
    if all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in prompt):
        ids = list(prompt)
        _check_chat(offer)
        return lambda _codec: ChatPrompt(ids)
    messages = [_message(each) for each in prompt]
    if not any(message.content for message in messages):
        raise InvalidRequest("There is no text in the chat messages; give some.")
    return _chat_encoder(messages, offer, template)


def _check_chat(offer: ToolOffer | None) -> None:
    if offer is not None:
        raise InvalidRequest("The option 'tools' cannot be used: functions are described in a chat, so give one.")


def _chat_encoder(messages: Sequence[ChatMessage], offer: ToolOffer | None, template: TemplateOptions) -> _Encode:
    described = messages if offer is None else offer.chat(messages)
    return lambda codec: chat_prompt(codec, described, template)


def _message(message: object) -> ChatMessage:
    """Return a message for a chat template; it is read as by the HTTP API, with tool calls and their results."""
    if isinstance(message, ChatMessage):
        message = {"role": message.role, "content": message.content, "reasoning_content": message.reasoning or None}
    try:
        return RequestMessage.model_validate(dict(message) if isinstance(message, Mapping) else message).plain()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = ": ".join(filter(None, (".".join(map(str, field_at(RequestMessage, first))), plain_sentence(first))))
    raise InvalidRequest(
        f"A chat message cannot be used ({what}): give ChatMessage(role, content), or "
        '{"role": "user", "content": "…"}.'
    )
