"""The direct-preference losses by name, each as a function of a prompt's K answers.

All untied pairs of a prompt count together as one: each has the weight 1 / (pairs of the prompt), so that the loss is a
mean over prompts, and one prompt's pairs are always in one microbatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.algos import direct
from rlhfjax.algos.masked import divide
from rlhfjax.algos.preference import pair_metrics, reward_differences, untied_pairs
from rlhfjax.algos.types import Loss
from rlhfjax.errors import ConfigError

WITHOUT_REFERENCE = ("orpo", "simpo")
_BETA = {"simpo": 2.0}  # others: 0.1


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss, and its hyper-parameters; those of other losses are not looked at."""

    name: Literal["dpo", "cdpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    beta: float | None = None  # None: 0.1, SimPO 2.0; IPO's tau and ORPO's lambda
    smoothing: float = 0.1  # cdpo: the probability that a label is wrong
    margin: float = 1.0  # simpo: gamma, in units of reward; the paper's gamma / beta is 0.3 to 1.6, by the model
    desirable_weight: float = 1.0  # kto: lambda_D
    undesirable_weight: float = 1.0  # kto: lambda_U
    desirable_above: float | None = None  # kto: answers scored above are desirable, others not; None: by pairs

    def __post_init__(self):
        if not self.strength > 0:
            raise ConfigError(f"loss.beta={self.beta}: it must be above 0")
        if not 0 <= self.smoothing < 0.5:
            raise ConfigError(f"loss.smoothing={self.smoothing}: a probability of a wrong label below 0.5 is needed")

    @property
    def strength(self) -> float:
        """beta, or the loss's own."""
        return _BETA.get(self.name, 0.1) if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        return self.name not in WITHOUT_REFERENCE


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the losses look at: log-probabilities of every answer, and what a labeller says of it."""

    total: Float[Array, "p k"]  # log pi(y | x), nats
    mean: Float[Array, "p k"]  # 1/|y| log pi(y | x), nats a token
    reference: Float[Array, "p k"]  # log rho(y | x), nats; 0 where a loss has none
    scores: Float[Array, "p k"]  # more is better
    valid: Float[Array, "p k"]  # 1 on answers that exist
    kl: Float[Array, ""]  # of KTO, nats: from the whole batch
    same: Int[Array, "p k"] | None = None  # equal where answers have the same tokens


def make_loss(config: LossConfig) -> Callable[[Answers], Loss]:
    """The loss that a config names: answers -> (nats a prompt, metrics).

    Metrics of all: loss, accuracy, margin (of the implicit rewards, pairs weighted as in the loss).
    """
    return functools.partial(_LOSSES[config.name], config)


def implicit_rewards(config: LossConfig, answers: Answers) -> Float[Array, "p k"]:
    """The reward that a policy stands for: beta log pi/rho; SimPO: beta log pi / |y|; ORPO: beta log odds."""
    if config.name == "simpo":
        return config.strength * answers.mean
    if config.name == "orpo":
        mean = jnp.where(answers.valid > 0, answers.mean, -1.0)
        return config.strength * direct.log_odds(mean.ravel()).reshape(mean.shape)
    return config.strength * (answers.total - answers.reference)


def pair_weights(answers: Answers) -> Float[Array, "p k k"]:
    """1 / (untied pairs of the prompt) at [p, w, l] where answer w is another one than l and scored
    better; else 0."""
    pairs = untied_pairs(answers.scores, answers.valid, answers.same)
    return divide(pairs, jnp.broadcast_to(pairs.sum((1, 2), keepdims=True), pairs.shape))


def _pairs(values: Float[Array, "p k"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """What a value is for the better and for the worse answer of every pair; n = p k k."""
    shape = (*values.shape, values.shape[1])
    better, worse = (jnp.broadcast_to(x, shape) for x in (values[:, :, None], values[:, None, :]))
    return better.ravel(), worse.ravel()


def _with_reference(answers: Answers) -> tuple[Float[Array, " n"], ...]:
    return *_pairs(answers.total), *_pairs(answers.reference), pair_weights(answers).ravel()


def _dpo(config: LossConfig, answers: Answers) -> Loss:
    return direct.dpo_loss(*_with_reference(answers), beta=config.strength)


def _cdpo(config: LossConfig, answers: Answers) -> Loss:
    return direct.cdpo_loss(*_with_reference(answers), beta=config.strength, smoothing=config.smoothing)


def _ipo(config: LossConfig, answers: Answers) -> Loss:
    return direct.ipo_loss(*_with_reference(answers), beta=config.strength)


def _orpo(config: LossConfig, answers: Answers) -> Loss:
    return direct.orpo_loss(*_pairs(answers.mean), pair_weights(answers).ravel(), beta=config.strength)


def _simpo(config: LossConfig, answers: Answers) -> Loss:
    weight = pair_weights(answers).ravel()
    return direct.simpo_loss(*_pairs(answers.mean), weight, beta=config.strength, margin=config.margin)


def _kto(config: LossConfig, answers: Answers) -> Loss:
    """Every answer twice, as desirable and as undesirable, with the weights of the two."""
    good, bad = _desirability(config, answers)
    loss, metrics = direct.kto_loss(
        jnp.tile(answers.total.ravel(), 2),
        jnp.tile(answers.reference.ravel(), 2),
        jnp.concatenate([jnp.ones(good.size), jnp.zeros(bad.size)]),
        jnp.concatenate([good.ravel(), bad.ravel()]),
        kl=answers.kl,
        beta=config.strength,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    differences = reward_differences(implicit_rewards(config, answers), answers.valid)
    return loss, metrics | pair_metrics(differences, pair_weights(answers)) | {"kl": (answers.kl, jnp.ones(()))}


def _desirability(config: LossConfig, answers: Answers) -> tuple[Float[Array, "p k"], Float[Array, "p k"]]:
    """How much each answer counts as desirable and as undesirable.

    By pairs, as the paper makes labels of preferences: the better of a pair is desirable, the worse is not, and an
    answer in the middle is some of both. By a threshold: every answer is one or the other, with weight 1.
    """
    if config.desirable_above is None:
        weights = pair_weights(answers)
        return weights.sum(2), weights.sum(1)
    above = answers.scores > config.desirable_above
    return answers.valid * above, answers.valid * ~above


_LOSSES = {"dpo": _dpo, "cdpo": _cdpo, "ipo": _ipo, "kto": _kto, "orpo": _orpo, "simpo": _simpo}
