"""Conversations in columns: messages of OpenAI's and of ShareGPT's form, as our turns.

A turn is {"role": str, "content": str}. A turn of the assistant that calls tools also has
`tool_calls`, the JSON of OpenAI's list of calls. A tool's turn may have `name` and `tool_call_id`.
A system turn at the beginning may have `tools`, the JSON of OpenAI's list of definitions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhfjax import json_text
from rlhfjax.data import chat, thoughts
from rlhfjax.data.columns import BadRow, as_list, string
from rlhfjax.data.tools import DEFINITIONS, TOOL
from rlhfjax.errors import DataError

ROLES = (*chat.ROLES, TOOL)
# How files of ShareGPT's form call the roles.
SPELLINGS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Of a message: what the assistant thinks before its content.
_THOUGHT = "reasoning_content"
_OURS, _SHAREGPT = ("role", "content"), ("from", "value")
_OF_TOOLS = ("name", "tool_call_id")


def counted(messages: Iterable[chat.Message], merged: int) -> chat.Turns:
    """Returns messages of which `merged` ones were joined to the one before them."""
    turns = chat.Turns(messages)
    turns.merged = merged
    return turns


def merged_in(row: Mapping[str, Any]) -> int:
    """Returns how many messages of a row were joined to the message before them."""
    return getattr(row.get("messages"), "merged", 0)


def parsed(value: Any, column: str) -> Any:
    """Returns the value of a column that may be JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json_text.parse(value)
    except json_text.NotJson as error:
        raise BadRow(
            f"column {column!r} is neither a list of messages nor its JSON ({error})"
        ) from None


def read_turns(value: Any, column: str) -> chat.Turns:
    """Returns the turns of a conversation, given as a list of messages or as two lists.

    Raises:
      BadRow: there are none, or one is malformed.
    """
    messages = [_message(one, column) for one in _zipped(value, column, _OURS)]
    turns = joined(messages, column)
    turns.merged += getattr(value, "merged", 0)
    return turns


def read_sharegpt(value: Any, column: str) -> chat.Turns:
    """Returns the turns of {"from", "value"}, in any of `SPELLINGS`; raises as `read_turns`."""
    if isinstance(value, Sequence) and value and _is_message(value[0]):
        return read_turns(value, column)
    turns = []
    for message in _zipped(value, column, _SHAREGPT):
        if not isinstance(message, Mapping) or not {"from", "value"} <= set(message):
            raise BadRow(
                f"column {column!r}: a message needs 'from' and 'value',"
                f" got {json_text.shown(message)}"
            )
        name = string(message["from"], "from").lower()
        role = SPELLINGS.get(name, name)
        turns.append(_message({"role": role, "content": message["value"]}, column))
    return joined(turns, column)


def _zipped(value: Any, column: str, names: tuple[str, str]) -> list[Any]:
    """Returns a list of messages; TFDS reads a sequence of dicts as a dict of sequences."""
    role, content = names
    if not isinstance(value, Mapping) or role not in value or content not in value:
        return as_list(value, column)
    roles = as_list(value[role], column)
    contents = as_list(value[content], column)
    if len(roles) != len(contents):
        raise BadRow(
            f"column {column!r} has {len(roles)} roles for {len(contents)} contents"
        )
    pairs = zip(roles, contents, strict=True)
    return [{role: speaker, content: text} for speaker, text in pairs]


def joined(messages: Sequence[chat.Message], column: str) -> chat.Turns:
    """Returns messages as turns of alternating speakers. Raises BadRow if there are none."""
    if not messages:
        raise BadRow(f"column {column!r} has no messages")
    return chat.merge_turns(messages)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _message(value: Any, column: str) -> chat.Message:
    if type(value) is dict and len(value) == 2:  # most messages, and the fastest
        role, content = value.get("role"), value.get("content")
        if type(content) is str and type(role) is str and role in chat.ROLES:
            return {"role": role, "content": string(content, "content")}
    calls = isinstance(value, Mapping) and value.get("tool_calls")
    if calls:
        value = {"content": None, **value}
    if not _is_message(value):
        raise BadRow(
            f"column {column!r}: a message needs 'role' and 'content',"
            f" got {json_text.shown(value)}"
        )
    role = string(value["role"], "role")
    if role not in ROLES:
        raise BadRow(
            f"column {column!r}: role {json_text.shown(role)} is none of "
            + ", ".join(ROLES)
        )
    definitions = ""
    if role == "system" and value.get(DEFINITIONS) is not None:
        definitions = read_definitions(value[DEFINITIONS])
    may_be_empty = bool(calls or definitions) or role == TOOL
    content = _content(value["content"], column, empty=may_be_empty)
    if value.get(_THOUGHT) is not None:
        content = _with_thought(value, role, content, column)
    message = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise BadRow(f"column {column!r}: 'tool_calls' of the role {role!r}")
        message["tool_calls"] = _calls(calls, column)
    if definitions:
        message[DEFINITIONS] = definitions
    if role == TOOL:
        for name in _OF_TOOLS:
            if value.get(name) is not None:
                message[name] = string(value[name], name)
    return message


