"""Puts items into the store: all of them at the start, or batch by batch as a policy samples."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import chat
from rlhfjax.data.padding import pad_right
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.interop.store import SavedModel
from rlhfjax.labeling import queue, sources, tasks
from rlhfjax.labeling.config import Config
from rlhfjax.labeling.store import Item, Store
from rlhfjax.labeling.tables import CALIBRATION, SCREENING
from rlhfjax.mesh import Layout
from rlhfjax.rewards.ensemble import EnsembleReward
from rlhfjax.rewards.labelers import make_answers
from rlhfjax.rewards.load import label, load_reward
from rlhfjax.rl.prompts import open_prompts, read_prompts
from rlhfjax.rl.responses import PromptBatching, Responses, sample_responses
from rlhfjax.sampling.config import Sampling


class Filler:
    """The items of one stage.

    Args:
      tokenizer: of texts that were not sampled; None where none is needed.
      policy: samples responses while people label; None: all items are there at the start.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        layout: Layout,
        tokenizer: Tokenizer | None,
        policy: SavedModel | None,
    ):
        self._config = config
        self._store = store
        self._layout = layout
        self._tokenizer = tokenizer
        self._policy = policy
        self._batches: Iterator[list[Item]] | None = None

    def start(self) -> None:
        """Adds the items; those of a stage that goes on are there already.

        Raises:
          DataError: a row is malformed, or there is nothing to label.
        """
        config, store = self._config, self._store
        if config.screening and not store.item_count(SCREENING):
            store.add(sources.known_items(config.screening, SCREENING))
        if config.calibration and not store.item_count(CALIBRATION):
            store.add(sources.known_items(config.calibration, CALIBRATION))
        if self._policy is not None or store.item_count():
            return
        items = self._given()
        if not items:
            raise DataError("label: there is nothing to label; all responses are equal")
        self._add(items)

    def count(self) -> int:
        """Returns the number of labels to collect: no more than there are items for."""
        wanted = self._config.count
        if self._policy is not None:
            return wanted
        available = self._store.label_count() + queue.left(self._store)
        return min(wanted or available, available)

    def refill(self) -> bool:
        """Samples responses to the next prompts; returns whether there may be more."""
        if self._batches is None:
            self._batches = self._sampled()
        items = next(self._batches, None)
        if items is not None:
            self._add(items)
        return items is not None

    def _given(self) -> list[Item]:
        config = self._config
        if config.conversations:
            return sources.blank_conversations(config.conversations)
        if config.prompts.source is not None:
            rows = _prompts(config)
        elif config.items:
            rows = sources.lines(config.items)
        else:
            folders = map(sources.collected, config.answers)
            rows = (row for folder in folders for row in folder)
        pace = config.seconds_per_token
        return sources.located_items(rows, config.task, self._tokenizer, pace)

    def _add(self, items: list[Item]) -> None:
        """Adds items with their priorities and overlaps."""
        config = self._config
        if config.order == "disagreement":
            priorities = self._disagreements(items)
        else:
            priorities = queue.priorities([item.id for item in items], config.seed)
        pairs = zip(items, priorities, strict=True)
        items = [item._replace(priority=priority) for item, priority in pairs]
        share = config.overlap_share
        self._store.add(queue.in_turn(items, config.overlap, share, config.seed))

    # -------------------------------------------------------------- sampled while people label

    def _sampled(self) -> Iterator[list[Item]]:
        """Yields the items of every batch of prompts that has none yet."""
        config, policy = self._config, self._policy
        assert policy is not None
        tokenizer = policy.tokenizer
        source = open_prompts(config.prompts, "label.prompts", tokenizer, config.seed)
        start = self._store.next_row()
        batches = sample_responses(
            Rest(source, start),
            policy,
            Sampling.from_config(config, tokenizer, config.samples_per_prompt),
            PromptBatching(batch_size=config.batch_size, length=config.prompt_length),
            jax.random.fold_in(jax.random.key(config.seed), start),
            self._layout,
        )
        for batch in batches:
            rows = sampled_rows(batch, config.samples_per_prompt, tokenizer, start)
            pace = config.seconds_per_token
            yield [
                item
                for row in rows
                for item in sources.items_of(row, config.task, tokenizer, pace)
            ]

    # -------------------------------------------------------------- disagreement of an ensemble

    def _disagreements(self, items: list[Item]) -> list[float]:
        """Returns how much the ensemble disagrees about the responses of each item.

        Raises:
          ConfigError: the reward is no ensemble.
        """
        config, tokenizer = self._config, self._tokenizer
        assert tokenizer is not None
        reward = load_reward(config.reward, self._layout, tokenizer)
        if not isinstance(reward, EnsembleReward):
            raise ConfigError(
                f"label.reward={label(config.reward)}: expected an ensemble of reward models,"
                ' such as a compose stage with combine="mean"'
            )
        groups = [_sequences(item, tokenizer) for item in items]
        sequences = [ids for group in groups for ids in group]
        rewards = self._member_rewards(reward, sequences, tokenizer.pad_id)
        ends = np.cumsum([len(group) for group in groups])[:-1]
        return [queue.disagreement(part) for part in np.split(rewards, ends, axis=1)]

    def _member_rewards(
        self, reward: EnsembleReward, sequences: list[list[int]], pad_id: int
    ) -> np.ndarray:
        """Returns the rewards [m, n] of n sequences."""
        size = self._config.batch_size * self._config.samples_per_prompt
        length = max(map(len, sequences))
        rewards = []
        for start in range(0, len(sequences), size):
            rows = sequences[start : start + size]
            filled = rows + [rows[0]] * (size - len(rows))
            batch = self._layout.put(pad_right(filled, length=length, pad_id=pad_id))
            scored = np.asarray(hosts.whole(reward.members(*batch)))
            rewards.append(scored[:, : len(rows)])
        return np.concatenate(rewards, axis=1)


