"""Critique and revision: a policy's answers, criticised and rewritten by a model, as fine-tuning data (SL-CAI).

workdir/{train,validation}.jsonl    {"messages": [..., the revised answer]}, rows of kind messages
workdir/revisions.jsonl             every draft with its critiques, for people

Every round draws a principle for each prompt, by seed, round and prompt: a line of `principles` is JSON,
{"critique": "Identify …", "revision": "Please rewrite …"}.

Source: Bai et al. 2022, "Constitutional AI", section 3.1 and appendix C (four revisions, principles drawn at random).
"""

import dataclasses
from typing import Any

from rlhfjax import paths
from rlhfjax.data import chat
from rlhfjax.data.rows import opening, split_of
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows, write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import PositiveCount, ProperShare, Seed, Size, Temperature, Tokens
from rlhfjax.rewards.feedback import choose
from rlhfjax.rewards.judge import Conversation, Judge, JudgeConfig
from rlhfjax.rl.prompts import PromptConfig, open_prompts
from rlhfjax.roles import Role, Workload, job_workload
from rlhfjax.streams import PER_CRITIQUE_SEED
from rlhfjax.supervised import validate_length

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "critique"
    init_from: str  # the policy that answers
    critic: str | None = (
        None  # criticises and revises; None: the policy itself, as in the paper
    )
    prompts: PromptConfig = PromptConfig()
    principles: str  # a file of JSON lines
    rounds: PositiveCount = 1  # revisions; the paper: 4
    length: Tokens  # conversation and answer, tokens; the prompt of a longer one loses its beginning
    max_new_tokens: Tokens  # tokens of an answer, a critique, a revision
    temperature: Temperature = 1.0
    validation: ProperShare = (
        0.1  # share of the prompts, by a stable hash of their first user turn
    )
    batch_size: Size = 32
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()


def roles(config: Config) -> dict[str, Role]:
    critic = {"critic": Role(config.critic)} if config.critic else {}
    return {"policy": Role(config.init_from), **critic}


def workload(config: Config, completions: int = 1) -> Workload:
    return job_workload(config.batch_size, config.length)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.check_batch(config.batch_size, "critique.batch_size")
    validate_length(config.length, model_config, "critique.length")
    if config.max_new_tokens >= config.length:
        raise ConfigError(
            f"critique.max_new_tokens={config.max_new_tokens}: expected less than length={config.length}"
        )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes both files; returns how many rows there are, how many answers a revision changed, and
    how many prompts lost their beginning in a request that had no room for them."""
    principles = read_principles(config.principles)
    options = {"length": config.length, "batch_size": config.batch_size}
    policy = Judge(JudgeConfig(model=config.init_from, **options), layout)
    critic = (
        policy
        if config.critic is None
        else Judge(JudgeConfig(model=config.critic, **options), layout)
    )
    source = open_prompts(config.prompts, "critique.prompts", seed=config.seed)
    prompts: list[Conversation] = [source[i]["messages"] for i in range(len(source))]
    cut: set[int] = set()

    def fitted(speaker: Judge, after: list[Conversation]) -> list[Conversation]:
        """What is asked about each prompt: the prompt, as the speaker has room for it, and the
        turns after it."""
        room, asked = config.length - config.max_new_tokens, []
        for i, (prompt, rest) in enumerate(zip(prompts, after, strict=True)):
            asked.append(
                chat.shorten_conversation(speaker.tokenizer, prompt, rest, room)
            )
            cut.update([i] if asked[-1] != [*prompt, *rest] else [])
        return asked

    drafts = [_say(config, policy, fitted(policy, [[] for _ in prompts]), 0)]
    critiques: list[list[str]] = []
    for number in range(config.rounds):
        chosen = [
            principles[
                int(choose(_numbers(principles), config.seed, number, chat.to_text(p)))
            ]
            for p in prompts
        ]
        after = [
            [_turn("assistant", draft), _turn("user", principle["critique"])]
            for draft, principle in zip(drafts[-1], chosen, strict=True)
        ]
        critiques.append(_say(config, critic, fitted(critic, after), 2 * number + 1))
        after = [
            [
                *before,
                _turn("assistant", critique),
                _turn("user", principle["revision"]),
            ]
            for before, critique, principle in zip(
                after, critiques[-1], chosen, strict=True
            )
        ]
        drafts.append(_say(config, critic, fitted(critic, after), 2 * number + 2))
    metrics = _write(config, workdir, prompts, drafts, critiques)
    metrics["critique/prompts_cut"] = len(cut) / len(prompts)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def read_principles(path: str) -> list[dict[str, str]]:
    """Returns the file's lines {"critique": request, "revision": request}.

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
        raise DataError(f"principles: {path} is empty; one a line is expected")
    return principles


def _numbers(principles: list[Any]) -> list[str]:
    return [str(i) for i in range(len(principles))]


def _turn(role: str, content: str) -> chat.Message:
    return {"role": role, "content": content}


def _say(
    config: Config, speaker: Judge, questions: list[Conversation], draw: int
) -> list[str]:
    """The speaker's answers as text; the draw numbers what is asked, so that no two share their randomness."""
    seed = (config.seed * PER_CRITIQUE_SEED + draw) % 2**31
    ids = speaker.answer(
        questions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
    )
    return [speaker.tokenizer.decode(one).strip() for one in ids]


def _write(
    config: Config,
    workdir: Path,
    prompts: list[Conversation],
    drafts: list[list[str]],
    critiques: list[list[str]],
) -> dict[str, float]:
    """An empty last draft is no example and is left out, and counted."""
    kept: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    everything = []
    for i, prompt in enumerate(prompts):
        everything.append(
            {
                "messages": prompt,
                "drafts": [d[i] for d in drafts],
                "critiques": [c[i] for c in critiques],
            }
        )
        if drafts[-1][i]:
            split = split_of(opening(prompt), validation=config.validation, test=0.0)
            held_out = split == "validation"
            kept[SPLITS[held_out]].append(
                {"messages": [*prompt, _turn("assistant", drafts[-1][i])]}
            )
    for split, rows in {**kept, "revisions": everything}.items():
        write_jsonl(workdir / f"{split}.jsonl", rows)
    changed = sum(
        first != last for first, last in zip(drafts[0], drafts[-1], strict=True)
    )
    return {
        "critique/prompts": float(len(prompts)),
        "critique/empty": float(len(prompts) - sum(map(len, kept.values()))),
        "critique/revised": changed / len(prompts),
    }
