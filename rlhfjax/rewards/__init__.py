"""What scores a response, and what labels several: models, rules, people and language models."""

from rlhfjax.rewards import kinds  # noqa: F401  # fills the registry, `load.KINDS`
