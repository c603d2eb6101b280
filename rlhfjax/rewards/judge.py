"""A language model as a judge: log-probabilities of options after a question, and its own answers.

Any model that the sampler runs can judge. A question is a conversation; an option is text with
which the assistant's turn would begin.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhfjax import hosts
from rlhfjax.data import chat
from rlhfjax.data.examples import prompt_room
from rlhfjax.data.padding import pad_left, pad_right
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import Size, Tokens
from rlhfjax.roles import DISK, Sources
from rlhfjax.sampling import Sampling, generate
from rlhfjax.sampling.config import end_ids
from rlhfjax.types import PyTree

Conversation = list[chat.Message]
Row = tuple[list[int], list[int]]  # token ids of a question, and of an option
_LABEL = re.compile(rf"({'|'.join(chat.ROLES)}):", re.IGNORECASE)
_CUT = "…"  # stands before a text that lost its beginning


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which model judges, and in which batches."""

    model: str
    """workdir of a stage that made a language model, or another source of one"""
    length: Tokens
    """tokens of question and option together; a longer question is cut"""
    batch_size: Size = 32
    """rows per forward pass"""


class Judge:
    """Scores options and answers questions, in batches of one shape.

    Raises:
      ConfigError: the model has no language-model head, or a shorter context than `length`.
    """

    def __init__(self, config: JudgeConfig, layout: Layout, sources: Sources = DISK):
        saved = sources.load(config.model, layout)
        if saved.model.head != "lm":
            raise ConfigError(
                f"judge.model={config.model}: expected a language model,"
                f" got one with a {saved.model.head} head"
            )
        longest = saved.model.config.max_length
        if config.length > longest:
            raise ConfigError(
                f"judge.length={config.length}: must be <= the model's max_length={longest}"
            )
        layout.validate_batch(config.batch_size, "judge.batch_size")
        self.tokenizer: Tokenizer = saved.tokenizer
        self._validate_template(config.model)
        self._config, self._layout = config, layout
        self._model, self._params = saved.model, saved.params
        self._score = jax.jit(functools.partial(span_logprobs, saved.model))

    def _validate_template(self, model: str) -> None:
        """Validates that the model's chat template takes a question. Raises DataError."""
        try:
            chat.validate_prompt(self.tokenizer, _question("?"))
        except DataError as error:
            raise DataError(f"judge.model={model}: {error}") from None

    def room(self, options: Sequence[str], thought: int = 0) -> int:
        """Returns how many tokens a question may have before a thought and the longest option."""
        longest = max(len(self.tokenizer.encode(option)) for option in options)
        return self._config.length - thought - longest

    def logprobs(
        self,
        questions: Sequence[Conversation],
        options: Sequence[str],
        openings: Sequence[Sequence[int]] = (),
    ) -> Float[np.ndarray, "n o"]:
        """Returns log p(option | question) in nats, the sum over the option's tokens.

        Args:
          openings: token ids with which the assistant's turn begins, before the option; none by
            default. An opening longer than `prompt_room` allows loses its beginning.
        """
        ends = [self.tokenizer.encode(option) for option in options]
        room = self.room(options)
        rows: list[Row] = []
        for i, question in enumerate(questions):
            opening = list(openings[i]) if openings else []
            most = prompt_room(room, len(opening))
            rendered = chat.render_prompt(self.tokenizer, question, max_tokens=most)
            prompt = rendered.tolist()
            opening = opening[max(0, len(prompt) + len(opening) - room) :]
            rows += [(prompt + opening, end) for end in ends]
        logprobs = np.concatenate(list(self._option_logprobs(rows)))
        return logprobs.reshape(len(questions), len(ends))

    def _option_logprobs(self, rows: list[Row]) -> Iterator[np.ndarray]:
        """Yields the log-probabilities of the options, float64, batch by batch."""
        size, length = self._config.batch_size, self._config.length
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            texts = [[*question, *option] for question, option in batch]
            texts += [[]] * (size - len(batch))
            tokens, attention_mask = pad_right(
                texts, length=length, pad_id=self.tokenizer.pad_id
            )
            mask = attention_mask.astype(np.float32)
            for i, (question, _) in enumerate(batch):
                mask[i, : len(question)] = 0
            placed = self._layout.put(
                {"tokens": tokens, "attention_mask": attention_mask, "mask": mask}
            )
            with self._layout.use():
                logprobs = self._score(
                    self._params,
                    placed["tokens"],
                    placed["attention_mask"],
                    placed["mask"],
                )
            yield np.asarray(hosts.whole(logprobs), np.float64)[: len(batch)]

    def answer(
        self,
        questions: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[int]]:
        """Returns the token ids of the model's answers, without eos.

        Answer i is sampled with fold_in(key(seed), i).
        """
        size, room = self._config.batch_size, self._config.length - max_new_tokens
        pad_id, ends = self.tokenizer.pad_id, end_ids(self.tokenizer)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eos_id,
            extra_eos_ids=self.tokenizer.extra_eos_ids,
            pad_id=pad_id,
            temperature=temperature,
        )
        answers: list[list[int]] = []
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            rendered = [
                chat.render_prompt(self.tokenizer, question, max_tokens=room)
                for question in batch
            ]
            rendered += rendered[-1:] * (size - len(batch))
            prompts, attention_mask = pad_left(rendered, length=room, pad_id=pad_id)
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
                jnp.arange(start, start + size)
            )
            placed = self._layout.put(
                {"prompts": prompts, "attention_mask": attention_mask}
            )
            with self._layout.use():
                samples = _generate(
                    self._model,
                    self._params,
                    placed["prompts"],
                    placed["attention_mask"],
                    keys,
                    sampling,
                )
            tokens, mask = hosts.whole((samples.tokens, samples.mask))
            for row, keep in zip(tokens[: len(batch)], mask[: len(batch)], strict=True):
                sampled = row[keep > 0].tolist()
                answers.append([token for token in sampled if token not in ends])
        return answers


