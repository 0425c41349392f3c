"""From a text, a chat or token ids, and options, to a request."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import TIMEOUT_MAX
from typing import Annotated, Any, Final, Literal, TypedDict, Unpack, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, ValidationError, create_model

from fleet_common.validation import field_at, plain_sentence
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import InvalidRequest
from fleet_device.requests.chat import ChatPrompt, chat_prompt
from fleet_device.requests.generate import GenerateRequest, ThinkingBudget
from fleet_device.requests.structured import ChatMessage, RequestMessage, ToolOffer, ToolOptions
from fleet_device.requests.thinking import TemplateOptions, TemplateVariables, Thinking, after_thinking
from fleet_device.settings import MAX_TEMPERATURE, DeviceSettings, OfflinePolicy, ReasoningEffort
from schemas.fields import MAX_LABEL, MAX_TOKENS, MAX_TOP_LOGPROBS
from schemas.policy import (
    ADJUSTMENTS,
    MAX_BIAS,
    MAX_BIASED,
    MAX_BIASES,
    MAX_GRAMMAR_BYTES,
    MAX_SEED,
    MAX_TOP_K,
    Grammar,
    GrammarKind,
    Mode,
    SamplingPolicy,
)

Prompt = str | Sequence[ChatMessage | Mapping[str, Any]] | Sequence[int]

_Encode = Callable[[TextCodec], ChatPrompt]

MAX_STOPS: Final = 4
LONGEST_STOP: Final = 256

_SAMPLING: Final = ("mode", "temperature", "top_k", "top_p", "seed", "grammar", "min_p", *ADJUSTMENTS)


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise ValueError(f"it is a string of 1 to {LONGEST_STOP} characters, or up to {MAX_STOPS} of them")
    return stops


def _biases(biases: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    usable = (0 <= token <= MAX_BIASED and abs(bias) <= MAX_BIAS for token, bias in biases.items())
    if len(biases) > MAX_BIASES or not all(usable):
        raise ValueError(f"it has up to {MAX_BIASES} token ids, each with a number from -{MAX_BIAS} to {MAX_BIAS}")
    return tuple(sorted((token, float(bias)) for token, bias in biases.items()))


class TextOptions(TypedDict, total=False):
    """Options of `Device.generate` and `Device.stream`; what is left out, or None, is as the device's settings say.

    Attributes:
        model: Name of the target model, as its edges have it; by default any, or that of the setting `target`.
        raw: Continue a text prompt as it is; otherwise it is a user's message, for the draft model's chat template.
        max_new_tokens: Most tokens to generate.
        temperature: 0 to 2; 0 is greedy.
        top_k: Number of tokens kept; 0 keeps all.
        top_p: Probability mass kept; 1 keeps all.
        min_p: Keep tokens whose probability is at least this share of the largest one; 0 keeps all.
        presence_penalty: -2 to 2: lower the logits of tokens that the output has.
        frequency_penalty: -2 to 2: lower a token's logit for each time that the output has it.
        repetition_penalty: Above 1, lower the logits of tokens that the prompt or the output has.
        logit_bias: Up to 300 token ids, each with -100 to 100 to add to its logit.
        min_tokens: The output does not end by itself before it has this number of tokens.
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
        thinking_token_budget: Most tokens of the thinking, which the template's closing mark then ends; cannot be
            combined with `logprobs`, for which the setting does not count.
        edge_only: Let the edge decode alone; False, the default, lets this device draft.
        timeout: Seconds, with the time in the queue, after which the request is cancelled; none by default. An edge
            that expects the first token later refuses the request at once (`too-late`).
    """

    model: Annotated[str, Field(min_length=1, max_length=MAX_LABEL)] | None
    raw: bool
    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, strict=True)] | None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K, strict=True)] | None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None
    logit_bias: Annotated[Mapping[int, float], AfterValidator(_biases)] | None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None
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
    thinking_token_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None
    edge_only: bool
    timeout: Annotated[float, Field(gt=0, le=TIMEOUT_MAX, strict=True)] | None


_HINTS: Final = get_type_hints(TextOptions, include_extras=True)
_FIELDS: Final[dict[str, Any]] = {name: (hint, None) for name, hint in _HINTS.items()}
_Options: Final = create_model("_Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **_FIELDS)


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request. `encode` makes it one with token ids, by the draft model's codec.

    It raises `ChatError` without a chat template, or if that fails or declines the messages. `target` names the only
    target model that may serve it; empty for any.
    """

    policy: SamplingPolicy
    encode: Callable[[TextCodec], GenerateRequest]
    target: str = ""


