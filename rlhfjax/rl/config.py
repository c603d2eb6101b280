"""The options that every stage which improves a policy against a reward has in common, and their validation."""

import dataclasses
from typing import Literal

from rlhfjax.config import TrainConfig
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
    SizeOrNone,
    Tokens,
    TokensOrNone,
)
from rlhfjax.rewards.load import RewardSource
from rlhfjax.rl.prompts import PromptConfig, PtxConfig
from rlhfjax.roles import Pass, Role, Workload
from rlhfjax.supervised import validate_kernel, validate_length, validate_lora


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The penalty on log pi / pi_ref. With a target the coefficient adapts (Ziegler et al. 2019, section 2.2)."""

    coefficient: NonNegative = (
        0.05  # reward units per nat; the first one where it adapts
    )
    target: NonNegative = 0.0  # nats per sequence; 0: the coefficient is fixed
    horizon: Count = 0  # episodes; 10 to 20 batches
    place: Literal["reward", "loss"] = "reward"
    # in the loss, k1, k2, k3 and sequence have the gradient of KL(pi || pi_ref); grpo is k3 differentiated as it stands
    estimator: Literal["k1", "k2", "k3", "sequence", "grpo"] = "k1"


@dataclasses.dataclass(frozen=True)
class TruncateConfig:
    """The reward sees a response up to a token, and one without it is worth a fixed score.

    The policy is trained on all that it sampled: it is to learn to stop, not to be cut.

    Source: Ziegler et al. 2019, section 2.2.
    """

    token: str = ""  # a piece of the tokenizer, such as a full stop; empty: off
    after: TokensOrNone = (
        0  # the first response position that may be it (Ziegler: 16 of 24)
    )
    value: Finite = -1.0  # the score where there is none


@dataclasses.dataclass(frozen=True)
class HumanConfig:
    """A learned human reward H added to the score R, less and less: R + weight factor^i H in iteration i.

    Source: Knox & Stone 2010 (TAMER+RL, reward addition).
    """

    reward: RewardSource = ""  # a tamer stage's workdir, or any reward; empty: none
    weight: Finite = 1.0  # reward units a unit of H, in the first iteration
    factor: PositiveShare = (
        0.98  # "and the like", Knox & Stone 2010, who anneal an episode
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(TrainConfig):
    # `field()` undoes the default of TrainConfig: a policy stage needs a policy.
    init_from: str = dataclasses.field()  # the policy at the start, and the reference
    reference: str | None = None  # None: init_from
    lora: LoraConfig = LoraConfig()  # rank 0: all of the policy is trained
    reward: RewardSource  # a reward stage's workdir, a scorer such as gold:sentiment, or a description
    human: HumanConfig = HumanConfig()
    prompts: PromptConfig = PromptConfig()
    eval_prompts: PromptConfig = PromptConfig()
    gold: RewardSource = (
        ""  # a scorer to measure held-out answers with; it is never trained on
    )
    prompt_length: Tokens
    max_new_tokens: Tokens
    temperature: PositiveTemperature = 1.0
    stop_at_eos: bool = True  # False: every response has max_new_tokens tokens, an eos among them is one as any (Ziegler)
    # whose numbers are log pi_old: the sampler's, or a forward pass's as in training (bfloat16 differs between the two)
    behavior_logprobs: Literal["sampler", "forward"] = "sampler"
    batch_size: Size
    decode_batch: SizeOrNone = 0  # responses decoded at a time, the next prompt as soon as one ends; 0: all, to the longest
    rollout_mesh: MeshConfig | None = (
        None  # of the same devices, for sampling; None: the mesh of training
    )
    # of reward and reference, on devices of their own: mesh.devices="0:6", frozen_mesh.devices="6:8"; None: the policy's
    frozen_mesh: MeshConfig | None = None
    # learn from the responses of the iteration before, while new ones are sampled and the host makes rewards
    one_step_off: bool = False
    epochs: PositiveCount
    minibatches: Size  # of an epoch
    microbatches: Size = 1  # of a minibatch
    # nats per token from pi_old, beyond which the rest of an iteration's updates is left; 0: off
    target_kl: NonNegative = 0.0
    entropy_coefficient: NonNegative = 0.0
    truncate: TruncateConfig = TruncateConfig()
    missing_eos: Literal["none", "penalty", "replace"] = "none"
    missing_eos_value: Finite = (
        1.0  # subtracted from the score ("penalty") or put in its place ("replace": -1)
    )
    score_clip: NonNegative = 0.0  # 0: none
    kl: KLConfig = KLConfig()
    ptx: PtxConfig = PtxConfig()
    ema: ShareBelow1 = 0.0  # decay an iteration of averaged weights (or adapters), then the stage's model; 0: none
    optim: OptimConfig = OptimConfig()

    @property
    def episodes(self) -> int:
        """Responses of an iteration."""
        return self.batch_size

    @property
    def samples_per_prompt(self) -> int:
        """Responses to a prompt."""
        return self.episodes // max(1, self.batch_size)

    @property
    def updates(self) -> int:
        """Of the parameters, over the whole run: what learning-rate schedules count."""
        return self.steps * self.epochs * self.minibatches


def policy_roles(config: PolicyConfig) -> dict[str, Role]:
    """Returns the roles of every policy stage: policy, reference, and what scores.

    With adapters the policy's base is the reference, unless there is another.
    """
    shares = "policy" if config.lora.rank and config.reference is None else None
    mesh = "train" if config.frozen_mesh is None else "frozen"
    scorer = Role("", head="scalar", mesh=mesh, scores=True)
    found = {
        "policy": Role(
            config.init_from,
            optim=config.optim,
            lora=config.lora,
            averaged=bool(config.ema),
            keeps_head=True,
        ),
        "reference": Role(
            config.reference or config.init_from, mesh=mesh, shares=shares
        ),
        "reward": scorer._replace(source=config.reward),
        "human": scorer._replace(source=config.human.reward),
        "gold": scorer._replace(source=config.gold, mesh="train"),
    }
    return {name: role for name, role in found.items() if role.source}


def policy_workload(
    config: PolicyConfig, completions: int = 1, values: tuple[str, ...] = ()
) -> Workload:
    """Returns what an iteration computes. Consecutive rows that share a prompt prefill it once.

    Args:
      completions: what other stages learn from their data; here the config says it.
      values: roles that are trained beside the policy, on the same rows.
    """
    length = config.prompt_length + config.max_new_tokens
    tokens = config.episodes * length
    sampled = (
        config.batch_size * config.prompt_length
        + config.episodes * config.max_new_tokens
    )
    microbatches = config.minibatches * config.microbatches
    reference = "know" if config.frozen_mesh is None else "ref_logprobs"
    passes = [
        Pass("rollout", "policy", sampled, length),
        Pass(reference, "reference", tokens, length),
        *(Pass("know", role, tokens, length) for role in values),
        Pass("score", "reward", tokens, length),
        Pass("human", "human", tokens, length),
        *(
            Pass("update", role, config.epochs * tokens, length, True)
            for role in ("policy", *values)
        ),
    ]
    if config.behavior_logprobs == "forward":
        passes.append(Pass("know", "policy", tokens, length))
    text = config.ptx.ratio if config.ptx.coefficient else 0
    if text:
        text_tokens = config.episodes * text * config.ptx.length
        passes.append(
            Pass(
                "update", "policy", config.epochs * text_tokens, config.ptx.length, True
            )
        )
    return Workload(
        rows=config.episodes * max(text, 1) // microbatches,
        batch=config.episodes // microbatches,
        length=length,
        units=config.episodes * config.max_new_tokens,
        rounds=config.epochs * microbatches * (2 if text else 1),
        microbatches=config.microbatches,
        passes=tuple(passes),
        decoded=config.decode_batch if config.decode_batch > 0 else config.episodes,
        sampled=config.max_new_tokens,
    )


def validate_policy(
    config: PolicyConfig, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the options of every policy stage. Raises ConfigError for the first that is invalid."""
    name = config.stage
    layout.check_batch(config.episodes, f"{name}.batch_size")
    validate_decode_batch(config.decode_batch, config.samples_per_prompt, layout, name)
    validate_length(
        config.prompt_length + config.max_new_tokens,
        model_config,
        f"{name}.prompt_length + max_new_tokens",
    )
    if config.episodes % (config.minibatches * config.microbatches):
        what = (
            "batch_size"
            if config.episodes == config.batch_size
            else "batch_size times completions"
        )
        raise ConfigError(
            f"{name}.{what}={config.episodes} is not divisible by minibatches={config.minibatches} times "
            f"microbatches={config.microbatches}"
        )
    layout.check_batch(
        config.episodes // config.minibatches // config.microbatches,
        f"a {name} microbatch",
    )
    make_schedule(
        config.optim, config.updates
    )  # raises for a warm-up longer than the run
    validate_lora(config.lora, model_config)
    validate_kernel(model_config, layout, name)
    if config.lora.dropout:
        raise ConfigError(
            f"{name}.lora.dropout={config.lora.dropout}: a policy stage has none, its ratios would be noise"
        )
    for other in ("rollout_mesh", "frozen_mesh"):
        if getattr(config, other) is not None and config.lora.rank:
            raise ConfigError(
                f"{name}.{other}: with adapters all share one base, on one mesh"
            )
    if config.one_step_off and config.behavior_logprobs != "sampler":
        raise ConfigError(
            f"{name}.one_step_off: pi_old is the policy that sampled, an iteration ago; behavior_logprobs='sampler'"
        )
    _validate_kl(config.kl, f"{name}.kl")
    _validate_score(config)
    if config.target_kl and config.epochs * config.minibatches == 1:
        raise ConfigError(
            f"{name}.target_kl={config.target_kl}: it stops later updates of an iteration, which has one"
        )
    if config.ptx.coefficient:
        rows_per_stream(
            config.episodes * config.ptx.ratio, config.ptx.data_shards, f"{name}.ptx"
        )