_generate = jax.jit(generate, static_argnames=("model", "sampling"))


def span_logprobs(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    attention_mask: Int[Array, "n t"],
    mask: Float[Array, "n t"],
) -> Float[Array, " n"]:
    """Returns the summed log-probabilities, in nats, of the tokens where the mask is 1."""
    hidden = model.hidden(params, tokens, segment_ids=attention_mask)
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    return jnp.sum(jnp.where(mask[:, 1:] > 0, logprobs, 0), axis=1)


def class_probabilities(logprobs: Float[np.ndarray, "n o"]) -> Float[np.ndarray, "n o"]:
    """Returns p_o = e^{l_o} / sum e^{l}, the choice among the options alone."""
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def readable(prompt: str) -> str:
    """Returns a prompt with chat markers as lines `User: …`, one per turn that has text.

    A turn begins at the margin, and its further lines are indented: no message can write a turn.
    """
    lines = []
    for turn in chat.turns_of(prompt):
        if not turn["content"].strip():
            continue
        text = indented(turn["content"])
        if turn["role"]:
            text = f"{turn['role'].capitalize()}: {text}"
        elif _LABEL.match(text):
            text = _CUT + text
        lines.append(text)
    return "\n".join(lines)


def indented(text: str) -> str:
    """Returns a text with two blanks before each line but the first."""
    first, *rest = text.splitlines(keepends=True) or [""]
    return first + "".join(f"  {line}" if line.strip() else line for line in rest)


