"""Shows a plan as tables in the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import (
    Number,
    activations,
    active_parameters,
    kv_cache_bytes,
    number_bytes,
    parameters,
)
from rlhfjax.plan import memory
from rlhfjax.plan.memory import GB, GIB
from rlhfjax.plan.predict import Plan

FITS = {True: "yes", False: "[red]no[/red]", None: "?"}


def plan_tables(plan: Plan) -> RenderableType:
    """Returns all tables of a plan, the verdict last."""
    return Group(
        *arithmetic_of(plan.subject.model, plan.step.batch, plan.step.time),
        hbm(plan),
        buffers(plan),
        work(plan),
        verdict(plan),
    )


def arithmetic_of(c: TransformerConfig, batch: int, time: int) -> list[Table]:
    """Returns the arithmetic of a model by hand, for a batch on a single device."""
    return [by_precision(c), by_hand(c, batch, time)]


def arithmetic(c: TransformerConfig) -> RenderableType:
    """Returns the arithmetic alone, for one sequence of max_length, and the textbook's numbers."""
    return Group(*arithmetic_of(c, 1, c.max_length), textbook(c))


def gib(n: Number) -> str:
    return f"{n / GIB:.2f}"


def _gb(n: Number) -> str:
    return f"{n / GB:,.4g}" if n < 1e11 else f"{n / GB:,.0f}"


def new_table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    """Returns an empty table; the columns in `left` are text, the others numbers."""
    table = Table(title=escape(title), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def by_precision(c: TransformerConfig) -> Table:
    """Returns the bytes of weights alone, and of weights, gradients and optimizer state."""
    active = f", {active_parameters(c):,} active" if c.n_experts else ""
    title = f"By hand: {parameters(c):,} parameters{active}, GB (10^9 bytes)"
    optimizers = [f"train: {optimizer}" for optimizer in memory.OPTIMIZERS]
    table = new_table(title, ["all at", "weights", *optimizers], left=["all at"])
    for precision, sizes in memory.by_precision(c).items():
        table.add_row(precision, *map(_gb, sizes.values()))
    return table


def by_hand(c: TransformerConfig, batch: int, time: int) -> Table:
    """Returns the bytes that grow with the batch, on a single device."""
    size = number_bytes(c)
    table = new_table(
        f"By hand: batch {batch} x {time} tokens, compute in {c.dtype}",
        ["what", "arithmetic", "GB"],
        left=["what", "arithmetic"],
    )
    for what, how, n in (
        (
            "activations",
            f"what the backward pass reads, remat={c.remat}",
            activations(c, batch, time, size),
        ),
        (
            "  Korthikanti et al., eq. 1",
            "L s b h (34 + 5 a s / h): GPT, 2 bytes",
            memory.korthikanti(c, batch, time),
        ),
        (
            "logits",
            "b t v float32, without chunks",
            memory.logits_bytes(c, batch, time),
        ),
        (
            "KV cache",
            "2 L kv_heads head_dim t b",
            kv_cache_bytes(c, batch, time, size),
        ),
    ):
        table.add_row(what, how, _gb(n))
    return table


def textbook(c: TransformerConfig) -> Table:
    """Returns the textbook's numbers beside what is needed."""
    columns = ("what", "textbook", "arithmetic", "needed, GB", "because")
    title = "The textbook example of Llama-2-7B (7e9 parameters)"
    table = new_table(title, columns, left=columns)
    for line in memory.textbook(c):
        printed = f"{line.textbook:.2f} {line.unit}"
        table.add_row(line.what, printed, line.how, _gb(line.needed), line.why)
    return table


def hbm(plan: Plan) -> Table:
    """Returns the memory of every program."""
    axes = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1)
    table = new_table(
        f"Memory per device, GiB: {plan.target.name} ({axes or 'one device'}), "
        f"by {plan.target.compiler}",
        [
            "program",
            "arguments",
            "temporaries",
            "outputs",
            "peak",
            "held by others",
            "capacity",
            "fits",
        ],
        left=["program"],
    )
    for p in plan.programs:
        m = p.memory
        sizes = (m.arguments, m.temporaries, m.outputs, m.peak, p.held_by_others)
        capacity = "unknown" if p.capacity is None else gib(p.capacity)
        table.add_row(p.name, *map(gib, sizes), capacity, FITS[p.fits])
    return table


def buffers(plan: Plan) -> Table:
    """Returns the largest buffers of the program with the highest peak."""
    worst = max(plan.programs, key=lambda p: p.memory.peak)
    title = f"Largest buffers of {worst.name}, GiB per device"
    table = new_table(title, ["what", "GiB"], left=["what"])
    table.columns[0].overflow = "fold"
    for what, size in worst.buffers[:6]:
        table.add_row(escape(what), f"{size / GIB:.3f}")
    return table


def work(plan: Plan) -> Table:
    """Returns the FLOPs, the traffic and the roofline of every program."""
    table = new_table(
        "Work per device and step, and its roofline",
        [
            "program",
            "TFLOP",
            "HBM GB",
            "ICI GB",
            "DCN GB",
            "collectives",
            "ms",
            "bound",
        ],
        left=["program", "collectives", "bound"],
    )
    for p in plan.programs:
        if p.cost is None:
            table.add_row(p.name, *(["-"] * 7))
            continue
        sizes = (p.cost.hbm, p.cost.link("ici"), p.cost.link("dcn"))
        kinds = [
            f"{kind} {n / GB:.2f}"
            for (kind, _), n in sorted(p.cost.sent.items())
            if n > 1e7
        ]
        milliseconds = bound = "?"
        if p.roofline is not None:
            milliseconds, bound = f"{1e3 * p.roofline.seconds:.1f}", p.roofline.bound
        table.add_row(
            p.name,
            f"{p.cost.flops / 1e12:.2f}",
            *(f"{size / GB:.2f}" for size in sizes),
            ", ".join(kinds) or "none",
            milliseconds,
            bound,
        )
    return table


def verdict(plan: Plan) -> str:
    """Returns whether the stage fits and what would help; time, utilization and cost."""
    verdicts = {
        True: "It fits.",
        False: "It does not fit.",
        None: "Whether it fits is unknown, since the capacity of a device is.",
    }
    lines = [verdicts[plan.fits], *(f"  {line}" for line in plan.advice)]
    lines += [f"  {p.name}: {p.error}" for p in plan.programs if p.error]
    if plan.left_out:
        names = ", ".join(plan.left_out)
        lines.append(f"Not compiled, and in none of these numbers: {names}.")
    tokens, steps = plan.step.tokens, plan.step.steps
    lines.append(f"6ND per step: {plan.six_n_d:.3g} FLOPs for {tokens:,} tokens.")
    if totals := plan.totals:
        lines.append(
            f"At the roofline: {totals['step_seconds']:.3f} s per step, "
            f"{totals['tokens_per_second']:,.0f} tokens/s, MFU {100 * totals['mfu']:.0f} %; "
            f"{_cost(totals)} for all {steps} steps. "
            "This is a lower bound of the time: everything that can overlap does."
        )
    if unknown := sum(p.cost.unknown_loops for p in plan.programs if p.cost):
        lines.append(f"Loops of unknown trip count, counted once: {unknown}.")
    return escape("\n".join(lines))


def _cost(totals: dict[str, float]) -> str:
    """Returns the hours, days, chip-hours and money of all steps."""
    hours, chip_hours = totals["hours"], totals["chip_hours"]
    text = (
        f"{hours:,.1f} h ({totals['days']:,.2f} days) and {chip_hours:,.0f} chip-hours"
    )
    return f"{text}, costs {totals['money']:,.4g}," if "money" in totals else text
