"""OpenAI's two requests for a generation, as far as a device can serve them.

A parameter that a device does not have is refused unless its value asks for nothing: an application that asks for
log-probabilities must not get an answer without them and continue as if they were there.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json

from fleet_common.validation import field_at, plain_sentence
from fleet_device.api.problems import ApiProblem, problem_of
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import InvalidRequest
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.prompt import LONGEST_STOP, MAX_STOPS, Prompt, prepare_request
from fleet_device.requests.structured import (
    MISSING,
    RequestMessage,
    ResponseFormat,
    StrictModel,
    ToolCalls,
    ToolOffer,
    ToolOptions,
    schema_grammar,
    unusable,
)
from fleet_device.requests.thinking import TemplateOptions, TemplateVariables
from fleet_device.settings import MAX_TEMPERATURE, DeviceSettings, OfflinePolicy, ReasoningEffort
from schemas.fields import MAX_TOKENS, MAX_TOP_LOGPROBS
from schemas.policy import MAX_BIAS, MAX_BIASES, MAX_GRAMMAR_BYTES, MAX_SEED, Grammar, GrammarKind, Mode

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "background": (False,),  # of other requests than those that have it
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "conversation": (),
    "echo": (False,),  # of other requests than those that have it
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logprobs": (False,),  # of other requests than those that have it
    "max_tool_calls": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "previous_response_id": (),
    "prompt": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Parameters of OpenAI and vLLM that a device does not have, with the values that ask for nothing, like null."""

IGNORED: Final = frozenset(
    (
        "cache_prompt", "cache_salt", "metadata", "prediction", "priority",
        "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier", "user", "verbosity",
    )
)  # fmt: skip
"""Parameters of OpenAI's, vLLM's and llama.cpp's clients that are ignored, because that does no harm."""


def supported(fields: Mapping[str, Any], *, known: Collection[str]) -> dict[str, Any]:
    """Return the supported fields, without null; raise ApiProblem for others that are unknown or ask for something."""
    kept = {}
    for name, value in fields.items():
        if name in known:
            if value is not None:
                kept[name] = value
        elif name in NEUTRAL:
            if not _asks_nothing(name, value):
                raise ApiProblem(
                    400,
                    f"The parameter {name!r} is not supported with that value; {_ADVICE.get(name, 'leave it out')}.",
                    code="unsupported_parameter",
                    param=name,
                )
        elif name not in IGNORED:
            raise ApiProblem(400, f"There is no parameter {name[:100]!r}.", code="unknown_parameter", param=name[:100])
    return kept


_NOT_STORED: Final = "no response is stored here, so send the previous messages as input"
_ADVICE: Final = {"previous_response_id": _NOT_STORED, "conversation": _NOT_STORED}


def _asks_nothing(name: str, value: object) -> bool:
    # The type counts: `logprobs` 0 asks for something, False does not, and they are equal in Python.
    return value is None or any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in NEUTRAL[name]
    )


R = TypeVar("R", bound=BaseModel)

MAX_CHOICES: Final = 8
_MAX_PROMPTS: Final = 256


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > _MAX_PROMPTS:
            raise ValueError(f"a request has at most {_MAX_PROMPTS} prompts")
        return tuple(map(_prompt, value))
    return (_prompt(value),)


def _prompt(value: object) -> object:
    if isinstance(value, list) and len(value) > MAX_TOKENS:
        raise ValueError(f"it has {len(value)} tokens, more than any text can")
    # One sentence for a value that fits neither kind; pydantic would give one for each kind.
    if not isinstance(value, str) and not (isinstance(value, list) and all(map(_is_token, value))):
        raise ValueError("it must be text, or a list of token ids")
    if not value:
        raise ValueError("it must not be empty")
    return value


_PROMPTS: Final = BeforeValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]])


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)], ...],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(_strings, json_schema_input_type=str | list[str]),
]
TokenLimit = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class StreamOptions(StrictModel):
    """Additions to the chunks of a stream.

    `include_usage` adds a last chunk with the number of tokens, `continuous_usage_stats` their number so far to each
    chunk. `include_origins`, an extension, adds text and origin of each token. `include_obfuscation` has no effect.
    """

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False
    include_origins: bool = False


TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


def _grammar(value: object) -> object:
    if isinstance(value, Grammar) or (isinstance(value, dict) and "kind" in value):
        return value
    # Other servers read a grammar of llama.cpp here, which is a string.
    kinds = ", ".join(GrammarKind)
    raise ValueError(f'it is an object such as {{"kind": "regex", "text": "[0-9]+"}}, of one of the kinds {kinds}')


