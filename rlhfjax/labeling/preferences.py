"""Rankings as rows of a preference dataset, which the stages `reward` and `direct` read.

Responses that a policy sampled keep their token ids; other texts are encoded, with eos.
"""

from collections.abc import Sequence

from rlhfjax.data import chat
from rlhfjax.data.preferences import ranks_of
from rlhfjax.data.rows import opening
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.labeling import export, tasks
from rlhfjax.labeling.export import Row
from rlhfjax.labeling.store import Label
from rlhfjax.labeling.tables import SUBMIT, WORK


def rows(labels: Sequence[Label], tokenizer: Tokenizer | None) -> list[tuple[str, Row]]:
    """Returns the rows of all rankings, each with the text that decides its split.

    Args:
      tokenizer: of texts that were not sampled; None: labels with such texts are left out.
    """
    given = [label for label in labels if (label.kind, label.action) == (WORK, SUBMIT)]
    found = [_row(label, tokenizer) for label in given]
    return [keyed for keyed in found if keyed is not None]


def _row(label: Label, tokenizer: Tokenizer | None) -> tuple[str, Row] | None:
    ranking = export.ranking_row(label)
    if ranking is None:
        return None
    tokens = _tokens(label, ranking["completions"], tokenizer)
    if tokens is None:
        return None
    prompt, ids = tokens
    messages = ranking["prompt"]
    text = messages if isinstance(messages, str) else chat.to_text(messages)
    scores = [-float(rank) for rank in ranking["ranking"]]
    row = {
        "prompt": text,
        "prompt_tokens": prompt,
        "completions": ranking["completions"],
        "completion_tokens": ids,
        "scores": scores,
        "ranks": ranks_of(scores),
        "labeler": label.who,
    }
    return text if isinstance(messages, str) else opening(messages), row


def _tokens(
    label: Label, texts: Sequence[str], tokenizer: Tokenizer | None
) -> tuple[list[int], list[list[int]]] | None:
    """Returns the ids of a ranking's prompt and of its responses; None without a tokenizer."""
    content = label.content
    sampled = content.get("completion_tokens", [])
    responses = content.get("responses") or [content.get("response")]
    known = dict(zip(responses, sampled, strict=False))
    prompt = content.get("prompt_tokens")
    if tokenizer is None:
        if prompt is None or any(text not in known for text in texts):
            return None
        return prompt, [known[text] for text in texts]
    if prompt is None:
        messages = tasks.messages_of(content["prompt"])
        prompt = chat.render_prompt(tokenizer, messages).tolist()
    ids = [known.get(text) or chat.response_tokens(tokenizer, text) for text in texts]
    return prompt, ids
