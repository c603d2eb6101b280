"""The options that all policy stages have in common: what they mean, imply, and exclude."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from rlhfjax.config import TrainConfig
from rlhfjax.data.config import SourceConfig, validate_sources
from rlhfjax.data.loader import rows_per_stream
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.optim import OptimConfig, make_schedule
from rlhfjax.ranges import (
    Count,
    Finite,
    NonNegative,
    PositiveCount,
    PositiveShare,
    PositiveTemperature,
    ShareBelow1,
    Size,
    TokensOrNone,
)
from rlhfjax.rewards.load import RewardSource
from rlhfjax.roles import Pass, Role, Workload, job_workload
from rlhfjax.sampling import layout as layouts
from rlhfjax.sampling.config import SamplingConfig, ShapedSamplingConfig
from rlhfjax.supervised import validate_kernel, validate_length, validate_lora

EXACT_KL = "exact_kl"  # the program that computes `KLConfig.exact`
COMPARED = ("policy", "reference")  # and its roles


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The penalty on log pi / pi_ref, with a fixed or an adaptive coefficient.

    Source: Ziegler et al. 2019, section 2.2 (adaptive).
    """

    coefficient: NonNegative = 0.05
    """Reward units per nat; with a target, the coefficient at the start."""
    target: NonNegative = 0.0
    """KL that an adaptive coefficient steers to, in nats per response; 0 fixes the coefficient."""
    horizon: Count = 0
    """Episodes over which an adaptive coefficient changes; 10 to 20 times batch_size."""
    place: Literal["reward", "loss"] = "reward"
    """Where the penalty is: in the reward per token, or a term of the loss."""
    estimator: Literal["k1", "k2", "k3", "sequence", "grpo"] = "k1"
    """KL estimator. In the loss, all have the gradient of KL(pi || pi_ref), but grpo (plain k3)."""
    exact: bool = False
    """Whether to log the KL over the whole vocabulary too, as kl_exact and val_kl_exact. It costs a
    forward pass of policy and reference each per iteration, and changes nothing else."""


