"""Ranges of numeric options, which `config.build` checks. Every upper limit has its reason."""

from typing import Annotated

from annotated_types import Interval, Predicate

LARGEST = 3.4e38  # the largest float32, which devices compute in
SMALLEST = 1.2e-38  # the smallest float32 that devices do not flush to 0
MOST_COUNTED = 2**31 - 1  # counters on devices are int32
# All rows of a batch are in memory at once, and a square kernel of this width has 4 TiB.
WIDEST = 2**20
MOST_TOKENS = 2**24  # float32 holds positions and token counts exactly up to here


def not_0(size: int) -> bool:
    return size != 0


def not_subnormal(number: float) -> bool:
    """Returns whether float32 holds a non-negative number without flushing it to 0."""
    return not 0 < number < SMALLEST


Count = Annotated[int, Interval(ge=0, le=MOST_COUNTED)]
PositiveCount = Annotated[int, Interval(ge=1, le=MOST_COUNTED)]
Seed = Annotated[
    int,
    Interval(
        ge=0, le=2**32 - 2
    ),  # NumPy and grain take 32 bits, and seed + 1 is used too
]
Size = Annotated[int, Interval(ge=1, le=WIDEST)]
Several = Annotated[
    int,
    Interval(ge=2, le=WIDEST),  # a single response cannot be ranked
]
SizeOrNone = Annotated[int, Interval(ge=0, le=WIDEST)]
MeshSize = Annotated[int, Interval(ge=-1, le=WIDEST), Predicate(not_0)]
Tokens = Annotated[
    int,
    Interval(ge=1, le=MOST_TOKENS),  # a length or a vocabulary size
]
TokensOrNone = Annotated[int, Interval(ge=0, le=MOST_TOKENS)]
Depth = Annotated[
    int,
    # DeepNet, the deepest published model, has 1000 layers; a million never ends compiling
    Interval(ge=1, le=1024),
]
Workers = Annotated[
    int,
    Interval(ge=0, le=1024),  # no machine has more cores
]

Finite = Annotated[float, Interval(ge=-LARGEST, le=LARGEST)]
NonNegative = Annotated[float, Interval(ge=0, le=LARGEST), Predicate(not_subnormal)]
Positive = Annotated[float, Interval(ge=SMALLEST, le=LARGEST)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
CharacterCoverage = Annotated[float, Interval(ge=0.98, le=1)]  # SentencePiece's
ProperShare = Annotated[float, Interval(gt=0, lt=1)]
ShareBelow1 = Annotated[
    float,
    Interval(
        ge=0, lt=1
    ),  # a decay of 1 never takes a new value; a dropout of 1 leaves nothing
]
ShareBelowHalf = Annotated[
    float,
    Interval(
        ge=0, lt=0.5
    ),  # labels that are wrong half of the time carry no information
]
Seconds = Annotated[
    float,
    Interval(gt=0, le=24 * 60 * 60),  # a day: nobody waits longer for one response
]
Temperature = Annotated[
    float,
    Interval(ge=0, le=1e4),  # above the limit all tokens are equally likely
    Predicate(not_subnormal),
]
PositiveTemperature = Annotated[
    float,
    Interval(ge=1e-4, le=1e4),  # below the limit sampling is greedy
]
RopeTheta = Annotated[
    float,
    # above the limit the slowest pair of dimensions does not turn within MOST_TOKENS
    Interval(ge=1, le=1e12),
]
RopeFactor = Annotated[
    float,
    # MOST_TOKENS: no context is longer
    Interval(ge=1, le=MOST_TOKENS),
]
NormEpsilon = Annotated[
    float,
    Interval(ge=SMALLEST, le=1),  # added to a mean square of about 1
]
