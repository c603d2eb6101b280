"""The fields of requests: OpenAI's, and a few of vLLM's and llama.cpp's.

A field that would change the answer and that this server does not know is refused; one that changes
nothing here is dropped.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from rlhfjax import arguments, json_text
from rlhfjax.serve.refused import Refused
from rlhfjax.serve.requests import MOST_TOP

MOST_CHOICES = 16
MOST_STOPS = 16

# Fields that change nothing here.
_HARMLESS = (
    *("user", "store", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)
# Fields of which only values that change nothing are taken.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}

Probability = Annotated[float, Field(gt=0, le=1)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Schema = dict[str, Any] | bool


class _Fields(pydantic.BaseModel):
    """Base of all requests: no other fields, no conversion between types."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool = False  # of OpenAI; here never any


class JsonSchema(_Fields):
    schema_: Annotated[Schema, Field(alias="schema")] = True
    name: str = ""
    description: str = ""
    strict: bool = True


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Fields):
    """vLLM's `structured_outputs`."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: bool = False
    regex: str | None = None
    choice: Texts | None = None


class CommonFields(_Fields):
    """What requests for chats and for plain completions share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_room: Annotated[int, Field(ge=1)] = 1  # ours: a prompt must leave as many
    temperature: Annotated[float, Field(ge=0, le=1e4)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1, 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a response."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(text for text in stops if text)


class ChatFields(CommonFields):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0


class CompletionFields(CommonFields):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None


class ScoreFields(_Fields):
    """A request to /v1/score: a conversation, or several, that end with a response."""

    model: str | None = None
    messages: Annotated[list[Any], Field(min_length=1)]


class ComparisonFields(_Fields):
    """A request to /v1/comparisons: two responses to a conversation, and the better one."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    completions: Annotated[list[str], Field(min_length=2, max_length=2)]
    models: Annotated[list[str], Field(min_length=2, max_length=2)]
    preferred: Literal["first", "second", "tie"]
    labeler: str = "chat page"


Kind = TypeVar("Kind", bound=_Fields)


def read(body: bytes, kind: type[Kind]) -> Kind:
    """Returns the fields of a request.

    Raises:
      Refused: the body is not JSON, or a field is unknown or has a value that is not taken.
    """
    try:
        given = json_text.parse(body)
    except json_text.NotJson as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refused(400, f"expected a JSON object, got {json_text.shown(given)}")
    taken = {}
    for name, value in given.items():
        if value is not None and _has_effect(name, value, kind):
            taken[name] = value
    try:
        return kind.model_validate(taken)
    except pydantic.ValidationError as mistakes:
        raise _refused(mistakes) from None


def _has_effect(name: str, value: Any, kind: type[_Fields]) -> bool:
    """Returns whether a field has to be validated. Raises Refused if it is not taken."""
    if name in kind.model_fields:
        return True
    if name in _HARMLESS:
        return False
    if name not in _WITHOUT_EFFECT:
        hint = arguments.did_you_mean(name, kind.model_fields)
        shown = json_text.shown(name)
        raise Refused(400, f"unknown field {shown}{hint}", param=name[:100])
    accepted = _WITHOUT_EFFECT[name]
    if isinstance(value, bool) or value not in accepted:
        listed = " or ".join(map(json_text.shown, (None, *accepted)))
        message = f"{name}: not supported here; expected {listed}"
        raise Refused(400, message, param=name)
    return False


def _refused(mistakes: pydantic.ValidationError) -> Refused:
    """Returns the first mistake in one line."""
    first = mistakes.errors(include_url=False)[0]
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "bool"):
            place += f".{part}"
    place = place.removeprefix(".")
    got = f", got {json_text.shown(first['input'])}"
    got = "" if first["type"] == "missing" else got
    message = first["msg"][:1].lower() + first["msg"][1:]
    return Refused(400, f"{place}: {message}{got}", param=place)