@dataclasses.dataclass(frozen=True)
class TruncateConfig:
    """The reward sees a response up to a stop token; a response without one gets a fixed score.

    The policy is trained on the whole response: it has to learn to stop.

    Source: Ziegler et al. 2019, section 2.2.
    """

    token: str = ""
    """The stop token, a piece of the tokenizer such as a full stop; empty is off."""
    after: TokensOrNone = 0
    """First position in the response at which the token counts (Ziegler: 16 of 24)."""
    value: Finite = -1.0
    """Score of a response without the token."""


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompts: rows of kind prompt, or prefixes of conversations (kind messages).

    A prefix ends with a user's turn.
    """

    source: SourceConfig | None = None
    """Where the prompts are; required in stages that sample."""
    per_conversation: Count = 1
    """Prefixes per conversation; 0 takes all."""
    limit: Count = 0
    """Number of prompts; 0 takes all."""


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """gamma E[log pi(x)] over pretraining text; its gradient is added to PPO's per minibatch.

    The paper's gamma, 27.8, comes without a unit. Here `unit` says what gamma multiplies.

    Source: Ouyang et al. 2022, eq. 2.
    """

    coefficient: NonNegative = 0.0
    """Weight gamma of the pretraining loss; 0 is off."""
    unit: Literal["token", "sequence"] = "token"
    """Whether gamma multiplies nats per token or nats per sequence."""
    ratio: Size = 8
    """Sequences of text per episode of an iteration (InstructGPT C.4: 8)."""
    length: TokensOrNone = 0
    """Tokens per sequence."""
    data_shards: Size = 1
    """Streams that the text comes in, as in a StreamConfig."""
    sources: tuple[SourceConfig, ...] = ()
    """Where the text is."""


@dataclasses.dataclass(frozen=True)
class EvalTextConfig:
    """Text whose loss every evaluation measures, such as what a policy may forget in training."""

    sources: tuple[SourceConfig, ...] = ()
    """Where the held-out text is; empty: no loss is measured."""
    length: TokensOrNone = 0
    """Tokens per row; 0: prompt_length + max_new_tokens."""
    batches: Count = 4
    """Batches, of as many rows as an iteration has episodes; 0: all."""


@dataclasses.dataclass(frozen=True)
class HumanConfig:
    """A learned human reward H that is added to the score R and fades out.

    Iteration i is trained on R + weight factor^i H.

    Source: Knox & Stone 2010 (TAMER+RL, reward addition).
    """

    reward: RewardSource = ""
    """Workdir of a tamer stage, or any other reward; empty is off."""
    weight: Finite = 1.0
    """Weight of H in the first iteration, reward units per unit of H."""
    factor: PositiveShare = 0.98
    """Factor per iteration (Knox & Stone 2010 anneal per episode, with values like this one)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(TrainConfig, SamplingConfig):
    """The options of every stage that trains a policy against a reward."""

    # `field()` removes the default of TrainConfig: a policy stage needs a policy.
    init_from: str = dataclasses.field()
    """Workdir of the model that the policy starts from."""
    reference: str | None = None
    """Workdir of the KL's reference model; None: init_from."""
    lora: LoraConfig = LoraConfig()
    """Adapters to train in place of all weights; rank 0 trains all weights."""
    reward: RewardSource
    """Workdir of a reward stage, a scorer such as gold:sentiment, or a description."""
    human: HumanConfig = HumanConfig()
    """Human reward that is added to the score."""
    prompts: PromptConfig = PromptConfig()
    """Prompts to train on."""
    eval_prompts: PromptConfig = PromptConfig()
    """Held-out prompts for evaluation."""
    eval_text: EvalTextConfig = EvalTextConfig()
    """Held-out text for evaluation."""
    gold: RewardSource = ""
    """Scorer that measures held-out responses and is never trained on; empty is off."""
    temperature: PositiveTemperature = 1.0
    """Sampling temperature, which log-probabilities are computed at too."""
    behavior_logprobs: Literal["sampler", "forward"] = "sampler"
    """Source of log pi_old: the sampler, or a forward pass as in training (equal in float32)."""
    batch_size: Size
    """Episodes per iteration; in the group stage, prompts per iteration."""
    rollout_mesh: MeshConfig | None = None
    """Mesh over the same devices for sampling; None: the training mesh."""
    rollout_layout: Literal["auto", "training", "decode"] = "auto"
    """Weights in rollouts. training: as they are, so that fsdp gathers them for every token.

    decode: resharded once per rollout, heads, MLP and vocabulary over several devices each.
    auto: decode if mesh.strategy="auto" finds that it costs less and fits, else training."""
    rollout_tensor: Count = 0
    """Devices that share the weights in the decode layout; 0: as many as cost least."""
    rollout_cache_parts: Size = 1
    """Steps in which the KV cache grows to its full length, without decode_batch. Attention then
    reads fewer empty entries; each step compiles a separate decode loop."""
    rollout_int8: Literal["none", "cache", "all"] = "none"
    """What is int8 in rollouts: nothing, keys and values, or the weights too."""
    frozen_mesh: MeshConfig | None = None
    """Mesh of reward and reference on devices of their own, such as devices="6:8"; None: mesh."""
    one_step_off: bool = False
    """Whether to learn from the previous iteration's responses while new ones are sampled."""
    epochs: PositiveCount
    """Passes over the episodes of an iteration."""
    minibatches: Size
    """Minibatches per epoch, with one update each."""
    microbatches: Size = 1
    """Forward-backward passes per minibatch; their gradients are accumulated."""
    target_kl: NonNegative = 0.0
    """KL to pi_old, nats per token, that ends the updates of an iteration; 0 is off."""
    entropy_coefficient: NonNegative = 0.0
    """Weight of the entropy bonus in the loss."""
    truncate: TruncateConfig = TruncateConfig()
    """Stop token, up to which the reward sees a response."""
    missing_eos: Literal["none", "penalty", "replace"] = "none"
    """What happens to the score of a response without eos."""
    missing_eos_value: Finite = 1.0
    """Amount to subtract from that score (penalty), or the new score (replace, usually -1)."""
    score_clip: NonNegative = 0.0
    """Scores are clipped to [-score_clip, score_clip]; 0 is off."""
    kl: KLConfig = KLConfig()
    """Penalty on the KL to the reference."""
    ptx: PtxConfig = PtxConfig()
    """Pretraining loss that is mixed in (PPO-ptx)."""
    ema: ShareBelow1 = 0.0
    """EMA decay per iteration; the EMA weights become the stage's model; 0 disables EMA."""
    optim: OptimConfig = OptimConfig()
    """Optimizer of the policy."""

    @property
    def samples_per_prompt(self) -> int:
        """Responses per prompt."""
        return 1

    @property
    def episodes(self) -> int:
        """Responses per iteration."""
        return self.batch_size * self.samples_per_prompt

    @property
    def updates(self) -> int:
        """Updates over the whole run, which learning-rate schedules count."""
        return self.steps * self.epochs * self.minibatches


