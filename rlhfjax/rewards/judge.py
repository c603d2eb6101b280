"""A language model as a judge: log-probabilities of options after a question, and answers to requests.

Any model that the sampler runs can judge. A question is a conversation; an option is what the assistant's turn would
begin with.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhfjax import hosts
from rlhfjax.data import chat
from rlhfjax.data.examples import prompt_room
from rlhfjax.data.padding import pad_left, pad_right
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.paths import Path
from rlhfjax.ranges import Size, Tokens
from rlhfjax.rewards.responses import found
from rlhfjax.roles import DISK, Sources
from rlhfjax.sampling import Sampling, generate

Conversation = list[chat.Message]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which model judges, and how much of it is run at once."""

    model: str  # the workdir of a stage that made a language model
    length: Tokens  # question and option, tokens; a longer question is cut, see `ask`
    batch_size: Size = 32  # rows of a forward pass


def load_judge(
    config: JudgeConfig, folder: Path, layout: Layout, sources: Sources = DISK
) -> "Judge":
    """Returns the judge that a folder's reward.json names."""
    return Judge(
        dataclasses.replace(config, model=found(config.model, folder)), layout, sources
    )


class Judge:
    """Scores options and answers requests, in batches of one shape.

    Raises:
      ConfigError: the model has no language-model head, or too short a context.
    """

    def __init__(self, config: JudgeConfig, layout: Layout, sources: Sources = DISK):
        saved = sources.load(config.model, layout)
        if saved.model.head != "lm":
            raise ConfigError(
                f"judge.model={config.model}: a language model is needed, this one has another head"
            )
        if config.length > saved.model.config.max_length:
            raise ConfigError(
                f"judge.length={config.length} is more than the model's {saved.model.config.max_length}"
            )
        layout.check_batch(config.batch_size, "judge.batch_size")
        self.tokenizer: Tokenizer = saved.tokenizer
        self._config, self._layout = config, layout
        self._model, self._params = saved.model, saved.params
        self._score = jax.jit(functools.partial(span_logprobs, saved.model))

    def room(self, options: Sequence[str], thought: int = 0) -> int:
        """Tokens that a question may have before so many of thought and the longest option."""
        longest = max(len(self.tokenizer.encode(option)) for option in options)
        return self._config.length - thought - longest

    def logprobs(
        self,
        questions: Sequence[Conversation],
        options: Sequence[str],
        openings: Sequence[Sequence[int]] = (),
    ) -> Float[np.ndarray, "n o"]:
        """log p(option_o | question_n): the sum over the option's tokens, nats.

        Args:
          openings: ids with which the assistant's turn begins, before the option; none by default.
            Of a longer opening than `prompt_room` leaves room for, the end is kept, which the
            option follows.
        """
        ends = [self.tokenizer.encode(option) for option in options]
        room = self.room(options)
        rows = []
        for i, question in enumerate(questions):
            opening = list(openings[i]) if openings else []
            most = prompt_room(room, len(opening))
            prompt = chat.render_prompt(
                self.tokenizer, question, max_tokens=most
            ).tolist()
            opening = opening[max(0, len(prompt) + len(opening) - room) :]
            rows += [(prompt + opening, end) for end in ends]
        return np.concatenate(list(self._batches(rows))).reshape(
            len(questions), len(ends)
        )

    def _batches(self, rows):
        size, length, pad = (
            self._config.batch_size,
            self._config.length,
            self.tokenizer.pad_id,
        )
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            texts = [[*prompt, *end] for prompt, end in some]
            texts += [[]] * (size - len(some))
            tokens, segments = pad_right(texts, length=length, pad_id=pad)
            mask = segments.astype(np.float32)
            for i, (prompt, _) in enumerate(some):
                mask[i, : len(prompt)] = 0
            placed = self._layout.put(
                {"tokens": tokens, "segments": segments, "mask": mask}
            )
            with self._layout.use():
                out = self._score(
                    self._params, placed["tokens"], placed["segments"], placed["mask"]
                )
            yield np.asarray(hosts.whole(out), np.float64)[: len(some)]

    def answer(
        self,
        questions: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[int]]:
        """What the model says to each conversation: ids, without the eos. Row i is drawn with fold_in(key(seed), i)."""
        size, room = self._config.batch_size, self._config.length - max_new_tokens
        eos_id, pad_id = self.tokenizer.eos_id, self.tokenizer.pad_id
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
            pad_id=pad_id,
            temperature=temperature,
        )
        out: list[list[int]] = []
        for start in range(0, len(questions), size):
            some = questions[start : start + size]
            asked = [
                chat.render_prompt(self.tokenizer, one, max_tokens=room) for one in some
            ]
            asked += asked[-1:] * (size - len(some))
            prompts, segments = pad_left(asked, length=room, pad_id=pad_id)
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
                jnp.arange(start, start + size)
            )
            placed = self._layout.put({"prompts": prompts, "segments": segments})
            with self._layout.use():
                samples = _generate(
                    self._model,
                    self._params,
                    placed["prompts"],
                    placed["segments"],
                    keys,
                    sampling,
                )
            tokens, mask = hosts.whole((samples.tokens, samples.mask))
            rows = [
                row[keep > 0].tolist() for row, keep in zip(tokens, mask, strict=True)
            ]
            out += [
                [token for token in row if token != eos_id] for row in rows[: len(some)]
            ]
        return out


