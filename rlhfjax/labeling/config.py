"""The options of the stage `label`."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Interval

from rlhfjax.mesh import MeshConfig
from rlhfjax.ranges import (
    Count,
    NonNegative,
    ProperShare,
    Seconds,
    Seed,
    Share,
    Size,
    TokensOrNone,
)
from rlhfjax.rewards.load import RewardSource
from rlhfjax.rl.config import PromptConfig
from rlhfjax.sampling.config import ShapedSamplingConfig

Port = Annotated[int, Interval(ge=0, le=65535)]
Ranked = Annotated[int, Interval(ge=2, le=9)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ShapedSamplingConfig):
    """What is labeled, by whom, and how much."""

    stage: str = "label"
    """Name of the stage."""
    task: Literal["demonstrate", "rank", "compare", "edit", "feedback"] = "rank"
    """What labelers do with an item."""
    answers: tuple[str, ...] = ()
    """Folders that `collect` wrote, whose responses are labeled."""
    items: str = ""
    """Glob of JSON lines {"prompt", "completions"}; demonstrations need no completions."""
    prompts: PromptConfig = PromptConfig()
    """Prompts of demonstrations, or of the responses that `init_from` samples."""
    conversations: Count = 0
    """Conversations of which labelers write both sides, with task="demonstrate"."""
    init_from: str = ""
    """Workdir of the policy that responds to `prompts` while people label; empty: none does."""
    samples_per_prompt: Ranked = 4
    """K, responses per prompt (InstructGPT: 4 to 9)."""
    prompt_length: TokensOrNone = 0
    """Tokens that prompts are padded to, for `init_from`."""
    max_new_tokens: TokensOrNone = 0
    """Tokens of the longest response, for `init_from`."""
    batch_size: Size = 8
    """Prompts per batch, for `init_from` and `reward`."""
    count: Count = 0
    """Labels after which the stage ends; 0: when every item has its labels."""
    labelers: tuple[str, ...] = ()
    """Pseudonyms to invite; more may be invited while people label."""
    simulated: str = ""
    """A scorer that ranks in place of people, over HTTP: gold:NAME or rule:MODULE:FUNCTION."""
    overlap: Size = 1
    """Labelers per item, for inter-labeler agreement and more labels."""
    overlap_share: Share = 1.0
    """Share of the items that have `overlap` labelers; the others have one."""
    order: Literal["random", "disagreement"] = "random"
    """Which items come first: any, or those about which `reward` disagrees most with itself."""
    reward: RewardSource = ""
    """An ensemble of reward models, for order="disagreement"."""
    screening: str = ""
    """Glob of rankings that are known to be right: the test before work (InstructGPT B.1)."""
    screening_agreement: Share = 0.7
    """Share of the test's pairs that a labeler has to rank like it."""
    calibration: str = ""
    """Glob of rankings that are known to be right, shown among the work."""
    calibration_every: Count = 20
    """Labels between two calibration items; 0: none."""
    guidelines: str = ""
    """Text file that labelers can always read."""
    tokenizer: str | None = None
    """File or folder of the tokenizer; needed for task="feedback" and for texts not sampled."""
    seconds_per_token: Seconds = 0.25
    """Seconds between two tokens with task="feedback"; the `tamer` stage needs the same."""
    validation: ProperShare = 0.05
    """Share of the prompts in validation, by a stable hash of their first user turn."""
    host: str = "127.0.0.1"
    """Address that the page is served at; any other than this machine's can be reached by all."""
    port: Port = 8100
    """Port of the page; 0 takes a free one."""
    grace: NonNegative = 60.0
    """Seconds to finish what is on labelers' screens, once there are enough labels."""
    seed: Seed = 0
    """Seed of the order of items, and of responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices, for `init_from` and `reward`."""
