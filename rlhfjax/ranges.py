"""The ranges of numeric options, which `config.build` checks. Every upper limit has its reason beside it."""

from typing import Annotated

from annotated_types import Interval, Predicate

LARGEST = 3.4e38  # float32, which devices compute in, has no larger number
SMALLEST = 1.2e-38  # devices flush what is smaller in float32 to 0
MOST_COUNTED = 2**31 - 1  # counters on devices are int32
WIDEST = (
    2**20
)  # all rows of a batch are in memory at once, and a square kernel as wide has 4 TiB
MOST_TOKENS = 2**24  # positions and token counts are exact in float32 up to here


def not_0(size: int) -> bool:
    return size != 0


def not_subnormal(number: float) -> bool:
    """Whether float32 holds a number that is at least 0 without flushing it to 0."""
    return not 0 < number < SMALLEST


Count = Annotated[int, Interval(ge=0, le=MOST_COUNTED)]
PositiveCount = Annotated[int, Interval(ge=1, le=MOST_COUNTED)]
Seed = Annotated[
    int, Interval(ge=0, le=2**32 - 2)
]  # NumPy and grain take 32 bits, and seed + 1 is one too
Size = Annotated[int, Interval(ge=1, le=WIDEST)]
Several = Annotated[int, Interval(ge=2, le=WIDEST)]  # one alone cannot be ranked
SizeOrNone = Annotated[int, Interval(ge=0, le=WIDEST)]
MeshSize = Annotated[int, Interval(ge=-1, le=WIDEST), Predicate(not_0)]
Tokens = Annotated[int, Interval(ge=1, le=MOST_TOKENS)]  # a length, or a vocabulary
TokensOrNone = Annotated[int, Interval(ge=0, le=MOST_TOKENS)]
Depth = Annotated[
    int, Interval(ge=1, le=1024)
]  # DeepNet, the deepest published, has 1000; a million never compiles
Workers = Annotated[
    int, Interval(ge=0, le=1024)
]  # more processes than a machine has cores

Finite = Annotated[float, Interval(ge=-LARGEST, le=LARGEST)]
NonNegative = Annotated[float, Interval(ge=0, le=LARGEST), Predicate(not_subnormal)]
Positive = Annotated[float, Interval(ge=SMALLEST, le=LARGEST)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
ProperShare = Annotated[float, Interval(gt=0, lt=1)]
ShareBelow1 = Annotated[
    float, Interval(ge=0, lt=1)
]  # a decay of 1 averages nothing new, a dropout of 1 leaves nothing
ShareBelowHalf = Annotated[
    float, Interval(ge=0, lt=0.5)
]  # labels wrong half of the time say nothing
Seconds = Annotated[
    float, Interval(gt=0, le=24 * 60 * 60)
]  # a day: nobody waits longer for one response
Temperature = Annotated[
    float, Interval(ge=0, le=1e4), Predicate(not_subnormal)
]  # above, all tokens are equally likely
PositiveTemperature = Annotated[
    float, Interval(ge=1e-4, le=1e4)
]  # below, sampling is greedy
RopeTheta = Annotated[
    float, Interval(ge=1, le=1e12)
]  # above, the slowest pair does not turn within MOST_TOKENS
NormEpsilon = Annotated[
    float, Interval(ge=SMALLEST, le=1)
]  # added to a mean square of about 1