_generate = jax.jit(generate, static_argnames=("model", "sampling"))


def span_logprobs(
    model: Model,
    params: dict,
    tokens: Int[Array, "n t"],
    segments: Int[Array, "n t"],
    mask: Float[Array, "n t"],
) -> Float[Array, " n"]:
    """sum over the tokens where mask is 1 of log p(token | what is before it), nats."""
    hidden = model.hidden(params, tokens, segments=segments)
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    return jnp.sum(jnp.where(mask[:, 1:] > 0, logprobs, 0), axis=1)


def class_probabilities(logprobs: Float[np.ndarray, "n o"]) -> Float[np.ndarray, "n o"]:
    """p_o = e^{l_o} / sum e^{l}: the judge's choice among the options, whatever else it might have said."""
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def readable(prompt: str) -> str:
    """A prompt in the chat template as people read it: `User: …`, a line a turn, without the last, empty one."""
    first, *rest = re.split(r"<\|(user|assistant|system)\|>", prompt)
    turns = [
        (role.capitalize(), text)
        for role, text in zip(rest[::2], rest[1::2], strict=True)
        if text.strip()
    ]
    return "\n".join(
        [
            *([first] if first.strip() else []),
            *(f"{role}: {text}" for role, text in turns),
        ]
    )


def ask(
    tokenizer: Tokenizer,
    template: str,
    max_tokens: int,
    *,
    whole: Sequence[str] = (),
    **values: str,
) -> tuple[Conversation, bool]:
    """Returns a template with its values as a question of at most `max_tokens`, and whether a value
    was cut.

    The template's words stay, what it asks and the options it offers among them. `prompt` loses its
    beginning, down to half of what the template leaves, and the other values lose their ends, the
    longest first.

    Args:
      max_tokens: of the question in the chat template.
      whole: names of values that are not cut.

    Raises:
      ConfigError: the template alone does not leave a token for each value.
    """
    filled = fill(template, **values)
    over = _size(tokenizer, filled) - max_tokens
    if over <= 0:
        return _question(filled), False
    used = [name for name in values if name not in whole and f"{{{name}}}" in template]
    words = {name: tokenizer.encode(values[name]) for name in used}
    room = max_tokens - _size(
        tokenizer, fill(template, **values | dict.fromkeys(words, ""))
    )
    while over > 0 and room >= len(
        words
    ):  # again, where parts take more tokens than they did
        filled = fill(template, **values | _parts(tokenizer, words, room))
        over = _size(tokenizer, filled) - max_tokens
        room -= over
    if over > 0:
        raise ConfigError(
            f"judge.length: {max_tokens} tokens for a question do not hold the template "
            f"{template[:30]!r} with a token of {', '.join(words)}"
        )
    return _question(filled), True


def _question(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def _size(tokenizer: Tokenizer, text: str) -> int:
    return len(chat.render_prompt(tokenizer, _question(text)))


def _parts(
    tokenizer: Tokenizer, words: Mapping[str, list[int]], room: int
) -> dict[str, str]:
    """The texts of values cut to `room` tokens together; see `ask`."""
    others = [len(ids) for name, ids in words.items() if name != "prompt"]
    prompt = min(len(words.get("prompt", ())), prompt_room(room, sum(others)))
    most = room  # tokens of each other value
    while sum(min(most, size) for size in others) > room - prompt:
        most -= 1
    parts = {name: ids[:most] for name, ids in words.items()}
    if "prompt" in words:
        parts["prompt"] = words["prompt"][len(words["prompt"]) - prompt :]
    return {name: chat.decode_part(tokenizer, ids) for name, ids in parts.items()}


def fill(template: str, **values: str) -> str:
    """Puts values into `{name}` of a template, all at once, so that a value with braces stays as it is."""
    return re.sub(
        "|".join(rf"\{{{name}\}}" for name in values),
        lambda m: values[m.group()[1:-1]],
        template,
    )