class Rest:
    """The rows of a source from a number on."""

    def __init__(self, source: Source, start: int):
        self._source, self._start = source, start
        self.kind = source.kind
        self.skipped = source.skipped

    def __len__(self) -> int:
        return max(0, len(self._source) - self._start)

    def __getitem__(self, index: int) -> Row:
        return self._source[self._start + index]

    def locate(self, index: int) -> str:
        return self._source.locate(self._start + index)


def sampled_rows(
    batch: Responses, k: int, tokenizer: Tokenizer, start: int
) -> list[dict[str, Any]]:
    """Returns one row per prompt of a batch, without the prompts that only fill it.

    Args:
      start: the number of the source's first prompt; `row` counts from there.
    """
    rollout = hosts.whole(batch.rollout)
    answers = make_answers(
        rollout.tokens, rollout.attention_mask, rollout.mask, k, tokenizer
    )
    p = rollout.tokens.shape[1] - rollout.mask.shape[1]
    rows = []
    for i in np.flatnonzero(batch.index >= 0):
        first = i * k
        is_prompt = rollout.attention_mask[first, :p] > 0
        responses = [
            rollout.responses[j][rollout.mask[j] > 0].tolist()
            for j in range(first, first + k)
        ]
        row = {
            "prompt": answers.prompts[i],
            "prompt_tokens": rollout.tokens[first, :p][is_prompt].tolist(),
            "completions": answers.completions[i],
            "completion_tokens": responses,
            "row": start + int(batch.index[i]),
        }
        rows.append(row)
    return rows


def _prompts(config: Config) -> Iterator[tuple[str, sources.Row]]:
    """Yields the prompts of demonstrations, each with its place for errors."""
    source = read_prompts(config.prompts, "label.prompts", config.seed)
    for i in range(len(source)):
        yield f"label.prompts: row {i}", {"prompt": source[i]["messages"]}


def _sequences(item: Item, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of an item's prompt with each of its responses."""
    content = item.content
    if "completion_tokens" in content:
        prompt, responses = content["prompt_tokens"], content["completion_tokens"]
    else:
        messages = tasks.messages_of(content["prompt"])
        prompt = chat.render_prompt(tokenizer, messages).tolist()
        texts = content.get("responses") or [content["response"]]
        responses = [chat.response_tokens(tokenizer, text) for text in texts]
    return [[*prompt, *response] for response in responses]
