"""Some responses of a rollout with numbers per token, for people to read in the report.

They are arrays that the step has computed anyway. samples_steps.jsonl has one line per response:

step, prompt, response, score    the score of the reward, as it was given
pieces                           the response's text, token by token
log_ratio                        log pi(y_t) / pi_ref(y_t) per token, nats
reward                           -beta log_ratio, and the score at the last token, reward units
advantage                        per token; in the group stage all tokens have the response's
value                            of the value function, if there is one
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax import hosts
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.programs import recording
from rlhfjax.rewards.responses import texts
from rlhfjax.rl.rollout import Rollout

MOST_TOKENS = 512  # of a response; the rest of it is left out
DIGITS = 4  # after the decimal point


class StepSamples:
    """Keeps arrays of a step, if they are wanted, until they are read one step later."""

    def __init__(self, tokenizer: Tokenizer, beta_in_reward: bool):
        """Keeps nothing yet.

        Args:
          beta_in_reward: whether the KL penalty is in the reward, not in the loss.
        """
        self.wanted = False
        self._tokenizer = tokenizer
        self._beta_in_reward = beta_in_reward
        self._kept: dict[str, Any] | None = None

    def keep(
        self,
        rollout: Rollout,
        *,
        scores: Any,
        logprobs: Any,
        ref_logprobs: Any,
        advantages: Any,
        beta: Any,
        values: Any = None,
    ) -> None:
        """Keeps references to a step's arrays. Nothing is computed and nothing is waited for.

        Args:
          scores: [b].
          logprobs, ref_logprobs, values: [b, r]; values may be None.
          advantages: [b, r] or [b].
          beta: coefficient of the KL.
        """
        if not self.wanted or recording():
            return
        self._kept = {
            "rollout": rollout,
            "scores": scores,
            "logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            "advantages": advantages,
            "beta": beta,
            "values": values,
        }

    def take(self) -> Any:
        """Returns what was kept, and keeps it no longer; None if nothing was."""
        kept, self._kept = self._kept, None
        return kept

    def rows(self, kept: Any, count: int) -> list[dict[str, Any]]:
        """Returns the first `count` responses of what `take` returned; all hosts call it."""
        arrays: dict[str, Any] = {
            name: x for name, x in hosts.whole(kept).items() if x is not None
        }
        beta = float(arrays.pop("beta")) * self._beta_in_reward
        rollout: Any = Rollout(*(x[:count] for x in arrays.pop("rollout")))
        firsts = {name: np.asarray(x)[:count] for name, x in arrays.items()}
        mask = np.asarray(rollout.mask)
        per_token = _per_token(firsts, mask, beta)
        rows = (rollout.tokens, rollout.attention_mask, mask)
        prompts, responses = texts(self._tokenizer, *rows)
        return [
            {
                "prompt": prompts[i],
                "response": responses[i],
                "score": _rounded(firsts["scores"][i]),
                "pieces": pieces(self._tokenizer, rollout.responses[i][mask[i] > 0]),
                **_of_response(per_token, i, mask[i] > 0),
            }
            for i in range(len(responses))
        ]


def _per_token(
    arrays: Mapping[str, np.ndarray], mask: np.ndarray, beta: float
) -> dict[str, np.ndarray]:
    """Returns the numbers of tokens [n, r] by name."""
    log_ratio = (arrays["logprobs"] - arrays["ref_logprobs"]) * mask
    advantages = arrays["advantages"]
    if advantages.ndim == 1:
        advantages = np.broadcast_to(advantages[:, None], mask.shape)
    per_token = {
        "log_ratio": log_ratio,
        "reward": token_rewards(arrays["scores"], log_ratio, mask, beta),
        "advantage": advantages,
    }
    if "values" in arrays:
        per_token["value"] = arrays["values"]
    return per_token


def token_rewards(
    scores: np.ndarray, log_ratio: np.ndarray, mask: np.ndarray, beta: float
) -> np.ndarray:
    """Returns -beta log_ratio [b, r], with the score added at the last token of each response."""
    rewards = -beta * log_ratio
    for row, counts, score in zip(rewards, mask, scores, strict=True):
        last = np.flatnonzero(counts)[-1:]
        row[last] += score
    return rewards


def _of_response(
    per_token: Mapping[str, np.ndarray], i: int, counts: np.ndarray
) -> dict[str, list[float | None]]:
    return {
        name: [_rounded(x) for x in values[i][counts][:MOST_TOKENS]]
        for name, values in per_token.items()
    }


def _rounded(x: Any) -> float | None:
    """Returns a number for JSON: null if it is not finite."""
    return round(float(x), DIGITS) + 0.0 if np.isfinite(x) else None  # 0.0, not -0.0


def pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the text of each token, at most MOST_TOKENS; together they are the ids' text.

    A character that several tokens spell is the last one's. Tokens without text, such as eos, have
    an empty one.
    """
    found: list[str] = []
    done = ""
    count = min(len(ids), MOST_TOKENS)
    for end in range(1, count + 1):
        text = tokenizer.decode([int(i) for i in ids[:end]])
        # The next token may complete the last character, unless there is no next one.
        is_open = text.endswith("\ufffd") and end < count
        is_whole = not is_open and text.startswith(done)
        found.append(text[len(done) :] if is_whole else "")
        done = text if is_whole else done
    return found
