"""Converts rows of other forms to our rows: one function per form of `forms.FORMS`.

A function takes the columns of its form, the optional ones where a row has them, and returns the
columns of a kind of `rows`. It raises BadRow.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.columns import BadRow, as_list, flag, number, string, whole_numbers
from rlhfjax.data.turns import counted, joined, parsed, read_sharegpt, read_turns

Row = dict[str, Any]
# The difference of scores of a pair whose margin is 0: the chosen one is still the better.
LEAST_MARGIN = 1e-6
_SPEAKERS = {"Human": "user", "Assistant": "assistant", "System": "system"}
_HH = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant|System):[ \t]*")


# ------------------------------------------------------------------ conversations


def sharegpt(row: Row) -> Row:
    """{"conversations": [{"from": "human", "value": "…"}, …]}, with a system prompt beside it."""
    value = parsed(row["conversations"], "conversations")
    turns = read_sharegpt(value, "conversations")
    return {"messages": counted([*_system(row), *turns], turns.merged)}


def alpaca(row: Row) -> Row:
    """{"instruction": "…", "input": "…", "output": "…"} (Taori et al. 2023).

    An input follows the instruction after an empty line. The paper's own prompt, "Below is an
    instruction …", is left to the chat template.
    """
    prompt = string(row["instruction"], "instruction")
    given = row.get("input")
    if given is not None and string(given, "input", empty=True).strip():
        prompt = f"{prompt}\n\n{given}"
    messages = [*_system(row), _user(prompt)]
    return {"messages": [*messages, _assistant(row["output"], "output")]}


def prompt_completion(row: Row) -> Row:
    """{"prompt": …, "completion": …}, each a text or a list of messages."""
    completion = row["completion"]
    if isinstance(completion, str):
        answer = [_assistant(completion, "completion")]
    else:
        answer = read_turns(completion, "completion")
    return {"messages": [*prompt_turns(row["prompt"]), *answer]}


def _system(row: Row) -> list[chat.Message]:
    system = row.get("system")
    if system is None or not string(system, "system", empty=True).strip():
        return []
    return [{"role": "system", "content": system}]


def _user(text: Any, column: str = "prompt") -> chat.Message:
    return {"role": "user", "content": string(text, column)}


def _assistant(text: Any, column: str) -> chat.Message:
    return {"role": "assistant", "content": string(text, column)}


def prompt_turns(value: Any) -> list[chat.Message]:
    """Returns a prompt that is a text, one user turn, or a list of messages."""
    if isinstance(value, str):
        return [_user(value)]
    return read_turns(value, "prompt")


def _response(value: Any, column: str) -> str:
    """Returns a response that is a text, or a list of one message of the assistant."""
    if isinstance(value, str):
        return string(value, column, empty=True)
    turns = read_turns(value, column)
    return _answer(turns, column)


def _answer(turns: Sequence[chat.Message], column: str) -> str:
    if len(turns) != 1 or turns[0]["role"] != "assistant" or len(turns[0]) > 2:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise BadRow(
            f"column {column!r}: expected one text of the assistant, got turns of: {roles}"
        )
    return turns[0]["content"]


# ------------------------------------------------------------------ preferences


def pair(row: Row) -> Row:
    """{"prompt": …, "chosen": …, "rejected": …}.

    Chosen and rejected are texts, or lists of messages with the prompt at their beginning or
    without it.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row["prompt"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _ranked(prompt, [chosen, rejected], _pair_scores(row))
    first, second = read_turns(chosen, "chosen"), read_turns(rejected, "rejected")
    if len(first) > 1 or len(second) > 1:
        shared, answers = _shared(first, second)
        _validate_beginning(prompt, shared)
        return _ranked(shared, answers, _pair_scores(row))
    answers = [_answer(first, "chosen"), _answer(second, "rejected")]
    return _ranked(prompt, answers, _pair_scores(row))


def implicit_pair(row: Row) -> Row:
    """{"chosen": …, "rejected": …}, whole conversations that differ in their last response.

    They are lists of messages (UltraFeedback, TRL) or texts "\\n\\nHuman: … \\n\\nAssistant: …"
    (Bai et al. 2022, HH).
    """
    turns = [_conversation(row[name], name) for name in ("chosen", "rejected")]
    shared, answers = _shared(*turns)
    return _ranked(shared, answers, _pair_scores(row))


def _conversation(value: Any, column: str) -> chat.Turns:
    if not isinstance(value, str):
        return read_turns(value, column)
    text = string(value, column)
    before, *parts = _HH.split(text)
    if before.strip() or not parts:
        raise BadRow(
            f"column {column!r} must begin with 'Human:', got {json_text.shown(text)};"
            " without a column 'prompt' it is a whole conversation"
        )
    turns = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": _SPEAKERS[speaker], "content": content.strip()})
    return joined(turns, column)


def _shared(first: chat.Turns, second: chat.Turns) -> tuple[chat.Turns, list[str]]:
    """Returns the turns that two conversations share, and the last response of each."""
    if first[:-1] != second[:-1] or len(first) < 2:
        raise BadRow("'chosen' and 'rejected' must differ in their last response alone")
    answers = [_answer(first[-1:], "chosen"), _answer(second[-1:], "rejected")]
    return counted(first[:-1], first.merged), answers


def _validate_beginning(prompt: Any, shared: Sequence[chat.Message]) -> None:
    """Validates that a prompt beside whole conversations is the one that they begin with."""
    if isinstance(prompt, str):
        same = any(turn["content"].strip() == prompt.strip() for turn in shared)
    else:
        same = read_turns(prompt, "prompt") == list(shared)
    if not same:
        raise BadRow("column 'prompt' is not what 'chosen' and 'rejected' begin with")


def _pair_scores(row: Row) -> list[float]:
    """Returns the scores of chosen and rejected; their difference is the margin."""
    if row.get("margin") is not None:
        margin = number(row["margin"], "margin")
        if margin < 0:
            raise BadRow(f"column 'margin' must be >= 0, got {margin}")
        return [max(margin, LEAST_MARGIN), 0.0]
    chosen, rejected = row.get("score_chosen"), row.get("score_rejected")
    if chosen is None or rejected is None:
        return [1.0, 0.0]
    scores = [number(chosen, "score_chosen"), number(rejected, "score_rejected")]
    if scores[0] < scores[1]:
        raise BadRow(f"score_chosen={scores[0]} is below score_rejected={scores[1]}")
    return scores


def _ranked(prompt: Any, completions: Sequence[str], scores: Sequence[float]) -> Row:
    return {
        "prompt": prompt,
        "completions": list(completions),
        "scores": list(scores),
    }


def ranks(row: Row) -> Row:
    """{"prompt": …, "completions": […], "ranks": […]}, with 1 for the best; equal ranks tie."""
    return _by_ranks(row, "ranks")


def ranking(row: Row) -> Row:
    """The same with a column `ranking`, as `export_rankings` writes it."""
    return _by_ranks(row, "ranking")


def _by_ranks(row: Row, column: str) -> Row:
    given = whole_numbers(row[column], column).tolist()
    completions = _responses(row["completions"])
    ranked = _ranked(row["prompt"], completions, [-float(rank) for rank in given])
    ranked["ranks"] = given
    return ranked | {name: row[name] for name in ("labeler",) if name in row}


def _responses(value: Any) -> list[str]:
    return [
        _response(one, "completions")
        if isinstance(one, list)
        else string(one, "completions", empty=True)
        for one in as_list(value, "completions")
    ]


def nectar(row: Row) -> Row:
    """{"prompt": …, "answers": [{"answer": "…", "rank": 1}, …]}."""
    answers = _objects(row["answers"], "answers", ("answer", "rank"))
    scores = [-number(answer["rank"], "rank") for answer in answers]
    prompt = row["prompt"]
    if isinstance(prompt, str) and _HH.match(prompt):
        prompt = [turn for turn in _conversation(prompt, "prompt") if turn["content"]]
    return _ranked(prompt, [answer["answer"] for answer in answers], scores)


def ultrafeedback(row: Row) -> Row:
    """{"instruction": …, "completions": [{"response": "…", "overall_score": 7.5}, …]}."""
    needed = ("response", "overall_score")
    completions = _objects(row["completions"], "completions", needed)
    scores = [number(one["overall_score"], "overall_score") for one in completions]
    responses = [one["response"] for one in completions]
    return _ranked(row["instruction"], responses, scores)


def _objects(value: Any, column: str, needed: Sequence[str]) -> list[Mapping[str, Any]]:
    objects = as_list(value, column)
    for one in objects:
        if not isinstance(one, Mapping) or not set(needed) <= set(one):
            raise BadRow(
                f"column {column!r} must hold objects with {' and '.join(needed)},"
                f" got {json_text.shown(one)}"
            )
    return objects


def shp(row: Row) -> Row:
    """{"history": …, "human_ref_A": …, "human_ref_B": …, "labels": 1 if A is better, else 0}.

    Where there are `score_A` and `score_B`, upvotes, these are the scores (Ethayarajh et al. 2022).
    """
    a_is_better = flag(row["labels"], "labels")
    scores = [float(a_is_better), float(not a_is_better)]
    if row.get("score_A") is not None and row.get("score_B") is not None:
        scores = [number(row["score_A"], "score_A"), number(row["score_B"], "score_B")]
        if scores[0] != scores[1] and a_is_better != (scores[0] > scores[1]):
            raise BadRow(f"labels={int(a_is_better)} contradicts the scores {scores}")
    return _ranked(row["history"], [row["human_ref_A"], row["human_ref_B"]], scores)


# ------------------------------------------------------------------ single labels


def kto(row: Row) -> Row:
    """{"prompt": …, "completion": …, "label": true or false} (Ethayarajh et al. 2024)."""
    return {
        "messages": prompt_turns(row["prompt"]),
        "response": _response(row["completion"], "completion"),
        "desirable": row["label"],
    }


def stepwise(row: Row) -> Row:
    """{"prompt": …, "completions": [step, …], "labels": [true, …]}, TRL's form."""
    return {
        "messages": prompt_turns(row["prompt"]),
        "steps": row["completions"],
        "labels": row["labels"],
    }


def prm800k(row: Row) -> Row:
    """{"question": {"problem": …}, "label": {"steps": [{"completions": […], …}, …]}}.

    The row is the path of the chosen completions, with their ratings (Lightman et al. 2023). Where
    none was chosen, the step that a person wrote continues it with rating 1; without such a step,
    the first completion is the last step. A step without a rating ends the path before it.
    """
    question = _field(row["question"], "problem", "question")
    steps, labels = [], []
    for step in as_list(_field(row["label"], "steps", "label"), "label"):
        completion, is_last = _taken(step)
        if completion is None or completion.get("rating") is None:
            break
        steps.append(string(completion.get("text"), "text"))
        labels.append(completion["rating"])
        if is_last:
            break
    return {"messages": [_user(question, "problem")], "steps": steps, "labels": labels}


def _taken(step: Any) -> tuple[Mapping[str, Any] | None, bool]:
    """Returns the completion of a step that the path takes, and whether the path ends there."""
    completions = as_list(_field(step, "completions", "label") or [], "completions")
    chosen = step.get("chosen_completion")
    human = step.get("human_completion")
    if chosen is None and isinstance(human, Mapping):
        return {**human, "rating": 1}, False
    index = 0 if chosen is None else chosen
    if type(index) is not int or not 0 <= index < max(len(completions), 1):
        raise BadRow(f"chosen_completion={json_text.shown(index)}: no such completion")
    taken = completions[index] if completions else None
    if taken is not None and not isinstance(taken, Mapping):
        raise BadRow(f"a completion must be an object, got {json_text.shown(taken)}")
    return taken, chosen is None


def _field(value: Any, name: str, column: str) -> Any:
    if not isinstance(value, Mapping) or name not in value:
        raise BadRow(
            f"column {column!r} must hold an object with {name!r},"
            f" got {json_text.shown(value)}"
        )
    return value[name]


_STEP_END = "ки"  # what Math-Shepherd ends a step with
_SIGNS = {"+": 1.0, "-": 0.0}


def math_shepherd(row: Row) -> Row:
    """{"input": "question Step 1: … ки\\nStep 2: … ки", "label": the same with + or - for ки}.

    Wang et al. 2024 (Math-Shepherd).
    """
    text, label = string(row["input"], "input"), string(row["label"], "label")
    question, found, solution = text.partition("Step 1:")
    parts = (found + solution).split(_STEP_END)
    if not question.strip() or not found or parts[-1].strip():
        raise BadRow(
            f"column 'input' must be a question and steps that end with {_STEP_END}"
        )
    steps, labels = [], []
    position = len(question)
    for part in parts[:-1]:
        position += len(part)
        sign = label[position : position + 1]
        if sign not in _SIGNS:
            raise BadRow(
                "column 'label' must be 'input' with + or - in place of"
                f" {_STEP_END}, got {json_text.shown(sign)}"
            )
        steps.append(part.strip())
        labels.append(_SIGNS[sign])
        position += 1
    return {
        "messages": [_user(question.strip(), "input")],
        "steps": steps,
        "labels": labels,
    }