def policy_roles(config: PolicyConfig) -> dict[str, Role]:
    """Returns the roles of every policy stage: policy, reference, and what scores responses.

    With adapters the frozen base of the policy is the reference, unless the config names another.
    """
    shares = "policy" if config.lora.rank and config.reference is None else None
    mesh = "train" if config.frozen_mesh is None else "frozen"
    scorer = Role("", head="scalar", mesh=mesh, scores=True)
    policy = Role(
        config.init_from,
        optim=config.optim,
        lora=config.lora,
        averaged=bool(config.ema),
        keeps_head=True,
    )
    reference = config.reference or config.init_from
    roles = {
        "policy": policy,
        "reference": Role(reference, mesh=mesh, shares=shares),
        "reward": scorer._replace(source=config.reward),
        "human": scorer._replace(source=config.human.reward),
        "gold": scorer._replace(source=config.gold, mesh="train"),
    }
    return {name: role for name, role in roles.items() if role.source}


def policy_workload(
    config: PolicyConfig, completions: int = 1, trained: tuple[str, ...] = ()
) -> Workload:
    """Returns what an iteration computes. Consecutive rows that share a prompt prefill it once.

    Args:
      completions: what other stages learn from their data; here the config says it.
      trained: roles that are trained beside the policy, on the same rows.
    """
    length = config.prompt_length + config.max_new_tokens
    tokens = config.episodes * length
    prompt_tokens = config.batch_size * config.prompt_length
    response_tokens = config.episodes * config.max_new_tokens
    microbatches = config.minibatches * config.microbatches
    reference = "know" if config.frozen_mesh is None else "ref_logprobs"
    passes = [
        Pass("rollout", "policy", prompt_tokens + response_tokens, length),
        Pass(reference, "reference", tokens, length),
        Pass("score", "reward", tokens, length),
        Pass("human", "human", tokens, length),
    ]
    passes += [Pass("know", role, tokens, length) for role in trained]
    passes += [
        Pass("update", role, config.epochs * tokens, length, trains=True)
        for role in ("policy", *trained)
    ]
    if config.behavior_logprobs == "forward":
        passes.append(Pass("know", "policy", tokens, length))
    if config.kl.exact:
        exact = [Pass(EXACT_KL, role, tokens, length) for role in COMPARED]
        passes += exact
    ratio = config.ptx.ratio if config.ptx.coefficient else 0
    if ratio:
        length_of_text = config.ptx.length
        text_tokens = config.epochs * config.episodes * ratio * length_of_text
        text_pass = Pass("update", "policy", text_tokens, length_of_text, trains=True)
        passes.append(text_pass)
    return Workload(
        rows=config.episodes * max(ratio, 1) // microbatches,
        batch=config.episodes // microbatches,
        length=length,
        units=response_tokens,
        rounds=config.epochs * microbatches * (2 if ratio else 1),
        microbatches=config.microbatches,
        passes=tuple(passes),
        decoded=config.decode_batch if config.decode_batch > 0 else config.episodes,
        sampled=config.max_new_tokens,
    )


