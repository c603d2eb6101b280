"""Tools in conversations: definitions, calls and results, as chat templates take them.

A template that writes `tool_calls` gets them as OpenAI's objects. Any other gets them as content,
as Hermes and Qwen2.5 write them:

    <tool_call>
    {"name": "…", "arguments": {…}}
    </tool_call>

A tool's result keeps the role `tool`. Our own template has no marker for it: there, a result is a
user turn whose content stands between <tool_response> and </tool_response>.

Definitions of tools belong to the system message, the first one, which has no content if the
conversation has no system message. A template that writes `tools` gets them as OpenAI's objects
beside the messages. Any other gets them as content, as Qwen2.5 writes them: see `DEFINED`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhfjax import json_text
from rlhfjax.data.built_in_templates import OURS
from rlhfjax.errors import DataError

TOOL = "tool"
PARTS = (
    "tool_calls",
    "name",
    "tool_call_id",
)  # of a message, besides role and content
DEFINITIONS = "tools"
"""Of a system message: the JSON of OpenAI's list of definitions."""
DEFINED = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{definitions}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
_VARIABLE = re.compile(rf"\b{DEFINITIONS}\b")


def is_plain(message: Mapping[str, str]) -> bool:
    """Returns whether a message neither calls tools nor is a tool's result."""
    return len(message) == 2 and message["role"] != TOOL


def adapted(message: Mapping[str, str], source: str) -> dict[str, str]:
    """Returns a message in the way that a template takes it.

    Args:
      source: the template's Jinja source.
    """
    role, content = message["role"], message["content"]
    if DEFINITIONS in message:
        if _VARIABLE.search(source):
            return dict(message)
        text = DEFINED.format(definitions=_lines(message[DEFINITIONS]))
        return {"role": role, "content": f"{content}\n\n{text}".lstrip("\n")}
    if role == TOOL and source == OURS:
        content = f"<tool_response>\n{content}\n</tool_response>"
        return {"role": "user", "content": content}
    kept = {name: message[name] for name in PARTS if name in message}
    kept = {name: value for name, value in kept.items() if name in source}
    if "tool_calls" in message and "tool_calls" not in kept:
        calls = as_text(message["tool_calls"])
        content = f"{content}\n{calls}" if content else calls
    return {"role": role, "content": content, **kept}


def as_text(calls: str) -> str:
    """Returns the JSON of calls as Hermes and Qwen2.5 write them."""
    texts = []
    for call in json_text.parse(calls):
        text = json_text.encode(call["function"], "tool_calls")
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(texts)


def _lines(definitions: str) -> str:
    """Returns the JSON of definitions, one per line."""
    values = json_text.parse(definitions)
    return "\n".join(json_text.encode(value, DEFINITIONS) for value in values)


def extra_of(message: Mapping[str, str]) -> str:
    """Returns the JSON of what a message has besides role and content; "" for nothing."""
    names = (*PARTS, DEFINITIONS)
    extra = {name: message[name] for name in names if name in message}
    return json_text.encode(extra, "a message") if extra else ""


def split_definitions(
    messages: Sequence[Mapping[str, str]],
) -> tuple[Sequence[Mapping[str, str]], list[dict[str, Any]] | None]:
    """Returns adapted messages as a template takes them, and the definitions beside them."""
    if not messages or DEFINITIONS not in messages[0]:
        return messages, None
    first = dict(messages[0])
    definitions = json_text.parse(first.pop(DEFINITIONS))
    head = [first] if first["content"] else []
    return [*head, *messages[1:]], definitions


def are_written(definitions: Sequence[Mapping[str, Any]] | None, text: str) -> bool:
    """Returns whether a rendered conversation names every tool."""
    return all(tool["function"]["name"] in text for tool in definitions or ())


def validate_without(specials: Iterable[str], message: Mapping[str, str]) -> None:
    """Raises DataError if what a template writes of tools spells a special token."""
    calls = [message[name] for name in PARTS if name in message]
    definitions = message.get(DEFINITIONS, "")
    for special in specials:
        if any(special in call for call in calls):
            raise DataError(f"chat: a tool call spells the special token {special}")
        if special in definitions:
            raise DataError(
                f"chat: a definition of a tool spells the special token {special}"
            )


def as_object(message: Mapping[str, str]) -> dict[str, Any]:
    """Returns a message for Jinja, with calls as objects."""
    given: dict[str, Any] = dict(message)
    if "tool_calls" in message:
        given["tool_calls"] = json_text.parse(message["tool_calls"])
    return given
