"""Counts what a compiled program does on one device: FLOPs, HBM traffic, communication volume.

XLA's own `cost_analysis` counts the body of a loop once, however often the loop runs. Layers are
scanned and microbatches are, so this follows the calls itself and multiplies. It counts

  FLOPs   of dot and convolution (2 per multiplication and addition), nearly all of a Transformer's;
  bytes   of every operand read from and every result written to HBM; a fusion is one operation, and
          of sliced operands the slices count;
  bytes   that a device sends in a collective on a ring: (n - 1) / n of the whole array to gather or
          scatter it among n devices, twice that to all-reduce it.
"""

import dataclasses
import math
import re
from collections import Counter

from rlhfjax.errors import DataError, first_line
from rlhfjax.plan.hlo import (
    COLLECTIVES,
    NO_MEMORY,
    Instruction,
    Module,
    group_size,
)

NO_BYTES = (*NO_MEMORY, "send", "recv", "send-done", "recv-done")
SLICES = ("dynamic-slice", "slice", "gather")
# Custom calls of the TPU compiler that move no data.
NO_TRAFFIC = r'custom_call_target="(AllocateBuffer|AsyncCollective\w+|ConcatBitcast)"'


@dataclasses.dataclass
class Cost:
    """What one device does in one run of a program."""

    flops: float = 0.0
    hbm: float = 0.0  # bytes read and written
    sent: Counter = dataclasses.field(default_factory=Counter)
    """Bytes sent, by (collective, link); a link is "ici" or "dcn"."""
    unknown_loops: int = 0  # loops whose trip count is unknown; they count once

    def add(self, other: "Cost", times: int = 1) -> None:
        self.flops += other.flops * times
        self.hbm += other.hbm * times
        for key, size in other.sent.items():
            self.sent[key] += size * times
        self.unknown_loops += other.unknown_loops

    def link(self, link: str) -> float:
        """Returns the bytes sent over "ici" or "dcn"."""
        return float(sum(size for (_, over), size in self.sent.items() if over == link))


def module_cost(module: Module) -> Cost:
    """Returns the cost of one run of a program on one device.

    Raises:
      DataError: an instruction lacks an operand, an attribute or a computation that it needs.
    """
    try:
        return _Counting(module).computation(module.entry)
    except (LookupError, ValueError, OverflowError, RecursionError) as error:
        reason = first_line(error, kind=True)
        raise DataError(
            f"the compiled program cannot be counted ({reason}); "
            "expected the HLO text of one program, whole"
        ) from None


class _Counting:
    """Adds up costs along the calls of a program."""

    def __init__(self, module: Module):
        self.module = module
        # The TPU compiler cuts an asynchronous collective into several fusions of one channel; the
        # channel counts once. Channels of different parts of a program may share a number, so the
        # size belongs to the key.
        self.channels: set[tuple[str, float]] = set()

    def computation(self, name: str, fused: bool = False) -> Cost:
        """Returns the cost of a computation; results inside of a fusion are in no memory."""
        total = Cost()
        for i in self.module.computations[name].values():
            if i.op in ("fusion", "call", "async-start"):
                inside = fused or i.op == "fusion"
                for called in i.called:
                    total.add(self.computation(called, inside))
                if i.op == "fusion" and not fused:
                    total.hbm += self._fusion_bytes(i)
            elif i.op == "while":
                times = self.module.trip_count(i)
                total.unknown_loops += times is None
                times = 1 if times is None else times
                total.add(self.computation(i.computation("body")), times)
            elif i.op == "conditional":
                branches = [self.computation(called) for called in i.called]
                longest = max(branches, key=lambda c: (c.flops, c.hbm), default=Cost())
                total.add(longest)
            elif i.op not in ("async-update", "async-done"):  # counted at async-start
                total.add(
                    self._operation(i, scatters=name.startswith("all-reduce-scatter"))
                )
                if not fused:
                    total.hbm += _operation_bytes(i)
        return total

    def _operation(self, i: Instruction, scatters: bool) -> Cost:
        """Returns the FLOPs of a product, or the bytes that a collective sends.

        Args:
          scatters: whether an all-reduce is half of a reduce-scatter.
        """
        if i.op == "dot":
            return Cost(flops=_dot_flops(i))
        if i.op == "convolution":
            return Cost(flops=_convolution_flops(i))
        if i.op == "send" and "megascale" in i.attributes:
            kind = i.find(r'_xla_megascale_transfer_type="(\w+)"') or "send"
            kind = kind.lower().replace("_", "-")
            return Cost(sent=Counter({(kind, "dcn"): i.result[0].size}))
        kind = i.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Cost()
        size = sum(operand.size for operand in i.operands)
        if channel := i.find(r"channel_id=(\d+)"):
            if (channel, size) in self.channels:
                return Cost()
            self.channels.add((channel, size))
        if scatters and kind == "all-reduce":
            kind = "reduce-scatter"
        sent = sent_bytes(kind, size, group_size(i.attributes))
        return Cost(sent=Counter({(kind, "ici"): sent}))

    def _fusion_bytes(self, i: Instruction) -> float:
        """Returns the bytes that a fusion reads and writes in HBM.

        Of a sliced operand the slices count; of a result that is updated in place, the update.
        """
        computation = i.called[0]
        parameters = self.module.parameters(computation)
        read = 0.0
        for parameter, operand in zip(parameters, i.operands, strict=False):
            if operand.hbm_size:
                read += self._read(computation, parameter)
        written = i.hbm_size
        for inner in self.module.computations[computation].values():
            if inner.op == "dynamic-update-slice" and written and inner.size <= i.size:
                written += inner.operands[1].size - inner.size
        return read + max(written, 0.0)

    def _read(self, computation: str, value: Instruction) -> float:
        """Returns the bytes that a fused computation reads of one of its values."""
        total = 0.0
        for user in self.module.computations[computation].values():
            for position, operand in enumerate(user.operands):
                if operand is not value:
                    continue
                if user.op in SLICES:
                    total += user.size if position == 0 else 0
                elif user.op in ("bitcast", "reshape", "copy"):
                    total += self._read(computation, user)
                elif user.op == "fusion":
                    parameter = self.module.parameters(user.called[0])[position]
                    total += self._read(user.called[0], parameter)
                elif user.op != "dynamic-update-slice" or position:
                    total += value.size
        return min(total, value.size)


