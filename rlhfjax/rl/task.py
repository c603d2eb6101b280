"""What a policy stage works with: the policy, its reference, and what scores its responses."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.programs import on_mesh
from rlhfjax.rewards.load import RewardSource, load_reward
from rlhfjax.rewards.responses import Reward, score
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.rewards import with_human
from rlhfjax.rl.rollout import Tokens, tokens_of
from rlhfjax.roles import Loaded, Models, Roles, Sources
from rlhfjax.types import Metrics, PyTree


class Task(NamedTuple):
    """A policy to improve and what it is improved against."""

    policy: Loaded
    tokenizer: Tokenizer
    tokens: Tokens
    reference: PyTree  # parameters
    reward: Reward
    human: Reward | None = None  # added to the reward, with a weight that is annealed
    gold: Reward | None = None  # measures held-out responses
    layout: Layout | None = None  # the mesh of training
    frozen_layout: Layout | None = (
        None  # of rewards and reference, if not that of training
    )

    def forward(self, programs: Any) -> Callable[..., Any]:
        """Returns a function (params, rollout) -> what forward passes give of a rollout.

        It is dispatched before the rewards, which may be made on the host meanwhile.
        """
        if self.frozen_layout is None:
            return lambda params, rollout: programs.forward(
                params, self.reference, rollout
            )
        of_reference = self.on_frozen(
            functools.partial(programs.ref_logprobs, self.reference)
        )

        def forward(params: PyTree, rollout: Any) -> Any:
            known = programs.forward(params, None, rollout)
            return known._replace(ref_logprobs=of_reference(rollout))

        return forward

    def score(
        self, config: PolicyConfig, scored: Any, step: Any
    ) -> tuple[Any, Metrics]:
        """Returns the scores [b] of what the reward sees, and the rewards' own metrics.

        A human reward is added with its weight at this step.
        """
        rows = (scored.tokens, scored.segments, scored.mask)
        scores, metrics = self.on_frozen(functools.partial(score, self.reward))(*rows)
        if self.human is not None:
            human = self.on_frozen(self.human)(*rows)
            scores, human_metrics = with_human(config.human, scores, human, step)
            metrics = {**metrics, **human_metrics}
        return self.layout.put_rows(scores), metrics

    def on_frozen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of rows that runs where rewards and reference are."""
        return on_mesh(self.frozen_layout, self.layout, function)


def open_task(
    config: PolicyConfig, roles: Roles, layout: Layout, sources: Sources
) -> Task:
    """Loads the policy, its reference and the rewards.

    Raises:
      ConfigError: `init_from` is not a language model.
    """
    models = Models(config.stage, roles, layout, sources, config.frozen_mesh)
    policy, frozen = models["policy"], models.frozen_layout
    if policy.source_head != "lm":
        context = f"{config.stage}.init_from={config.init_from}"
        head = policy.source_head
        raise ConfigError(
            f"{context}: a policy is needed, this model has a {head} head"
        )
    if frozen is not None:
        frozen.check_batch(
            config.episodes,
            f"{config.stage}: the responses of an iteration, over frozen_mesh,",
        )

    def load(source: RewardSource, where: Layout, program: str) -> Reward | None:
        return (
            load_reward(source, where, policy.tokenizer, models, program)
            if source
            else None
        )

    return Task(
        policy=policy,
        tokenizer=policy.tokenizer,
        tokens=tokens_of(config, policy.tokenizer),
        reference=models["reference"].frozen,
        reward=load(config.reward, frozen or layout, "score"),
        human=load(config.human.reward, frozen or layout, "human"),
        gold=load(config.gold, layout, "gold"),
        layout=layout,
        frozen_layout=frozen,
    )