def ask(
    tokenizer: Tokenizer,
    template: str,
    max_tokens: int,
    values: Mapping[str, str],
    *,
    uncut: Sequence[str] = (),
) -> tuple[Conversation, bool]:
    """Returns a template with its values as a question, and whether a value was cut to fit.

    `prompt` is written as `readable` does, and further lines of the other values are indented: a
    line at the margin is the template's, or opens a turn. Where the judge's chat template marks
    turns by ordinary text, a value that spells such a marker gets a blank within it.

    The words of the template stay, so that the judge sees the question and its options. `prompt`
    loses its beginning, down to half of what the template leaves; the other values lose their ends,
    the longest first.

    Args:
      max_tokens: of the question in the chat template.
      values: texts for the names in the template; `prompt` has chat markers.
      uncut: names of values that are not cut.

    Raises:
      ConfigError: the template does not leave a token for each value.
    """
    markers = tokenizer.template.plain_markers
    written = {}
    for name, text in values.items():
        text = readable(text) if name == "prompt" else indented(text)
        written[name] = _without_markers(text, markers)
    values = written
    filled = fill(template, values)
    over = _size(tokenizer, filled) - max_tokens
    if over <= 0:
        return _question(filled), False
    ids = {
        name: tokenizer.encode(text)
        for name, text in values.items()
        if name not in uncut and f"{{{name}}}" in template
    }
    without = fill(template, {**values, **dict.fromkeys(ids, "")})
    room = max_tokens - _size(tokenizer, without)
    # Parts may take more tokens in their context than alone; then less room is tried.
    while over > 0 and room >= len(ids):
        filled = fill(template, {**values, **_parts(tokenizer, ids, room)})
        over = _size(tokenizer, filled) - max_tokens
        room -= over
    if over > 0:
        raise ConfigError(
            f"judge.length: {max_tokens} tokens for a question do not hold the template "
            f"{template[:30]!r} with a token of {', '.join(ids)}"
        )
    return _question(filled), True


def _without_markers(text: str, markers: Sequence[str]) -> str:
    for marker in markers:
        text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def _question(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def _size(tokenizer: Tokenizer, text: str) -> int:
    """Returns how many tokens a question has."""
    return len(chat.render_prompt(tokenizer, _question(text)))


def _parts(
    tokenizer: Tokenizer, ids: Mapping[str, list[int]], room: int
) -> dict[str, str]:
    """Returns the texts of values cut to `room` tokens together; see `ask`."""
    others = [len(value) for name, value in ids.items() if name != "prompt"]
    prompt = min(len(ids.get("prompt", ())), prompt_room(room, sum(others)))
    most = room  # tokens of each other value
    while sum(min(most, size) for size in others) > room - prompt:
        most -= 1
    parts = {name: value[:most] for name, value in ids.items()}
    if "prompt" in ids:
        parts["prompt"] = ids["prompt"][len(ids["prompt"]) - prompt :]
    texts = {name: chat.decode_part(tokenizer, part) for name, part in parts.items()}
    if prompt < len(ids.get("prompt", ())):
        texts["prompt"] = _CUT + texts["prompt"]  # what was indented may begin it now
    return texts


# `{name}`, also with what str.format takes after a name. LaTeX has a word, `^`, `_` or a brace
# right before its braces; other braces in a text have a blank, a quote or a comma in them.
_PLACEHOLDER = re.compile(r"(?<![\w^}\\{])\{(\w+)((?:[.!:\[][^{}\s]*)?)\}(?!\})")


def validate_placeholders(
    option: str, template: str, names: Sequence[str], required: Sequence[str]
) -> None:
    """Validates the placeholders of a template for `fill`.

    Args:
      option: its name, for errors.
      names: the accepted placeholders.
      required: those that must be there.

    Raises:
      ConfigError: one is missing, or unknown, or has a format.
    """
    for name in required:
        if f"{{{name}}}" not in template:
            raise ConfigError(f"{option}: it has no {{{name}}}")
    accepted = ", ".join(f"{{{name}}}" for name in names)
    for match in _PLACEHOLDER.finditer(template):
        name, form = match.groups()
        if name not in names or form:
            raise ConfigError(
                f"{option}: {match.group()[:60]} is no placeholder; accepted: {accepted}, "
                f"and {{ {name} }} with blanks for text in braces"
            )


def fill(template: str, values: Mapping[str, str]) -> str:
    """Returns a template with values in place of `{name}`; braces within a value stay."""
    names = "|".join(rf"\{{{name}\}}" for name in values)
    return re.sub(names, lambda match: values[match.group()[1:-1]], template)
