"""From the fields of a request to what the engine is asked for."""

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhfjax.data.chat import render_prompt
from rlhfjax.data.columns import BadRow
from rlhfjax.data.turns import read_turns
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.sampling.config import end_ids
from rlhfjax.sampling.structured import ANY_OBJECT, Form
from rlhfjax.serve.fields import ChatFields, CommonFields, CompletionFields
from rlhfjax.serve.refused import Refused
from rlhfjax.serve.requests import Request
from rlhfjax.serve.served import Served

COMPLETION_TOKENS = 16  # of a plain completion that names no number, as OpenAI's
MOST_PROMPTS = 256
SEEDS = 2**32


class Prepared(NamedTuple):
    """What a request of HTTP asks the engine for: `n` responses to each prompt, in order."""

    requests: list[Request]
    stop: tuple[str, ...]
    prompts: list[str]  # texts, for `echo` and the log

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        n = len(self.requests) // len(self.prompts)
        return sum(len(request.tokens) for request in self.requests[::n])


def prepare_chat(served: Served, fields: ChatFields) -> Prepared:
    """Returns what a request for a chat asks for. Raises Refused."""
    if fields.top_logprobs and not fields.logprobs:
        raise Refused(400, "top_logprobs: needs logprobs=true", param="top_logprobs")
    tokens = chat_tokens(served, fields.messages)
    asked = fields.max_completion_tokens or fields.max_tokens
    if asked == 0 or fields.max_tokens == 0:
        raise Refused(400, "max_tokens=0: must be >= 1", param="max_tokens")
    make = _Maker(served, fields, asked, logprobs=fields.top_logprobs)
    text = served.tokenizer.decode(tokens)
    return Prepared(make.requests([tokens]), make.stop, [text])


