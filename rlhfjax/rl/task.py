"""The models of a policy stage: the policy, its reference, and what scores its responses."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.programs import Program, on_mesh
from rlhfjax.rewards.load import RewardSource, load_reward
from rlhfjax.rewards.responses import Reward, score
from rlhfjax.rl.config import EXACT_KL, PolicyConfig
from rlhfjax.rl.iteration import ForwardOutputs, Programs
from rlhfjax.rl.rewards import add_human_reward, vocabulary_kl
from rlhfjax.rl.rollout import Rollout, TokenIds, find_token_ids
from rlhfjax.rl.samples import StepSamples
from rlhfjax.roles import Loaded, Models, Roles, Sources
from rlhfjax.types import Metrics, PyTree


class Task(NamedTuple):
    """A policy, and what it is trained against."""

    policy: Loaded
    tokenizer: Tokenizer
    ids: TokenIds
    reference: PyTree  # parameters
    layout: Layout  # the training mesh
    frozen_layout: Layout | None  # the mesh of rewards and reference, if it is another
    reward: Reward
    samples: StepSamples
    human: Reward | None = None  # added to the reward, with an annealed weight
    gold: Reward | None = None  # measures held-out responses

    def make_forward(self, programs: Programs) -> Callable[..., ForwardOutputs]:
        """Returns a function (params, rollout) -> the outputs of all forward passes over a rollout.

        Dispatch it before the rewards: the host may compute those meanwhile.
        """
        if self.frozen_layout is None:
            return lambda params, rollout: programs.forward(
                params, self.reference, rollout
            )
        ref_logprobs = self.on_frozen(
            functools.partial(programs.ref_logprobs, self.reference)
        )

        def forward(params: PyTree, rollout: Rollout) -> ForwardOutputs:
            outputs = programs.forward(params, None, rollout)
            return outputs._replace(ref_logprobs=ref_logprobs(rollout))

        return forward

    def make_exact_kl(
        self, config: PolicyConfig
    ) -> Callable[[PyTree, Rollout], Metrics]:
        """Returns a function (policy's parameters, rollout) -> the metric kl_exact.

        It is the mean over responses of `rl.rewards.vocabulary_kl`, in nats per response; without
        the option the function returns no metric. With one_step_off the responses are those of the
        previous policy.
        """
        if not config.kl.exact:
            return lambda params, rollout: {}
        model = self.policy.model

        @jax.jit
        def measure(params: PyTree, reference: PyTree, rollout: Rollout) -> Metrics:
            exact = vocabulary_kl(config, model, params, reference, rollout)
            return {"kl_exact": (exact.sum(), jnp.float32(exact.shape[0]))}

        program = Program(EXACT_KL, measure)
        return lambda params, rollout: program(params, self.reference, rollout)

    def score(
        self, config: PolicyConfig, rollout: Rollout, step: Any
    ) -> tuple[Any, Metrics]:
        """Returns the scores [b] of a rollout's responses, and the rewards' own metrics.

        A human reward is added with its weight at this step.
        """
        rows = (rollout.tokens, rollout.attention_mask, rollout.mask)
        score_rows = self.on_frozen(functools.partial(score, self.reward))
        scores, metrics = score_rows(*rows)
        if self.human is not None:
            human = self.on_frozen(self.human)(*rows)
            scores, human_metrics = add_human_reward(config.human, scores, human, step)
            metrics = {**metrics, **human_metrics}
        return self.layout.put_rows(scores), metrics

    def keep_samples(
        self,
        rollout: Rollout,
        outputs: ForwardOutputs,
        scores: Any,
        advantages: Any,
        metrics: Metrics,
    ) -> None:
        """Keeps arrays of this step for samples_steps.jsonl, if the loop wants them."""
        beta, _ = metrics["kl_coefficient"]
        self.samples.keep(
            rollout,
            scores=scores,
            logprobs=outputs.logprobs,
            ref_logprobs=outputs.ref_logprobs,
            advantages=advantages,
            beta=beta,
            values=outputs.values,
        )

    def on_frozen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of rows that runs on the mesh of rewards and reference."""
        return on_mesh(self.frozen_layout, self.layout, function)


def open_task(
    config: PolicyConfig, roles: Roles, layout: Layout, sources: Sources
) -> Task:
    """Loads the policy, its reference and the rewards.

    Raises:
      ConfigError: `init_from` is not a language model.
    """
    models = Models(config.stage, roles, layout, sources, config.frozen_mesh)
    policy, frozen_layout = models["policy"], models.frozen_layout
    tokenizer = policy.tokenizer
    if policy.source_head != "lm" or tokenizer is None:
        raise ConfigError(
            f"{config.stage}.init_from={config.init_from}: "
            f"a policy is needed, this model has a {policy.source_head} head"
        )
    # Sampler, trainer and reference are distributions over the same ids.
    model = policy.model.restricted(tokenizer.vocab_size)
    policy = dataclasses.replace(policy, model=model)
    if frozen_layout is not None:
        frozen_layout.validate_batch(
            config.episodes,
            f"{config.stage}: the responses of an iteration, over frozen_mesh,",
        )

    def load(source: RewardSource, layout: Layout, program: str) -> Reward:
        return load_reward(source, layout, tokenizer, models, program)

    reward_layout, human = frozen_layout or layout, config.human.reward
    return Task(
        policy=policy,
        tokenizer=tokenizer,
        ids=find_token_ids(config, tokenizer),
        reference=models["reference"].frozen,
        layout=layout,
        frozen_layout=frozen_layout,
        reward=load(config.reward, reward_layout, "score"),
        samples=StepSamples(tokenizer, config.kl.place == "reward"),
        human=load(human, reward_layout, "human") if human else None,
        gold=load(config.gold, layout, "gold") if config.gold else None,
    )