def _validate_kl(config: KLConfig, where: str) -> None:
    if config.target and not config.horizon:
        raise ConfigError(
            f"{where}.horizon: an adaptive coefficient needs one; 10 to 20 times batch_size"
        )
    if config.target and not config.coefficient:
        raise ConfigError(
            f"{where}.coefficient=0 stays 0 whatever the target: it is multiplied"
        )
    if config.place == "reward" and config.estimator not in ("k1", "k2", "k3"):
        raise ConfigError(
            f"{where}.estimator={config.estimator!r} is a loss; in the reward: k1, k2, k3"
        )


def _validate_score(config: PolicyConfig) -> None:
    name = config.stage
    if config.missing_eos != "none" and not config.stop_at_eos:
        raise ConfigError(
            f"{name}.missing_eos={config.missing_eos!r}: with stop_at_eos=False no response has an end"
        )
    validate_truncate(config.truncate, config.max_new_tokens, name)


def validate_decode_batch(
    decode_batch: int, samples_per_prompt: int, layout: Layout, name: str
) -> None:
    """Raises ConfigError unless `slots` is 0 or can be shared by the devices and by the `each` answers to a prompt."""
    if 0 < decode_batch < samples_per_prompt:
        raise ConfigError(
            f"{name}.decode_batch={decode_batch}: 0 (off), or at least the {samples_per_prompt} answers to a prompt"
        )
    layout.check_batch(decode_batch, f"{name}.decode_batch")


def validate_truncate(config: TruncateConfig, max_new_tokens: int, name: str) -> None:
    if config.token and config.after >= max_new_tokens:
        raise ConfigError(
            f"{name}.truncate.after={config.after}: a response has max_new_tokens={max_new_tokens} tokens"
        )