def prepare_request(
    prompt: Prompt, defaults: DeviceSettings, offer: ToolOffer | None = None, /, **options: Unpack[TextOptions]
) -> PreparedRequest:
    """Check a prompt and options, and return what makes them a request.

    `offer` is there instead of the option `tools` where the answer without a call has a schema; the option `grammar` is
    then the offer's.

    The two steps are separate because a vocabulary serves one request at a time: errors (InvalidRequest) are reported
    at once, and the prompt is encoded when the request's turn has come.
    """
    try:
        chosen = {name: value for name, value in _Options.model_validate(options) if value is not None}
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequest(f"The option {first['loc'][0]!r} cannot be used: {plain_sentence(first)}.") from None
    own_offer = offer is None
    if offer is None:
        offer = _offer(options)
    effort = chosen.get("reasoning_effort", defaults.reasoning_effort)
    template = TemplateOptions(effort and ReasoningEffort(effort), chosen.get("chat_template_kwargs", {}))
    encode = _encoder(prompt, offer, template, raw=options.get("raw", False))
    policy = _policy(defaults, chosen)
    if offer is not None and own_offer:
        policy = policy.model_copy(update={"grammar": _grammar_of(offer, options)})
    most, stop = chosen.get("max_new_tokens", defaults.max_new_tokens), chosen.get("stop", ())
    logprobs, budget = chosen.get("logprobs"), _budget_tokens(defaults, chosen)
    outages = defaults.outages()
    outages = replace(outages, policy=OfflinePolicy(chosen.get("offline", outages.policy)))
    if logprobs is not None and outages.policy in (OfflinePolicy.LOCAL, OfflinePolicy.OTHER_TARGET):
        # There would be none, or those of another target.
        outages = replace(outages, policy=OfflinePolicy.FAIL)

    def prepare(codec: TextCodec) -> GenerateRequest:
        prompt, shaped = encode(codec), policy
        if prompt.offer is not None and prompt.offer.native is not None:
            shaped = policy.model_copy(update={"grammar": _native_grammar(prompt.offer)})
        answer = shaped
        own = offer is not None or (policy.grammar is not None and policy.grammar.kind is not GrammarKind.LARK)
        if prompt.thinking is not None and shaped.grammar is not None and own:
            try:
                shaped = policy.model_copy(update={"grammar": after_thinking(shaped.grammar, prompt.thinking)})
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
            offer=prompt.offer,
            thinking=prompt.thinking,
            control=prompt.control,
            budget=_budget(budget, prompt.thinking, answer, codec),
        )

    return PreparedRequest(policy, prepare, chosen.get("model", defaults.target))


def _budget_tokens(defaults: DeviceSettings, chosen: Mapping[str, Any]) -> int | None:
    if chosen.get("logprobs") is None:
        found: int | None = chosen.get("thinking_token_budget", defaults.thinking_token_budget)
        return found
    if "thinking_token_budget" in chosen:
        raise InvalidRequest(
            "The option 'thinking_token_budget' cannot be used together with 'logprobs': the closing mark that it puts "
            "behind the thinking has none."
        )
    return None


def _budget(
    tokens: int | None, thinking: Thinking | None, policy: SamplingPolicy, codec: TextCodec
) -> ThinkingBudget | None:
    if tokens is None or thinking is None:
        return None
    seed = hashlib.sha256(b"after the thinking" + policy.seed.to_bytes(8, "big")).digest()
    answer = policy.model_copy(update={"seed": int.from_bytes(seed[:8], "big")})
    return ThinkingBudget(tokens, tuple(codec.encode(thinking.marks.closing, special=True)), answer)


def _policy(defaults: DeviceSettings, chosen: Mapping[str, Any]) -> SamplingPolicy:
    policy = SamplingPolicy.model_validate(
        {**defaults.policy().model_dump(), **{name: chosen[name] for name in _SAMPLING if name in chosen}}
    )
    if chosen.get("logprobs") is None or not policy.adjusts:
        return policy
    # Only the edge knows the log-probability of a token whose logit was changed, so it draws all of them.
    return policy.model_copy(update={"mode": Mode.COUPLED})


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


def _native_grammar(offer: ToolOffer) -> Grammar | None:
    try:
        return offer.shaping()
    except ValidationError:
        raise InvalidRequest(f"The grammar of the tools has more than {MAX_GRAMMAR_BYTES} bytes.") from None


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
    if not any(message.content or message.calls for message in messages):
        raise InvalidRequest("There is no text in the chat messages; give some.")
    return _chat_encoder(messages, offer, template)


def _check_chat(offer: ToolOffer | None) -> None:
    if offer is not None:
        raise InvalidRequest("The option 'tools' cannot be used: functions are described in a chat, so give one.")


def _chat_encoder(messages: Sequence[ChatMessage], offer: ToolOffer | None, template: TemplateOptions) -> _Encode:
    return lambda codec: chat_prompt(codec, messages, template, offer)


def _message(message: object) -> ChatMessage:
    """Return a message for a chat template; it is read as by the HTTP API, with tool calls and their results."""
    if isinstance(message, ChatMessage):
        message = {
            "role": message.role,
            "content": message.content,
            "reasoning_content": message.reasoning or None,
            "tool_calls": message.calls or None,
            "tool_call_id": message.call_id or None,
        }
    try:
        return RequestMessage.model_validate(dict(message) if isinstance(message, Mapping) else message).plain()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = ": ".join(filter(None, (".".join(map(str, field_at(RequestMessage, first))), plain_sentence(first))))
    raise InvalidRequest(
        f"A chat message cannot be used ({what}): give ChatMessage(role, content), or "
        '{"role": "user", "content": "…"}.'
    )
