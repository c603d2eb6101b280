"""Critique and revision: responses, criticized and rewritten, as fine-tuning data (SL-CAI).

workdir/{train,validation}.jsonl    {"messages": [..., the revised response]}, rows of kind messages
workdir/revisions.jsonl             every draft with its critiques, for people

Every round draws a principle for each prompt, by seed, round and prompt. A line of `principles` is
JSON: {"critique": "Identify …", "revision": "Please rewrite …"}.

Source: Bai et al. 2022, "Constitutional AI", section 3.1 and appendix C (four revisions, principles
drawn at random).
"""

import dataclasses
from typing import Any

from rlhfjax import paths
from rlhfjax.data import chat
from rlhfjax.data.accepted import accepted
from rlhfjax.data.counted import data_metrics
from rlhfjax.data.rows import Row, opening, split_of
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows, write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import PositiveCount, ProperShare, Seed, Size, Temperature, Tokens
from rlhfjax.rewards.feedback import choose
from rlhfjax.rewards.judge import Conversation, Judge, JudgeConfig
from rlhfjax.rl.config import PromptConfig
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.roles import Role, Workload, job_workload
from rlhfjax.streams import PER_CRITIQUE_SEED
from rlhfjax.supervised import validate_length

SPLITS = ("train", "validation")
Principle = dict[str, str]  # {"critique": request, "revision": request}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The options of critique and revision."""

    stage: str = "critique"
    """Name of the stage."""
    init_from: str
    """Workdir of the policy that responds."""
    critic: str | None = None
    """Workdir of the model that criticizes and revises; None: the policy, as in the paper."""
    prompts: PromptConfig = PromptConfig()
    """Prompts to respond to."""
    principles: str
    """File of JSON lines, one principle per line."""
    rounds: PositiveCount = 1
    """Revisions per response (the paper: 4)."""
    length: Tokens
    """Tokens of a conversation with its response; a longer one's prompt loses its beginning."""
    max_new_tokens: Tokens
    """Tokens of the longest response, critique or revision."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""
    validation: ProperShare = 0.1
    """Share of the prompts in the validation split, by a stable hash of their first user turn."""
    batch_size: Size = 32
    """Conversations per batch."""
    seed: Seed = 0
    """Seed of prompts, principles and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""


def roles(config: Config) -> dict[str, Role]:
    critic = {"critic": Role(config.critic)} if config.critic else {}
    return {"policy": Role(config.init_from), **critic}


def workload(config: Config, completions: int = 1) -> Workload:
    return job_workload(config.batch_size, config.length)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.validate_batch(config.batch_size, "critique.batch_size")
    validate_length(config.length, model_config, "critique.length")
    if config.max_new_tokens >= config.length:
        raise ConfigError(
            f"critique.max_new_tokens={config.max_new_tokens}: "
            f"must be less than length={config.length}"
        )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the files; returns the numbers of prompts, of revised and of empty responses, and the
    share of prompts that lost their beginning."""
    principles = read_principles(config.principles)
    policy = _open_model(config, config.init_from, layout)
    critic = policy
    if config.critic is not None:
        critic = _open_model(config, config.critic, layout)
    source = open_prompts(
        config.prompts, "critique.prompts", policy.tokenizer, config.seed
    )
    source = accepted(source, critic.tokenizer, validate_revision)
    prompts: list[Conversation] = [source[i]["messages"] for i in range(len(source))]
    cut: set[int] = set()

    def shortened(model: Judge, turns: list[Conversation]) -> list[Conversation]:
        """Returns each prompt, as far as the model has room for it, with the turns after it."""
        room = config.length - config.max_new_tokens
        questions = []
        for i, (prompt, rest) in enumerate(zip(prompts, turns, strict=True)):
            question = chat.shorten_conversation(model.tokenizer, prompt, rest, room)
            if question != [*prompt, *rest]:
                cut.add(i)
            questions.append(question)
        return questions

    no_turns: list[Conversation] = [[] for _ in prompts]
    drafts = [_say(config, policy, shortened(policy, no_turns), 0)]
    critiques: list[list[str]] = []
    for number in range(config.rounds):
        chosen = [_choose(config, principles, number, prompt) for prompt in prompts]
        turns = [
            [_turn("assistant", draft), _turn("user", principle["critique"])]
            for draft, principle in zip(drafts[-1], chosen, strict=True)
        ]
        questions = shortened(critic, turns)
        critiques.append(_say(config, critic, questions, 2 * number + 1))
        for before, critique, principle in zip(
            turns, critiques[-1], chosen, strict=True
        ):
            before.append(_turn("assistant", critique))
            before.append(_turn("user", principle["revision"]))
        questions = shortened(critic, turns)
        drafts.append(_say(config, critic, questions, 2 * number + 2))
    metrics = _write(config, workdir, prompts, drafts, critiques)
    metrics["critique/prompts_cut"] = len(cut) / len(prompts)
    metrics |= data_metrics(source, "critique")
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def validate_revision(tokenizer: Tokenizer, row: Row) -> None:
    """Validates that the critic's chat template takes a prompt and the turns that follow it."""
    asked = [_turn("assistant", "?"), _turn("user", "?")]
    for turns in (asked, asked + asked):
        chat.validate_prompt(tokenizer, [*row["messages"], *turns])