class GenerationRequest(StrictModel):
    """Fields that all requests have.

    `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`, `mode`, `offline`, `grammar` and `edge_only` are
    extensions of OpenAI's API; so is `background` for others than responses: the request outlives its connection.
    `model` chooses the target model where edges have several; with one, any name will do.
    """

    needs_model: ClassVar[bool] = False

    model: str | None = None
    temperature: Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=MAX_BIASES)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    mode: Mode | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    offline: OfflinePolicy | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    grammar: Annotated[Grammar, BeforeValidator(_grammar, json_schema_input_type=Grammar)] | None = None
    edge_only: bool | None = None
    background: bool = False

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.needs_model and not self.model:
            raise unusable("model", "it is required, as by OpenAI; any name will do", code=MISSING)
        return self

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise unusable("stream_options", "it needs stream to be true")
        return self


class TextRequest(GenerationRequest):
    """A chat or a completion. Of `n` choices, each has the seed after that of the one before."""

    prompt_field: ClassVar[str] = "prompt"

    max_tokens: TokenLimit | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES, strict=True)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def include_origins(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_origins

    def choices(self, defaults: DeviceSettings) -> "list[Self]":
        """Return a request for each of the `n` choices, itself if that is one.

        The first has the requested seed, each further one the next: in mode `coupled` a request with its seed repeats
        any of them. Without a seed, that of `defaults` counts, or a random one.
        """
        count = self.n or 1
        if count == 1:
            return [self]
        first = defaults.policy().seed if self.seed is None else self.seed
        return [self.model_copy(update={"n": 1, "seed": (first + number) % (MAX_SEED + 1)}) for number in range(count)]

    def generate_request(self, codec: TextCodec, defaults: DeviceSettings) -> GenerateRequest:
        return prepare_request(
            self.text_prompt(),
            defaults,
            self.offer,
            raw=True,
            max_new_tokens=self.token_limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            min_tokens=MAX_TOKENS if self.ignore_eos else self.min_tokens,
            mode=self.mode,
            seed=self.seed,
            stop=self.stop,
            logprobs=self.max_logprobs,
            offline=self.offline,
            grammar=self.text_grammar(),
            edge_only=bool(self.edge_only),
            reasoning_effort=self.effort,
            chat_template_kwargs=self.template_variables,
            thinking_token_budget=self.thinking_budget,
        ).encode(codec)

    @property
    def effort(self) -> ReasoningEffort | None:
        return None

    @property
    def template_variables(self) -> dict[str, Any] | None:
        return None

    @property
    def thinking_budget(self) -> int | None:
        return None

    def text_grammar(self) -> Grammar | None:
        return self.grammar

    @property
    def grammar_field(self) -> str:
        return "grammar"

    def tool_calls(self, name: str = "") -> ToolCalls | None:  # noqa: ARG002 - as a chat has it
        return None

    @property
    def offer(self) -> ToolOffer | None:
        return None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def max_logprobs(self) -> int | None:
        return None

    def text_prompt(self) -> Prompt:
        raise NotImplementedError


class ChatRequest(TextRequest, ToolOptions):
    """`POST /v1/chat/completions`."""

    prompt_field: ClassVar[str] = "messages"
    format_field: ClassVar[str] = "response_format"
    needs_model: ClassVar[bool] = True
    needs_calls: ClassVar[bool] = True

    messages: Annotated[tuple[RequestMessage, ...], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: TokenLimit | None = None
    logprobs: Annotated[bool, Field(strict=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: TemplateVariables | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None = None

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        self.text_grammar()
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(message.content or message.tool_calls for message in self.messages):
            raise unusable(self.prompt_field, "there is no text in it")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise unusable("max_completion_tokens", "it differs from max_tokens, its older name; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise unusable("top_logprobs", "it needs logprobs to be true")
        if self.logprobs and self.thinking_token_budget is not None:
            raise unusable("thinking_token_budget", "it cannot be combined with logprobs")
        return self

    @model_validator(mode="after")
    def _called(self) -> Self:
        """Refuse the result of a call that no message before it has."""
        calls = set[str]()
        for number, message in enumerate(self.messages):
            calls.update(call.id for call in message.tool_calls or ())
            if self.needs_calls and message.role == "tool" and message.tool_call_id not in calls:
                where = f"{self.prompt_field}[{number}].role" if self.prompt_field == "messages" else self.prompt_field
                called = (message.tool_call_id or "")[:100]
                raise unusable(
                    where,
                    f"it returns the result of {called!r}, which no message before it calls; send that message too",
                )
        return self

    @property
    def max_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def effort(self) -> ReasoningEffort | None:
        return self.reasoning_effort

    @property
    def template_variables(self) -> dict[str, Any] | None:
        return self.chat_template_kwargs

    @property
    def thinking_budget(self) -> int | None:
        return self.thinking_token_budget

    def text_prompt(self) -> Prompt:
        return [each.plain() for each in self.messages]

    @property
    def offer(self) -> ToolOffer | None:
        return self.tool_offer(self._schema)

    @property
    def _schema(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.schema_of_answer

    def text_grammar(self) -> Grammar | None:
        """Return the grammar of the request; raise InvalidRequest if it cannot have one."""
        schema, offer = self._schema, self.offer
        try:
            if offer is not None:
                found: Grammar | None = offer.grammar()
            else:
                found = None if schema is None else schema_grammar(schema)
        except ValidationError:
            raise unusable(self.format_field, f"its grammar has more than {MAX_GRAMMAR_BYTES} bytes") from None
        if found is not None and self.grammar is not None:
            param = self.format_field if offer is None else "tools"
            raise unusable(param, "a request with the field grammar cannot have it")
        return self.grammar or found

    @property
    def grammar_field(self) -> str:
        if self.grammar is not None:
            return "grammar"
        return self.format_field if self.offer is None else "tools"

    def tool_calls(self, name: str = "") -> ToolCalls | None:
        offer = self.offer
        return None if offer is None else offer.calls(name)


class TokenizeRequest(StrictModel):
    """`POST /tokenize`, as vLLM has it: the tokens of a text, or of a chat in the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: tuple[RequestMessage, ...] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise unusable("prompt", "send either prompt or messages")
        return self

    def tokens(self, codec: TextCodec) -> list[int]:
        if self.messages is not None:
            options = TemplateOptions(variables=self.chat_template_kwargs or {})
            return chat_prompt(codec, [each.plain() for each in self.messages], options).tokens
        tokens = codec.encode(self.prompt or "")
        return tokens if self.add_special_tokens else tokens[len(codec.encode("")) :]


class CompletionRequest(TextRequest):
    """`POST /v1/completions`. Of several prompts, each has `n` choices, one after another."""

    prompt: Annotated[tuple[str | tuple[Annotated[int, Field(ge=0)], ...], ...], _PROMPTS]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    echo: Annotated[bool, Field(strict=True)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise unusable("max_tokens", "it is at least 1 without echo")
        if self.stream and (self.echo or len(self.prompt) > 1):
            raise unusable("stream", "an answer with echo, or to several prompts, is sent as a whole")
        return self

    @property
    def max_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def token_limit(self) -> int | None:
        return None if self.max_tokens is None else max(1, self.max_tokens)  # the edge computes one in any case

    def text_prompt(self) -> Prompt:
        return self.prompt[0]

    def choices(self, defaults: DeviceSettings) -> list[Self]:
        if len(self.prompt) == 1:
            return super().choices(defaults)
        of_each = [self.model_copy(update={"prompt": (prompt,)}) for prompt in self.prompt]
        return [choice for each in of_each for choice in each.choices(defaults)]

    def generate_request(self, codec: TextCodec, defaults: DeviceSettings) -> GenerateRequest:
        request = super().generate_request(codec, defaults)
        scored = bool(self.echo) and self.logprobs is not None
        return replace(request, echo=True, edge_only=True) if scored else request


def read_request(model: type[R], body: bytes) -> R:
    """Read a request's body; ApiProblem names the first error."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiProblem(400, f"The body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ApiProblem(400, "The body is not a JSON object.")
    return validated(model, supported(value, known=model.model_fields))


def validated(model: type[R], fields: Mapping[str, Any]) -> R:
    """Return a request with these fields; ApiProblem names the first error."""
    try:
        return model.model_validate(fields)
    except InvalidRequest as error:
        raise problem_of(error) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, what, code = _place(field_at(model, first)), plain_sentence(first), _code(first)
        problem = unusable(where, what, code=code) if where else ApiProblem(400, f"The body cannot be used: {what}.")
        raise problem_of(problem) from error


def _place(parts: Iterable[int | str]) -> str:
    """Return a place in a request as OpenAI names it, such as `messages[0].role`."""
    named = (f"[{part}]" if isinstance(part, int) else f".{part[:100]}" for part in parts)
    return "".join(named).removeprefix(".")


_CODES: Final[Mapping[str, str]] = {
    "missing": MISSING,
    "extra_forbidden": "unknown_parameter",
    "literal_error": "invalid_value",
    "enum": "invalid_value",
    "value_error": "invalid_value",
    "string_pattern_mismatch": "invalid_value",
    "finite_number": "invalid_value",
    "string_too_short": "string_below_min_length",
    "string_too_long": "string_above_max_length",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "greater_than": "{number}_below_min_value",
    "greater_than_equal": "{number}_below_min_value",
    "less_than": "{number}_above_max_value",
    "less_than_equal": "{number}_above_max_value",
}
"""OpenAI's codes, by pydantic's types of errors. The others are of values of another type."""


def _code(error: ErrorDetails) -> str:
    bounds = error.get("ctx", {}).values()
    number = "decimal" if any(isinstance(bound, float) for bound in bounds) else "integer"
    return _CODES.get(error["type"], "invalid_type").format(number=number)