def with_definitions(turns: Sequence[chat.Message], definitions: str) -> chat.Turns:
    """Returns a conversation with definitions of tools in its system turn, its first one."""
    has_system = bool(turns) and turns[0]["role"] == "system"
    system = turns[0] if has_system else {"role": "system", "content": ""}
    first = {**system, DEFINITIONS: definitions}
    return counted([first, *turns[has_system:]], getattr(turns, "merged", 0))


def read_definitions(value: Any) -> str:
    """Returns definitions of tools as JSON of OpenAI's form; "" if there are none.

    Fields without a value are left out: files of Arrow's kind have every field in every row.

    Raises:
      BadRow: it is no list of definitions.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    functions = []
    for tool in as_list(_json(value, DEFINITIONS), DEFINITIONS):
        tool = _without_nulls(tool)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not function.get("name"):
            raise BadRow(
                f"column {DEFINITIONS!r}: a tool needs a function with 'name',"
                f" got {json_text.shown(tool)}"
            )
        string(function["name"], "name")
        if function is tool:  # without a function around it
            function = {name: tool[name] for name in tool if name != "type"}
        functions.append(function)
    definitions = [{"type": "function", "function": one} for one in functions]
    return _encoded(definitions, DEFINITIONS) if definitions else ""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(one) for one in value]
    return value


def _content(value: Any, column: str, *, empty: bool) -> str:
    """Returns a content, given as text or as OpenAI's list of parts, which are joined."""
    if value is None and empty:
        return ""
    if not isinstance(value, list | tuple):
        return string(value, "content", empty=empty)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text" or "text" not in part:
            raise BadRow(
                f"column {column!r}: a content part of type {json_text.shown(kind)};"
                " only parts of type 'text' are accepted"
            )
        texts.append(string(part["text"], "text", empty=True))
    return string("".join(texts), "content", empty=empty)


def _with_thought(
    value: Mapping[str, Any], role: str, content: str, column: str
) -> str:
    if role != "assistant" or thoughts.MARKS[1] in content:
        raise BadRow(
            f"column {column!r}: {_THOUGHT!r} is for an assistant's message without </think>"
        )
    thought = string(value[_THOUGHT], _THOUGHT, empty=True).strip("\n")
    return thoughts.join(thought, content) if thought else content


def _calls(value: Any, column: str) -> str:
    """Returns calls as JSON of OpenAI's form, with the arguments as an object."""
    calls = []
    for call in as_list(_json(value, "tool_calls"), "tool_calls"):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not function.get("name"):
            raise BadRow(
                f"column {column!r}: a tool call needs a function with 'name' and"
                f" 'arguments', got {json_text.shown(call)}"
            )
        name = string(function["name"], "name")
        arguments = _json(function.get("arguments") or {}, "arguments")
        calls.append({"name": name, "arguments": arguments})
    functions = [{"type": "function", "function": call} for call in calls]
    return _encoded(functions, "tool_calls")


def _encoded(functions: list[dict[str, Any]], name: str) -> str:
    """Returns calls or definitions as JSON."""
    try:
        return string(json_text.encode(functions, name), name)
    except (TypeError, DataError) as error:
        raise BadRow(f"{name!r}: {error}") from None


def _json(value: Any, name: str) -> Any:
    """Returns calls, definitions or a part of them, which may be JSON in a text."""
    try:
        return json_text.parse(value) if isinstance(value, str) else value
    except json_text.NotJson as error:
        raise BadRow(f"a tool call's {name!r}: not JSON ({error})") from None
