"""Synthesizes prompts and responses from a few tasks that people wrote (Self-Instruct).

workdir/prompts/{train,validation}.jsonl    {"prompt", and its provenance}, rows of kind prompt
workdir/{train,validation}.jsonl            {"messages", and its provenance}, rows of kind messages
workdir/synthesis.json                      counts

    sft       sources   {"spec": "jsonl:stage:synthesize/{split}.jsonl", "kind": "messages"}
    collect   prompts   {"spec": "jsonl:stage:synthesize/prompts/{split}.jsonl", "kind": "prompt"}

Every round asks the model `batch_size` times for instructions, after examples that are drawn from
the seeds and from what it has written before. An instruction is taken if it has the right number of
words, none of `banned`, and a ROUGE-L below `similarity` with every one in the pool. Then the model
responds to each. The model is one of ours, or an OpenAI-compatible endpoint.

The provenance of a row: `id`, `model`, `seed`, `round`, `examples` (the ids that it was written
after), `nearest` and `similarity`. It holds no time: with one of our models, the same command gives
the same bytes. A run that was killed continues after its last round or batch of responses.

Source: Wang et al. 2022, "Self-Instruct", section 2.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfjax import endpoint, hosts, json_text, paths
from rlhfjax.corpus import instructions, similar
from rlhfjax.corpus.instructions import Instruction, Round, Rules, Task
from rlhfjax.data import chat
from rlhfjax.data.config import SourceConfig, open_sources
from rlhfjax.data.rows import opening, split_of
from rlhfjax.endpoint import Endpoint, EndpointConfig, Reply
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.progress import Progress
from rlhfjax.ranges import (
    Count,
    PositiveCount,
    PositiveShare,
    ProperShare,
    Seed,
    Size,
    Temperature,
    Tokens,
)
from rlhfjax.rewards.judge import (
    Conversation,
    Judge,
    JudgeConfig,
    validate_placeholders,
)
from rlhfjax.roles import Role, Workload, job_workload
from rlhfjax.streams import PER_SYNTHESIS_SEED
from rlhfjax.supervised import validate_length

log = logging.getLogger("rlhfjax")
SPLITS = ("train", "validation")
FILE = "synthesis.json"
PROMPTS, PARTS = "prompts", "parts"
Answer = Callable[[list[Conversation], int, int], list[Reply]]
"""(prompts, tokens of the longest response, draw) -> responses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The seed tasks, the model that writes, and which of its texts are kept."""

    stage: str = "synthesize"
    """Name of the stage."""
    seeds: tuple[SourceConfig, ...] = ()
    """Tasks that people wrote, rows of kind prompt or messages: their first user turns."""
    init_from: str | None = None
    """Workdir of the model that writes; None: `endpoint`."""
    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible endpoint that writes; None: `init_from`."""
    count: PositiveCount
    """Instructions to write."""
    rounds: PositiveCount = 1000
    """Rounds at most."""
    examples: PositiveCount = 8
    """Examples per question (the paper: 8)."""
    generated_examples: Count = 2
    """Of them, instructions that were generated (the paper: 2)."""
    template: str = instructions.TEMPLATE
    """The question, with {examples} and {next}, the number of the task to write."""
    min_words: Count = 4
    """Words of the shortest instruction (the paper's code: 4)."""
    max_words: PositiveCount = 150
    """Words of the longest instruction (the paper's code: 150)."""
    banned: tuple[str, ...] = ("image", "picture", "graph")
    """Words that no instruction may have: what a language model cannot do (the paper's three)."""
    similarity: PositiveShare = 0.7
    """ROUGE-L with an earlier instruction from which one is not taken (the paper: 0.7)."""
    responses: bool = True
    """Whether the model responds to the instructions."""
    length: Tokens = 2048
    """Tokens of a prompt with its response; a longer prompt loses its beginning."""
    max_new_tokens: Tokens = 512
    """Tokens of the longest response."""
    temperature: Temperature = 0.7
    """Sampling temperature of instructions (the paper: 0.7)."""
    response_temperature: Temperature = 0.0
    """Sampling temperature of responses (the paper: 0)."""
    batch_size: Size = 32
    """Questions per round, and responses per batch."""
    validation: ProperShare = 0.05
    """Share of the instructions in the validation split, by a stable hash of each."""
    seed: Seed = 0
    """Seed of examples and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""

    def __post_init__(self):
        if (self.init_from is None) == (self.endpoint is None):
            raise ConfigError("synthesize: give either init_from or endpoint")
        if self.generated_examples > self.examples:
            raise ConfigError(
                f"synthesize.generated_examples={self.generated_examples}:"
                f" must be <= examples={self.examples}"
            )
        names = ("examples", "next")
        validate_placeholders("synthesize.template", self.template, names, names[:1])

    @property
    def rules(self) -> Rules:
        return Rules(self.min_words, self.max_words, self.banned, self.similarity)


def roles(config: Config) -> dict[str, Role]:
    return {"policy": Role(config.init_from)} if config.init_from else {}


def workload(config: Config, completions: int = 1) -> Workload:
    return job_workload(config.batch_size, config.length)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    similar.validate_installed("synthesize")
    if config.endpoint is not None:
        endpoint.validate_installed()
        return
    layout.validate_batch(config.batch_size, "synthesize.batch_size")
    validate_length(config.length, model_config, "synthesize.length")
    if config.max_new_tokens >= config.length:
        raise ConfigError(
            f"synthesize.max_new_tokens={config.max_new_tokens}:"
            f" must be less than length={config.length}"
        )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the files; returns how many instructions were taken, and why others were not."""
    metrics = _read(workdir / FILE, dict[str, float])
    if metrics is None:
        metrics = _synthesize(config, workdir, layout)
        text = json_text.encode(metrics, workdir / FILE, indent=2) + "\n"
        hosts.share(lambda: paths.write(workdir / FILE, text))
    if hosts.first():
        paths.remove(workdir / PARTS)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _synthesize(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    seeds = read_seeds(config.seeds)
    hosts.share(lambda: paths.make_folder(workdir / PARTS))
    answer = _writer(config, layout)
    taken, counts = _instructions(config, seeds, answer, workdir / PARTS)
    replies = []
    if config.responses:
        replies = _responses(config, taken, answer, workdir / PARTS)
    _write(config, workdir, taken, replies)
    n_written = sum(counts.values())
    metrics = {
        "synthesize/instructions": float(len(taken)),
        "synthesize/written": float(n_written),
        "synthesize/taken": len(taken) / n_written,
    }
    for reason in instructions.REASONS:
        metrics[f"synthesize/refused_{reason}"] = float(counts[reason])
    if config.responses:
        usable = sum(map(_is_usable, replies))
        metrics["synthesize/responses"] = float(usable)
        metrics["synthesize/responses_refused"] = float(len(replies) - usable)
    return metrics


def read_seeds(sources: Sequence[SourceConfig]) -> list[Task]:
    """Returns the seed tasks. Raises ConfigError or DataError if there are none."""
    source = open_sources(sources, "synthesize.seeds")
    tasks = []
    for i in range(len(source)):
        row = source[i]
        if "messages" not in row:
            raise ConfigError(
                f"synthesize.seeds: {source.locate(i)} is a row of kind {source.kind};"
                " expected prompt or messages"
            )
        text = " ".join(opening(row["messages"]).split())
        tasks.append(Task(f"seed-{i}", text))
    return tasks


def _writer(config: Config, layout: Layout) -> Answer:
    """Returns the model that writes: one of our models, or an endpoint."""
    if config.endpoint is not None:
        server = Endpoint(config.endpoint)
        return lambda questions, tokens, draw: hosts.share(
            lambda: server.answer(
                questions,
                max_new_tokens=tokens,
                temperature=_temperature(config, draw),
                seed=_seed(config, draw),
            )
        )
    source = config.init_from or ""
    judge = Judge(
        JudgeConfig(model=source, length=config.length, batch_size=config.batch_size),
        layout,
    )
    name = paths.path(source).name or source

    def answer(questions: list[Conversation], tokens: int, draw: int) -> list[Reply]:
        _warn_of_long(judge, questions, config.length - tokens)
        sampled = judge.answer(
            questions,
            max_new_tokens=tokens,
            temperature=_temperature(config, draw),
            seed=_seed(config, draw),
        )
        return [
            Reply(
                text=judge.tokenizer.decode(ids).strip(),
                is_cut=len(ids) >= tokens,
                model=name,
            )
            for ids in sampled
        ]

    return answer


def _warn_of_long(judge: Judge, questions: list[Conversation], room: int) -> None:
    """Logs how many questions lose their beginnings, if any."""
    sizes = [len(chat.render_prompt(judge.tokenizer, one)) for one in questions]
    long = sum(size > room for size in sizes)
    if long:
        message = "synthesize: %d of %d questions have more than %d tokens and are cut"
        log.warning(message, long, len(sizes), room)


def _temperature(config: Config, draw: int) -> float:
    return config.response_temperature if draw % 2 else config.temperature


def _seed(config: Config, draw: int) -> int:
    """Returns the seed of a draw: even ones are of instructions, odd ones of responses."""
    return (config.seed * PER_SYNTHESIS_SEED + draw * config.batch_size) % 2**31


def _instructions(
    config: Config, seeds: list[Task], answer: Answer, folder: Path
) -> tuple[list[Instruction], Counter[str]]:
    """Returns the instructions that were taken, and how many each filter refused."""
    pool = similar.Pool()
    for task in seeds:
        pool.add(task.name, task.text)
    taken: list[Instruction] = []
    counts: Counter[str] = Counter()
    with Progress(config.count, "instructions", title="synthesize") as progress:
        for number in range(config.rounds):
            path = folder / f"round-{number:06d}.json"
            result = _read(path, Round)
            if result is None:
                result = _round(config, seeds, taken, pool, answer, number)
                _keep(path, result)
            else:
                for one in result["taken"]:
                    pool.add(one["id"], one["text"])
            taken += result["taken"]
            counts.update(result["counts"])
            progress.update(len(taken), count=len(result["taken"]))
            if len(taken) >= config.count:
                break
    if not taken:
        refused = ", ".join(f"{reason}: {counts[reason]}" for reason in counts)
        raise DataError(
            f"synthesize: no instruction was taken in {config.rounds} rounds"
            f" ({refused or 'the model wrote none'})"
        )
    if len(taken) < config.count:
        most = f"{config.rounds:,} rounds wrote {len(taken):,} of {config.count:,}"
        log.warning("synthesize: %s instructions", most)
    return taken[: config.count], counts


def _round(
    config: Config,
    seeds: list[Task],
    taken: list[Instruction],
    pool: similar.Pool,
    answer: Answer,
    number: int,
) -> Round:
    """Returns what the model writes in a round."""
    rng = np.random.default_rng([config.seed, number])
    generated = [Task(one["id"], one["text"]) for one in taken]
    drawn, questions = [], []
    for _ in range(config.batch_size):
        examples = instructions.examples_of(
            seeds,
            generated,
            n_examples=config.examples,
            n_generated=config.generated_examples,
            rng=rng,
        )
        drawn.append(examples)
        question = instructions.question(config.template, examples)
        questions.append([_turn("user", question)])
    replies = answer(questions, config.max_new_tokens, 2 * number)
    return instructions.take(
        replies, drawn, config.rules, pool, number=number, seed=config.seed
    )


def _responses(
    config: Config, taken: list[Instruction], answer: Answer, folder: Path
) -> list[Reply]:
    """Returns the model's response to each instruction."""
    replies: list[Reply] = []
    with Progress(len(taken), "responses", title="synthesize") as progress:
        for number, start in enumerate(range(0, len(taken), config.batch_size)):
            batch = taken[start : start + config.batch_size]
            path = folder / f"responses-{number:06d}.json"
            kept = _read(path, list[Reply])
            if kept is None:
                questions = [[_turn("user", one["text"])] for one in batch]
                kept = answer(questions, config.max_new_tokens, 2 * number + 1)
                _keep(path, kept)
            replies += kept
            progress.update(len(replies), count=len(batch))
    return replies


def _read(path: Path, hint: Any) -> Any:
    return hosts.share(lambda: json_text.read_if_there(path, hint))


def _keep(path: Path, value: Any) -> None:
    text = json_text.encode(value, path) + "\n"
    hosts.share(lambda: paths.write(path, text))


def _turn(role: str, content: str) -> chat.Message:
    return {"role": role, "content": content}


def _is_usable(reply: Reply) -> bool:
    """Returns whether a response is whole and has text."""
    return bool(reply["text"].strip()) and not reply["is_cut"]


def _write(
    config: Config, workdir: Path, taken: list[Instruction], replies: list[Reply]
) -> None:
    """Writes prompts and conversations."""
    prompts: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    conversations: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for i, one in enumerate(taken):
        split = split_of(one["text"], validation=config.validation, test=0.0)
        provenance = {name: value for name, value in one.items() if name != "text"}
        prompts[split].append({"prompt": one["text"], **provenance})
        if replies and _is_usable(replies[i]):
            response = _turn("assistant", replies[i]["text"].strip())
            messages = [_turn("user", one["text"]), response]
            conversations[split].append({"messages": messages, **provenance})
    hosts.share(lambda: paths.make_folder(workdir / PROMPTS))
    for split in SPLITS:
        if not prompts[split]:
            log.warning("synthesize: no instruction is left for %s", split)
        write_jsonl(workdir / PROMPTS / f"{split}.jsonl", prompts[split])
        if config.responses:
            write_jsonl(workdir / f"{split}.jsonl", conversations[split])
