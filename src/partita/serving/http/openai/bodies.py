"""The bodies of requests. Unknown fields are ignored, as OpenAI's server does; wrong values are errors that name the field."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from partita.errors import PlanError
from partita.generation import Sampling
from partita.serving.http.errors import ApiError

MOST_ANSWERS = 128
"""The largest number of answers of one HTTP request."""

MOST_LOGPROBS = 20
"""The largest number of most likely tokens that are reported with a token."""


PLAIN_TEXTS = ("text", "input_text", "output_text")
"""The types of a message's parts that are texts: some clients send those of responses in chats too."""

TEXTS = (*PLAIN_TEXTS, "reasoning_text", "summary_text")
"""The types of an item's parts that are texts."""


class Body(BaseModel):
    """A body, or a part of one."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None


class SamplingBody(Body):
    """The fields that every request for text has. None is what the model's generation config says."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, new_tokens: int, vocab_size: int, place: int = 0, seed: int | None = None) -> Sampling:
        """The settings of the answer at `place`, whose seed is `place` after the request's.

        Args:
            new_tokens: Largest number of new tokens.
            vocab_size: Number of ids.
            place: The index of the answer.
            seed: The seed of a request without one.

        Raises:
            ApiError: A setting is wrong.
        """
        seed = self.seed if self.seed is not None else seed or 0
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        strange = next((i for i in self.logit_bias or () if not 0 <= i < vocab_size), None)
        if strange is not None:
            raise ApiError(
                400, f"logit_bias: the model has ids 0 to {vocab_size - 1}; got {strange}.", param="logit_bias"
            )
        if self.min_tokens and self.min_tokens > new_tokens:
            text = f"min_tokens must be at most the largest number of tokens, {new_tokens}; got {self.min_tokens}."
            raise ApiError(400, text, param="min_tokens")
        try:
            return Sampling(
                max_new_tokens=new_tokens, temperature=self.temperature, top_p=self.top_p, min_p=self.min_p,
                top_k=None if self.top_k is None else max(0, min(self.top_k, vocab_size)),
                repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0, logit_bias=self.logit_bias or {},
                seed=(seed + place) % (1 << 63), stop=stop, min_new_tokens=self.min_tokens or None,
                ignore_eos=bool(self.ignore_eos),
            )  # fmt: skip
        except PlanError as error:
            raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error


def new_seed() -> int:
    """A seed for a request that has none."""
    return secrets.randbits(62)


class ImageUrl(Body):
    """Where an image is."""

    url: str


class ContentPart(Body):
    """A part of a message: of a type among `PLAIN_TEXTS` with a text, or of `image_url` with an image."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class FunctionCall(Body):
    """A call of a function: its name, and its arguments as JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call of a tool in an earlier answer."""

    id: str | None = None
    type: str | None = None
    function: FunctionCall


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A JSON schema that the answer follows."""

    name: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SamplingBody):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """The number of most likely tokens to report with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SamplingBody):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _is_not_empty(cls, prompt: Any) -> Any:
        if not prompt or (
            len(prompt) > MOST_ANSWERS and not isinstance(prompt, str) and not isinstance(prompt[0], int)
        ):
            raise ValueError(f"must have at least one token, and at most {MOST_ANSWERS} prompts")
        return prompt


class EmbeddingsBody(Body):
    """The body of `/v1/embeddings`."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class LoadBody(Body):
    """The body of `/models/load`."""

    model: str


class TokenizeBody(Body):
    """The body of `/tokenize`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


def part_error(kind: str, where: str) -> ApiError:
    """The error for a part of a message, of the type `kind`, that is neither text nor an image, or a text without `text`."""
    if kind in TEXTS:
        return ApiError(400, f"{where}: a part of the type {kind!r} needs a text of its own.", param=where)
    text = f"{where}: this server takes texts and images ('text', 'image_url', 'input_text', 'input_image'); got {kind!r:.60}."
    return ApiError(400, text, param=where)


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Read a body of `kind`.

    Raises:
        ApiError: It is not JSON, or a field is wrong.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        # Of a field that is a text or a list, the error inside the form that was meant is the deepest.
        forms = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
        first = max(forms, key=lambda one: len(one["loc"])) if "str" in found[0]["loc"] else found[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['msg']}") from error
        param = ".".join(str(part) for part in first["loc"] if not _is_of_union(part)) or None
        given = "" if first["type"] == "missing" else f", but is {_short(first['input'])}"
        why = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param or 'the body'}: {why}{given}.", param=param) from error


def _is_of_union(part: int | str) -> bool:
    """Whether a part of an error's place names a type rather than a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int") or part[:1].isupper())


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value if not isinstance(value, str) else value[:60])[:80]