def _operation_bytes(i: Instruction) -> float:
    """Returns the bytes that an operation outside of fusions reads and writes in HBM."""
    if i.op in NO_BYTES or i.op.endswith("-start"):
        return 0.0
    if i.op == "custom-call" and i.find(NO_TRAFFIC):
        return 0.0
    if i.op.endswith("-done") or i.op in SLICES:
        return i.size
    if i.op == "dynamic-update-slice":
        return 2 * i.operands[1].size
    return i.hbm_size + sum(operand.hbm_size for operand in i.operands)


def _dot_flops(i: Instruction) -> float:
    left = i.operands[0].result[0]
    contracted = i.find(r"lhs_contracting_dims=\{([^}]*)\}") or ""
    flops = 2.0 * math.prod(i.result[0].shape)
    for dim in re.findall(r"\d+", contracted):
        flops *= left.shape[int(dim)]
    return flops


def _convolution_flops(i: Instruction) -> float:
    """Returns 2 x output features x batch x input features of the kernel x pairs, as XLA counts it.

    Pairs are those of `_pairs`. TPUs have no dot: a matrix product is a convolution, and a batch of
    them is one whose window is dilated so that each product meets only its own row.
    """
    labels = i.find(r"dim_labels=(\w+_\w+->\w+)") or ""
    arrays = []
    instructions = (*i.operands[:2], i)
    for names, instruction in zip(re.split("_|->", labels), instructions, strict=True):
        sizes = instruction.result[0].shape
        arrays.append(dict(zip(names, sizes, strict=True)))
    inputs, kernel, output = arrays
    settings = re.findall(r"(\w+)=([\dx_\-]+)", i.find(r"window=\{([^}]*)\}") or "")
    spatial = sorted(label for label in output if label.isdigit())
    pairs = 1
    for n, dim in enumerate(spatial):
        window = {name: values.split("x")[n] for name, values in settings}
        pairs *= _pairs(inputs[dim], output[dim], window)
    groups = int(i.find(r"batch_group_count=(\d+)") or 1)
    return 2.0 * output["b"] * output["f"] * kernel["i"] * pairs / groups


def _pairs(size: int, out: int, window: dict[str, str]) -> int:
    """Returns how many pairs (output place, kernel place) meet an element of the input.

    The others meet padding or a hole of a dilation.
    """
    kernel = int(window.get("size", 1))
    stride = int(window.get("stride", 1))
    padding = int(window.get("pad", "0_0").split("_")[0])
    input_dilation = int(window.get("lhs_dilate", 1))
    kernel_dilation = int(window.get("rhs_dilate", 1))
    last = (size - 1) * input_dilation
    pairs = 0
    for o in range(out):
        for k in range(kernel):
            place = o * stride + k * kernel_dilation - padding
            pairs += 0 <= place <= last and place % input_dilation == 0
    return pairs


def sent_bytes(kind: str, size: int | float, n: int) -> float:
    """Returns the bytes that each of n devices sends on a ring, given `size` bytes of operands."""
    if kind == "collective-permute":
        return float(size)
    if n <= 1:
        return 0.0
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return float(size * factor.get(kind, (n - 1) / n))