def chat_tokens(served: Served, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Returns the tokens of a conversation and of the generation prompt after it.

    Special tokens that a message spells are text. Raises Refused.
    """
    try:
        with served.lock:
            return tuple(render_prompt(served.tokenizer, turns_of(messages)).tolist())
    except DataError as error:
        raise Refused(400, str(error), param="messages") from None


def turns_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns OpenAI's messages as ours: `developer` is `system`. Raises Refused."""
    given = []
    for message in messages:
        role = message.get("role")
        kept = {name: value for name, value in message.items() if value is not None}
        given.append({**kept, "role": "system" if role == "developer" else role})
    try:
        return list(read_turns(given, "messages"))
    except BadRow as error:
        text = str(error).replace("column 'messages'", "messages")
        raise Refused(400, text, param="messages") from None


def prepare_completion(served: Served, fields: CompletionFields) -> Prepared:
    """Returns what a request for plain completions asks for. Raises Refused."""
    prompts = _prompts(served, fields.prompt)
    if len(prompts) > MOST_PROMPTS:
        message = f"prompt: at most {MOST_PROMPTS} at a time, got {len(prompts)}"
        raise Refused(400, message, param="prompt")
    asked = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    if asked == 0 and not fields.echo:
        raise Refused(400, "max_tokens=0: needs echo=true", param="max_tokens")
    has_logprobs = fields.logprobs is not None
    make = _Maker(
        served,
        fields,
        asked,
        logprobs=fields.logprobs or 0,
        prompt_logprobs=fields.echo and has_logprobs,
    )
    tokens = [ids for ids, _ in prompts]
    return Prepared(make.requests(tokens), make.stop, [text for _, text in prompts])


def _prompts(
    served: Served, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[tuple[tuple[int, ...], str]]:
    """Returns the ids and the text of each prompt."""
    given: Any = prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        given = [prompt]
    if not given:
        raise Refused(400, "prompt: expected at least one", param="prompt")
    return [_prompt(served, one) for one in given]


def _prompt(served: Served, prompt: str | list[int]) -> tuple[tuple[int, ...], str]:
    tokenizer = served.tokenizer
    if not isinstance(prompt, str):
        if not prompt or not 0 <= min(prompt) <= max(prompt) < tokenizer.vocab_size:
            message = f"prompt: expected ids >= 0 and < {tokenizer.vocab_size}"
            raise Refused(400, message, param="prompt")
        return tuple(prompt), tokenizer.decode(prompt)
    try:
        with served.lock:
            ids = (*tokenizer.document_start, *tokenizer.encode(prompt))
    except DataError as error:
        raise Refused(400, str(error), param="prompt") from None
    return ids or (tokenizer.document_end,), prompt


class _Maker:
    """Makes the engine's requests: the fields of a request, else the settings of the model."""

    def __init__(
        self,
        served: Served,
        fields: CommonFields,
        asked: int | None,
        *,
        logprobs: int,
        prompt_logprobs: bool = False,
    ):
        self._served, self._fields, self._asked = served, fields, asked
        self.stop = fields.stops or served.sampling.stop
        self._seed = secrets.randbits(32) if fields.seed is None else fields.seed
        ends = () if fields.ignore_eos else end_ids(served.tokenizer)
        default, top_k = served.sampling, fields.top_k
        self._options: dict[str, Any] = {
            "temperature": _first(fields.temperature, default.temperature),
            "top_p": _first(fields.top_p, default.top_p),
            "top_k": default.top_k if top_k is None else max(top_k, 0),
            "min_p": _first(fields.min_p, default.min_p),
            "stop_ids": frozenset((*ends, *fields.stop_token_ids)),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }

    def requests(self, prompts: Sequence[tuple[int, ...]]) -> list[Request]:
        """Returns n requests per prompt; choice i has seed + i."""
        constraint = self._constraint()
        requests = []
        for tokens in prompts:
            for _ in range(self._fields.n):
                request = Request(
                    tokens=tokens,
                    max_tokens=self._most_tokens(len(tokens)),
                    seed=(self._seed + len(requests)) % SEEDS,
                    constraint=constraint(),
                    **self._options,
                )
                requests.append(request)
        return requests

    def _constraint(self):
        try:
            return self._served.constraint(form_of(self._fields))
        except ConfigError as error:
            raise Refused(400, str(error), param="response_format") from None

    def _most_tokens(self, prompt: int) -> int:
        """Returns the tokens that a response may have: at most those that there is room for."""
        length = self._served.length
        room = length - prompt
        needed = self._fields.min_room
        needed = needed if self._asked is None else min(needed, self._asked)
        if room < needed:
            message = (
                f"this model has room for {length} tokens of prompt and response together; "
                f"the prompt has {prompt}"
            )
            if needed > 1:
                message += f", and min_room={needed} of the response must fit"
            raise Refused(400, message, code="context_length_exceeded")
        limits = [room, self._asked, self._served.most_tokens]
        return min(limit for limit in limits if limit is not None)


def _first(value: float | int | None, default: float | int) -> float:
    return float(default if value is None else value)


def form_of(fields: CommonFields) -> Form | None:
    """Returns the form that a response must have; None: any. Raises Refused."""
    forms = [
        form
        for form in (
            *_response_format(fields),
            *_structured(fields.guided_json, fields.guided_regex, fields.guided_choice),
            *_structured_outputs(fields),
        )
        if form is not None
    ]
    if len(forms) > 1:
        raise Refused(400, "response_format: several forms are given; expected one")
    return forms[0] if forms else None


def _response_format(fields: CommonFields):
    given = fields.response_format
    if given is None or given.type == "text":
        return
    if given.type == "json_object":
        yield ANY_OBJECT
    elif given.json_schema is None:
        message = "response_format.json_schema: missing"
        raise Refused(400, message, param="response_format")
    else:
        yield Form("json", given.json_schema.schema_)


def _structured(json: Any, regex: str | None, choice: list[str] | None):
    if json is not None:
        yield Form("json", json)
    if regex is not None:
        yield Form("regex", regex)
    if choice is not None:
        yield Form("choice", choice)


def _structured_outputs(fields: CommonFields):
    given = fields.structured_outputs
    if given is None:
        return
    yield from _structured(given.json_, given.regex, given.choice)
    if given.json_object:
        yield ANY_OBJECT