def sampling_workload(
    config: SamplingConfig, completions: int = 1, scored: Sequence[tuple[str, str]] = ()
) -> Workload:
    """Returns what a batch of a job that samples computes.

    Args:
      completions: responses per row of a batch.
      scored: (program, role) of every forward pass over all prompts and responses.
    """
    length = config.prompt_length + config.max_new_tokens
    responses = config.batch_size * completions
    passes = [Pass(name, role, responses * length, length) for name, role in scored]
    batch = job_workload(config.batch_size, length)
    return batch._replace(
        units=responses * config.max_new_tokens,
        passes=tuple(passes),
        decoded=responses,
        sampled=config.max_new_tokens,
    )


def batches_of(batch_size: int, *prompts: PromptConfig) -> int | None:
    """Returns the number of batches of prompts; None if only the data tells."""
    if not all(config.limit for config in prompts):
        return None
    return sum(math.ceil(config.limit / batch_size) for config in prompts)


# ------------------------------------------------------------------ validation


def validate_policy(
    config: PolicyConfig, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the options of every policy stage. Raises ConfigError for the first invalid one."""
    name = config.stage
    layout.validate_batch(config.episodes, f"{name}.batch_size")
    validate_sampling(config, layout, model_config, config.samples_per_prompt)
    validate_truncate(config.truncate, config.max_new_tokens, name)
    validate_length(config.eval_text.length, model_config, f"{name}.eval_text.length")
    _validate_batches(config, layout)
    # Raises for a warm-up longer than the run.
    make_schedule(config.optim, config.updates)
    validate_lora(config.lora, model_config)
    validate_kernel(model_config, layout, name)
    if config.lora.dropout:
        raise ConfigError(
            f"{name}.lora.dropout={config.lora.dropout}: must be 0 in a policy stage, "
            "whose probability ratios dropout would make noise"
        )
    _validate_rollouts(config, layout, model_config)
    for option in ("rollout_mesh", "frozen_mesh"):
        if getattr(config, option) is not None and config.lora.rank:
            raise ConfigError(
                f"{name}.{option}: must be None with lora, whose models share one base"
            )
    if config.one_step_off and config.behavior_logprobs != "sampler":
        raise ConfigError(
            f'{name}.one_step_off: needs behavior_logprobs="sampler", '
            "the log-probabilities of the policy that sampled"
        )
    if config.missing_eos != "none" and not config.stop_at_eos:
        raise ConfigError(
            f"{name}.missing_eos={config.missing_eos!r}: needs stop_at_eos=True, "
            "without it no response ends"
        )
    _validate_kl(config.kl, f"{name}.kl")
    if config.kl.exact and config.frozen_mesh is not None:
        raise ConfigError(
            f"{name}.kl.exact: needs the logits of policy and reference on one mesh; "
            "set frozen_mesh=None or kl.exact=False"
        )


def _validate_rollouts(
    config: PolicyConfig, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates where and how rollouts are sampled. Raises ConfigError."""
    name, shards = config.stage, config.rollout_tensor
    if config.rollout_layout == "decode":
        option = f'{name}.rollout_layout="decode"'
        if config.rollout_mesh is not None:
            raise ConfigError(f"{option}: must be auto with a rollout_mesh")
        if config.lora.rank:
            raise ConfigError(f"{option}: must be auto or training with lora")
        if shards and model_config is not None:
            layouts.given(model_config, layouts.sizes_of(layout), shards, name)
    elif shards:
        raise ConfigError(
            f'{name}.rollout_tensor={shards}: needs rollout_layout="decode"'
        )
    has_windows = model_config is not None and model_config.window is not None
    if config.rollout_cache_parts > 1 and (has_windows or config.decode_batch):
        raise ConfigError(
            f"{name}.rollout_cache_parts={config.rollout_cache_parts}: "
            "must be 1 with window layers or a decode_batch"
        )
    if config.rollout_int8 != "none":
        _validate_int8(config, model_config)


def _validate_int8(
    config: PolicyConfig, model_config: TransformerConfig | None
) -> None:
    """Validates rollouts in int8. Raises ConfigError."""
    option = f"{config.stage}.rollout_int8={config.rollout_int8!r}"
    if config.behavior_logprobs != "sampler":
        raise ConfigError(
            f'{option}: needs behavior_logprobs="sampler", '
            "the log-probabilities of the weights that sampled"
        )
    if config.rollout_mesh is not None:
        raise ConfigError(f'{option}: must be "none" with a rollout_mesh')
    if config.rollout_int8 != "all":
        return
    if config.lora.rank or (model_config is not None and model_config.n_experts):
        raise ConfigError(
            f'{option}: must be "none" or "cache" with lora or a mixture of experts'
        )


def _validate_batches(config: PolicyConfig, layout: Layout) -> None:
    """Validates how the episodes of an iteration are split. Raises ConfigError."""
    name, passes = config.stage, config.minibatches * config.microbatches
    if config.episodes % passes:
        is_grouped = config.samples_per_prompt > 1
        option = "batch_size" + " times samples_per_prompt" * is_grouped
        raise ConfigError(
            f"{name}.{option}={config.episodes}: must be divisible by "
            f"minibatches={config.minibatches} times microbatches={config.microbatches}"
        )
    layout.validate_batch(config.episodes // passes, f"a {name} microbatch")
    if config.target_kl and config.epochs * config.minibatches == 1:
        raise ConfigError(
            f"{name}.target_kl={config.target_kl}: must be 0 "
            "if an iteration has one update, there is none to leave out"
        )
    if config.ptx.coefficient:
        sequences = config.episodes * config.ptx.ratio
        rows_per_stream(sequences, config.ptx.data_shards, f"{name}.ptx")
        validate_sources(config.ptx.sources, f"{name}.ptx.sources")


def _validate_kl(config: KLConfig, context: str) -> None:
    if config.target and not config.horizon:
        raise ConfigError(
            f"{context}.horizon=0: must be > 0 with a target; take 10 to 20 times batch_size"
        )
    if config.target and not config.coefficient:
        raise ConfigError(
            f"{context}.coefficient=0: must be > 0 with a target, which only scales it"
        )
    if config.place == "reward" and config.estimator not in ("k1", "k2", "k3"):
        raise ConfigError(
            f"{context}.estimator={config.estimator!r}: is for the loss; "
            "in the reward it must be k1, k2 or k3"
        )


def validate_sampling(
    config: SamplingConfig,
    layout: Layout,
    model_config: TransformerConfig | None,
    samples_per_prompt: int = 1,
) -> None:
    """Validates the options of every stage that samples. Raises ConfigError."""
    name, decode_batch = config.stage, config.decode_batch
    if 0 < decode_batch < samples_per_prompt:
        raise ConfigError(
            f"{name}.decode_batch={decode_batch}: must be 0 (off) "
            f"or at least the {samples_per_prompt} responses per prompt"
        )
    layout.validate_batch(decode_batch, f"{name}.decode_batch")
    if isinstance(config, ShapedSamplingConfig) and "" in config.stop:
        raise ConfigError(f"{name}.stop: a text must not be empty")
    validate_length(
        config.prompt_length + config.max_new_tokens,
        model_config,
        f"{name}.prompt_length + max_new_tokens",
    )


def validate_truncate(config: TruncateConfig, max_new_tokens: int, stage: str) -> None:
    """Raises ConfigError if no position of a response can hold the stop token."""
    if config.token and config.after >= max_new_tokens:
        raise ConfigError(
            f"{stage}.truncate.after={config.after}: "
            f"must be below max_new_tokens={max_new_tokens}"
        )