def read_principles(path: str) -> list[Principle]:
    """Returns the principles of a file of JSON lines.

    Raises:
      DataError: the file has no line, or one of another form.
    """
    principles = []
    for place, row in located_rows(paths.path(path)):
        requests = [row.get(name) for name in ("critique", "revision")]
        if not all(isinstance(request, str) and request for request in requests):
            raise DataError(
                f'{place}: expected {{"critique": …, "revision": …}}, got {str(row)[:60]!r}'
            )
        principles.append(row)
    if not principles:
        raise DataError(f"principles: {path} is empty; expected one principle per line")
    return principles


def _open_model(config: Config, model: str, layout: Layout) -> Judge:
    judge_config = JudgeConfig(
        model=model, length=config.length, batch_size=config.batch_size
    )
    return Judge(judge_config, layout)


def _choose(
    config: Config, principles: list[Principle], number: int, prompt: Conversation
) -> Principle:
    """Returns the principle of a prompt in a round."""
    indices = [str(i) for i in range(len(principles))]
    index = choose(indices, config.seed, number, chat.to_text(prompt))
    return principles[int(index)]


def _turn(role: str, content: str) -> chat.Message:
    return {"role": role, "content": content}


def _say(
    config: Config, model: Judge, questions: list[Conversation], draw: int
) -> list[str]:
    """Returns the model's responses as text; another `draw` has other random numbers."""
    seed = (config.seed * PER_CRITIQUE_SEED + draw) % 2**31
    responses = model.answer(
        questions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
    )
    return [model.tokenizer.decode(ids).strip() for ids in responses]


def _write(
    config: Config,
    workdir: Path,
    prompts: list[Conversation],
    drafts: list[list[str]],
    critiques: list[list[str]],
) -> dict[str, float]:
    """Writes the files; an empty last draft is left out of the splits, and counted."""
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    revisions = []
    for i, prompt in enumerate(prompts):
        revisions.append(
            {
                "messages": prompt,
                "drafts": [texts[i] for texts in drafts],
                "critiques": [texts[i] for texts in critiques],
            }
        )
        last = drafts[-1][i]
        if last:
            split = split_of(opening(prompt), validation=config.validation, test=0.0)
            splits[split].append({"messages": [*prompt, _turn("assistant", last)]})
    for split, rows in {**splits, "revisions": revisions}.items():
        write_jsonl(workdir / f"{split}.jsonl", rows)
    first_and_last = zip(drafts[0], drafts[-1], strict=True)
    changed = sum(first != last for first, last in first_and_last)
    kept = sum(len(rows) for rows in splits.values())
    return {
        "critique/prompts": float(len(prompts)),
        "critique/empty": float(len(prompts) - kept),
        "critique/revised": changed / len(prompts),
    }
