"""What a compiled program does, read from its text: products, bytes from and to HBM, bytes between devices, buffers.

XLA's own `cost_analysis` counts the body of a loop once, whatever the number of its rounds; layers are scanned and
microbatches are, so this follows the calls itself and multiplies. It counts

  FLOPs   of dot and convolution (2 a multiplication and addition), which is nearly all of a Transformer's;
  bytes   of every operand read and result written outside of on-chip memory, a fusion as one operation, of sliced
          operands the slices;
  bytes   that a device sends in a collective, for the usual ring: (n - 1) / n of the whole to gather or scatter it
          among n, twice that to reduce it everywhere.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "iota",
    "domain",
}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False  # VMEM or scalar memory, not HBM

    @property
    def size(self) -> float:
        """Bytes."""
        bits = re.search(r"\d+", self.dtype)
        one = SIZES.get(self.dtype, int(bits[0]) / 8 if bits else 0)
        return float(one * math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def size(self) -> float:
        return float(sum(a.size for a in self.result))

    @property
    def hbm(self) -> float:
        """Bytes of the result that are not on the chip."""
        return float(sum(a.size for a in self.result if not a.on_chip))

    def find(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does: FLOPs, bytes of HBM, bytes sent by (kind, link), loops whose rounds are unknown."""

    flops: float = 0.0
    hbm: float = 0.0
    sent: Counter = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        sent = Counter(self.sent)
        for key, n in other.sent.items():
            sent[key] += n * times
        unknown = self.unknown_loops + other.unknown_loops
        return Cost(
            self.flops + other.flops * times,
            self.hbm + other.hbm * times,
            sent,
            unknown,
        )

    def link(self, link: str) -> float:
        """Bytes sent over "ici" or "dcn"."""
        return float(sum(n for (_, over), n in self.sent.items() if over == link))


class Program:
    """A compiled module's text, parsed."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        lines: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := _HEAD.match(line):
                lines = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif body := _LINE.match(line):
                lines[body[2]] = _instruction(body[2], body[3])
        self._channels: set[tuple[str | None, float]] = (
            set()
        )  # an asynchronous collective is cut into several fusions of one channel

    def cost(self) -> Cost:
        """Of one run of the program, on one device."""
        self._channels.clear()
        return self._cost(self.entry)

    def buffers(
        self, live: Iterable[tuple[str, float]] = (), most: int = 8
    ) -> list[tuple[str, float]]:
        """The largest buffers in HBM as (what it is, bytes), the largest first.

        Args:
          live: those that are there at once, as `instruction{index}` and bytes; where the compiler does not say which,
            every result that is not inside of a fusion counts.
        """
        known = {
            name: i for lines in self.computations.values() for name, i in lines.items()
        }
        named: Counter = Counter()
        for value, size in live:
            name, _, index = value.rstrip("}").partition("{")
            parts = known[name].result if name in known else ()
            at = int(index.split(",")[0] or 0)
            if at < len(parts) and not parts[at].on_chip:
                named[_label(known[name], parts[at])] += size
        return (named or Counter(self._results())).most_common(most)

    def _results(self) -> dict[str, float]:
        fused = {c for i in self._all() if i.op == "fusion" for c in _called(i)}
        named: dict[str, float] = {}
        for computation, lines in self.computations.items():
            if computation in fused:
                continue
            for i in lines.values():
                skip = (
                    i.op in FREE - {"parameter"}
                    or i.op in ("while", "call", "conditional")
                    or "-done" in i.op
                )
                if skip or (i.op == "parameter" and computation != self.entry):
                    continue
                for array in i.result:
                    if not array.on_chip:
                        label = _label(i, array)
                        named[label] = max(named.get(label, 0), array.size)
        return named

    def _all(self) -> Iterable[Instruction]:
        return (i for lines in self.computations.values() for i in lines.values())

    def _cost(self, computation: str) -> Cost:
        total, lines = Cost(), self.computations[computation]
        for i in lines.values():
            total = total.plus(self._one(i, lines))
        return total

    def _one(self, i: Instruction, lines: dict[str, Instruction]) -> Cost:
        called = _called(i)
        if i.op == "while":
            rounds = self._rounds(i, lines)
            body = self._cost(i.find(r"body=%?([\w.\-]+)") or "")
            return Cost(unknown_loops=int(rounds is None)).plus(body, rounds or 1)
        if i.op == "conditional":
            return max(
                (self._cost(c) for c in called),
                key=lambda c: (c.flops, c.hbm),
                default=Cost(),
            )
        if i.op in ("async-update", "async-done"):
            return Cost()  # what began with async-start, and was counted there
        if i.op in ("call", "async-start"):
            return functools.reduce(Cost.plus, (self._cost(c) for c in called), Cost())
        if i.op == "fusion":
            inner = functools.reduce(
                Cost.plus, (self._inside(c) for c in called), Cost()
            )
            return inner.plus(Cost(hbm=self._fusion_bytes(i, lines, called[0])))
        return self._inside_one(i, lines).plus(Cost(hbm=_bytes(i, lines)))

    def _inside(self, computation: str) -> Cost:
        """Products and collectives of a fusion; its inner results are in no memory."""
        total, lines = Cost(), self.computations[computation]
        scatter = computation.startswith("all-reduce-scatter")
        for i in lines.values():
            if i.op == "fusion":
                total = functools.reduce(
                    Cost.plus, (self._inside(c) for c in _called(i)), total
                )
            else:
                total = total.plus(self._inside_one(i, lines, scatter))
        return total

    def _inside_one(
        self, i: Instruction, lines: dict[str, Instruction], scatter: bool = False
    ) -> Cost:
        if i.op in ("dot", "convolution"):
            return Cost(
                flops=_dot(i, lines) if i.op == "dot" else _convolution(i, lines)
            )
        if i.op == "send" and "megascale" in i.attributes:
            kind = (
                (i.find(r'_xla_megascale_transfer_type="(\w+)"') or "send")
                .lower()
                .replace("_", "-")
            )
            return Cost(sent=Counter({(kind, "dcn"): i.result[0].size}))
        kind = i.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Cost()
        given = sum(lines[name].size for name in i.operands if name in lines)
        channel = (
            i.find(r"channel_id=(\d+)"),
            given,
        )  # channels of different programs' parts may have one number
        if channel in self._channels:
            return Cost()
        if channel[0] is not None:
            self._channels.add(channel)
        kind = "reduce-scatter" if scatter and kind == "all-reduce" else kind
        return Cost(
            sent=Counter(
                {(kind, "ici"): sent_bytes(kind, given, group_size(i.attributes))}
            )
        )

    def _rounds(self, loop: Instruction, lines: dict[str, Instruction]) -> int | None:
        """How often a loop runs: as XLA knows it, or the bound that its condition compares a counter with.

        For a loop that may end before its bound (sampling), the bound: every response as long as it may be.
        """
        if known := loop.find(r"known_trip_count[^\d]*(\d+)"):
            return int(known)
        condition = loop.find(r"condition=%?([\w.\-]+)") or ""
        seen, bounds = [condition], []
        for name in seen:
            for i in self.computations.get(name, {}).values():
                if (
                    i.op == "constant"
                    and i.result[0].dtype == "s32"
                    and not i.result[0].shape
                ):
                    bounds.append(int(i.operands[0]))
                if i.op == "get-tuple-element":
                    bounds += _given(
                        lines, loop.operands[0], int(i.find(r"index=(\d+)") or 0)
                    )
                seen += [c for c in _called(i) if c not in seen]
        return max(bounds, default=None)

    def _fusion_bytes(
        self, i: Instruction, lines: dict[str, Instruction], called: str
    ) -> float:
        """Operands, of sliced ones the slices, and the result, of one updated in place the update."""
        inner = self.computations[called]
        parameters = sorted(
            (p for p in inner.values() if p.op == "parameter"),
            key=lambda p: int(p.operands[0]),
        )
        read = sum(
            self._read(called, p.name)
            for p, name in zip(parameters, i.operands, strict=False)
            if name in lines and not all(a.on_chip for a in lines[name].result)
        )
        updates = [u for u in inner.values() if u.op == "dynamic-update-slice"]
        written = i.hbm
        for u in updates:
            if written and u.size <= i.size:
                written += (
                    inner[u.operands[1]].size - u.size if u.operands[1] in inner else 0
                )
        return float(read + max(written, 0))

    def _read(self, computation: str, name: str) -> float:
        """Bytes that a computation reads of one of its values."""
        lines, total = self.computations[computation], 0.0
        for user in lines.values():
            for position, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.op in ("dynamic-slice", "slice", "gather"):
                    total += user.size if position == 0 else 0
                elif user.op in ("bitcast", "reshape", "copy"):
                    total += self._read(computation, user.name)
                elif user.op == "fusion":
                    inner = self.computations[_called(user)[0]]
                    own = next(
                        p.name
                        for p in inner.values()
                        if p.op == "parameter" and p.operands[0] == str(position)
                    )
                    total += self._read(_called(user)[0], own)
                elif not (user.op == "dynamic-update-slice" and position == 0):
                    total += lines[name].size
        return min(total, lines[name].size)


def _instruction(name: str, rest: str) -> Instruction:
    """TYPE op(operands), attributes."""
    kind, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    op, rest = rest.strip().split("(", 1)
    inside, attributes = _balanced("(" + rest)
    arrays = tuple(
        Array(
            m[1], tuple(map(int, filter(None, m[2].split(",")))), "S(" in (m[3] or "")
        )
        for m in _ARRAY.finditer(kind)
    )
    parts = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", inside[1:-1]).split(",")
    operands = tuple(p.split()[-1].lstrip("%") for p in parts if p.strip())
    if op == "constant" and not re.fullmatch(r"-?\d+", inside[1:-1]):
        operands = ("0",)
    return Instruction(name, op, arrays, operands, attributes)


def _balanced(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis: up to the one that closes it, and the rest."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :].lstrip()
    return text, ""


def _called(i: Instruction) -> list[str]:
    names: list[str] = []
    for match in _CALLS.finditer(i.attributes):
        rest = i.attributes[match.end() :]
        inside = (
            rest[1 : rest.index("}")]
            if rest.startswith("{")
            else re.split(r"[,\s]", rest, maxsplit=1)[0]
        )
        names += [n.strip().lstrip("%") for n in inside.split(",")]
    return names


def _given(lines: dict[str, Instruction], name: str, index: int) -> list[int]:
    """The number that stands at this place of a tuple, if it is a constant: where a loop is given its bound."""
    made = lines.get(name)
    if made is None or made.op != "tuple":
        return []
    part = lines.get(made.operands[index])
    while part is not None and part.op in ("copy", "bitcast"):
        part = lines.get(part.operands[0])
    whole = (
        part is not None
        and part.op == "constant"
        and part.result[0].dtype == "s32"
        and not part.result[0].shape
    )
    return (
        [int(part.operands[0])]
        if part is not None and whole and int(part.operands[0]) > 0
        else []
    )


def _label(i: Instruction, array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {_where(i)}"


def _where(i: Instruction) -> str:
    return (i.find(r'op_name="([^"]*)"') or i.name).replace("\\'", "'")


def _bytes(i: Instruction, lines: dict[str, Instruction]) -> float:
    """Bytes from and to HBM of one operation outside of fusions."""
    if (
        i.op in FREE
        or i.op.endswith("-start")
        or i.op in ("send", "recv", "send-done", "recv-done")
    ):
        return 0.0
    if i.op == "custom-call" and i.find(
        r'custom_call_target="(AllocateBuffer|AsyncCollective\w+|ConcatBitcast)"'
    ):
        return 0.0
    if i.op.endswith("-done") or i.op in ("dynamic-slice", "slice", "gather"):
        return i.size
    if i.op == "dynamic-update-slice":
        return 2 * lines[i.operands[1]].size if i.operands[1] in lines else i.hbm
    return i.hbm + sum(lines[name].hbm for name in i.operands if name in lines)


def _dot(i: Instruction, lines: dict[str, Instruction]) -> float:
    left = lines[i.operands[0]].result[0].shape
    contracted = (i.find(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
    return (
        2.0
        * math.prod(i.result[0].shape)
        * math.prod(left[int(d)] for d in contracted if d)
    )


def _convolution(i: Instruction, lines: dict[str, Instruction]) -> float:
    """2 x output features x batch x input features of the kernel x pairs of places in the window, as XLA counts it.

    TPUs have no dot: a product is a convolution, a batch of them one whose window is dilated to touch its own row.
    """
    spec = i.find(r"dim_labels=([\w]+_[\w]+->[\w]+)") or ""
    inputs, kernel, output = re.split(r"_|->", spec)
    shapes = [lines[name].result[0].shape for name in i.operands[:2]] + [
        i.result[0].shape
    ]
    sizes = [
        dict(zip(labels, shape, strict=True))
        for labels, shape in zip((inputs, kernel, output), shapes, strict=True)
    ]
    window = {
        k: v.split("x")
        for k, v in re.findall(
            r"(\w+)=([\dx_\-]+)", i.find(r"window=\{([^}]*)\}") or ""
        )
    }
    pairs = 1
    for n, d in enumerate(sorted(label for label in output if label.isdigit())):
        pairs *= _pairs(sizes[0][d], sizes[2][d], {k: v[n] for k, v in window.items()})
    groups = int(i.find(r"batch_group_count=(\d+)") or 1)
    return 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"] * pairs / groups


def _pairs(size: int, out: int, window: dict[str, str]) -> int:
    """How many (output place, kernel place) meet an input place that is neither padding nor a hole of a dilation."""
    k, stride = int(window.get("size", 1)), int(window.get("stride", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    holes, spread = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    places = (o * stride + j * spread - low for o in range(out) for j in range(k))
    return sum(0 <= p <= (size - 1) * holes and p % holes == 0 for p in places)


def sent_bytes(kind: str, given: int | float, n: int) -> float:
    """Bytes that each of n devices sends, on a ring, of `given` bytes that it puts in."""
    if n <= 1 and kind != "collective-permute":
        return 0.0
    factor = {
        "all-gather": n - 1,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
    }
    return float(given * factor.get(kind, 1))


def group_size(attributes: str) -> int:
    """Devices that take part in one collective: {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'} is 2.

    A mesh whose devices are not in order says theirs before its axes: mesh['a'=4,'b'=2], device_ids=(...) {'a'} is 4.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=[^{}]*)?\s*\{([^}]*)\}",
        attributes,
    ):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[axis]) for axis, part in parts)
    return 1
