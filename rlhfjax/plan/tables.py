"""A plan as tables in the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table

from rlhfjax.mesh import AXES, MeshConfig
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import activations, kv_cache_bytes, parameters
from rlhfjax.plan import chips, memory
from rlhfjax.plan.memory import GB, GIB, Number
from rlhfjax.plan.predict import Plan, advice
from rlhfjax.plan.search import Search


def gib(n: Number) -> str:
    return f"{n / GIB:.2f}"


def everything(plan: Plan) -> RenderableType:
    """All tables of a plan, the verdict last."""
    s, model = plan.sketch, plan.subject.model
    by_compiler = hbm(plan), buffers(plan), work(plan)
    return Group(
        by_precision(model),
        by_hand(model, s.batch, s.time),
        *by_compiler,
        verdict(plan),
    )


def arithmetic(c: TransformerConfig) -> RenderableType:
    """The arithmetic alone, for one sequence as long as the context, and as the textbook has it."""
    return Group(by_precision(c), by_hand(c, 1, c.max_length), textbook(c))


def gb(n: Number) -> str:
    return f"{n / GB:,.4g}" if n < 1e11 else f"{n / GB:,.0f}"


def by_precision(c: TransformerConfig) -> Table:
    """Weights alone; and weights, gradients and optimizer state."""
    table = Table(
        title=f"By hand: {parameters(c):,} parameters, GB (10^9 bytes)",
        title_justify="left",
    )
    for name in ("all at", "weights", *(f"train: {o}" for o in memory.OPTIMIZERS)):
        table.add_column(name, justify="left" if name == "all at" else "right")
    for row in memory.by_precision(c):
        table.add_row(
            row["precision"], *(gb(row[k]) for k in ("weights", *memory.OPTIMIZERS))
        )
    return table


def by_hand(c: TransformerConfig, batch: int, time: int) -> Table:
    """What grows with the batch, on one device if there were no other: the arithmetic of `memory.py`."""
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    table = Table(
        title=f"By hand: batch {batch} x {time} tokens, compute in {c.dtype}",
        title_justify="left",
    )
    for name in ("what", "arithmetic", "GB"):
        table.add_column(name, justify="right" if name == "GB" else "left")
    kept = f"what the backward pass reads, remat={c.remat}"
    published = memory.korthikanti(c, batch, time)
    table.add_row("activations", kept, gb(activations(c, batch, time, size)))
    table.add_row(
        "  Korthikanti et al., eq. 1",
        "L s b h (34 + 5 a s / h): GPT, 2 bytes",
        gb(published),
    )
    table.add_row(
        "logits",
        "b t v float32, if they were whole",
        gb(memory.logits_bytes(c, batch, time)),
    )
    table.add_row(
        "KV cache",
        "2 L kv_heads head_dim t b",
        gb(kv_cache_bytes(c, batch, time, size)),
    )
    return table


def textbook(c: TransformerConfig) -> Table:
    """The textbook's figures beside what is needed."""
    table = Table(
        title="As the textbook has it for Llama-2-7B (7e9 parameters)",
        title_justify="left",
    )
    for name in ("what", "textbook", "arithmetic", "needed, GB", "of"):
        table.add_column(name)
    for line in memory.textbook(c):
        table.add_row(
            line.what,
            f"{line.textbook:.2f} {line.unit}",
            line.how,
            gb(line.needed),
            line.why,
        )
    return table


def hbm(plan: Plan) -> Table:
    axes = ", ".join(f"{k} {v}" for k, v in plan.mesh.items() if v > 1) or "one device"
    title = f"Memory per device, GiB: {plan.target.name} ({axes}), by {plan.target.compiler}"
    table = Table(title=title, title_justify="left")
    for name in (
        "program",
        "arguments",
        "temporaries",
        "outputs",
        "peak",
        "elsewhere",
        "capacity",
        "fits",
    ):
        table.add_column(name, justify="left" if name == "program" else "right")
    for p in plan.programs:
        m, capacity = p.memory, "unknown" if p.capacity is None else gib(p.capacity)
        fits = {True: "yes", False: "[red]no[/red]", None: "?"}[p.fits]
        sizes = (m.arguments, m.temporaries, m.outputs, m.peak, p.elsewhere)
        table.add_row(p.name, *map(gib, sizes), capacity, fits)
    return table


def buffers(plan: Plan) -> Table:
    """Of the program with the highest peak."""
    worst = max(plan.programs, key=lambda p: p.memory.peak)
    table = Table(
        title=f"Largest buffers of {worst.name}, GiB a device", title_justify="left"
    )
    table.add_column("what", overflow="fold")
    table.add_column("GiB", justify="right")
    for what, size in worst.buffers[:6]:
        table.add_row(what.replace("[", "\\["), f"{size / GIB:.3f}")
    return table


def work(plan: Plan) -> Table:
    table = Table(
        title="Work of a device in a step, and its roofline", title_justify="left"
    )
    for name in (
        "program",
        "TFLOP",
        "HBM GB",
        "ICI GB",
        "DCN GB",
        "collectives",
        "ms",
        "bound",
    ):
        table.add_column(
            name,
            justify="left" if name in ("program", "collectives", "bound") else "right",
        )
    for p in plan.programs:
        if p.cost is None:
            table.add_row(p.name, *(["-"] * 7))
            continue
        kinds = (
            ", ".join(
                f"{kind} {n / GB:.2f}"
                for (kind, _), n in sorted(p.cost.sent.items())
                if n > 1e7
            )
            or "none"
        )
        roof = (
            ("?", "?")
            if p.roofline is None
            else (f"{1e3 * p.roofline.seconds:.1f}", p.roofline.bound)
        )
        links = (f"{p.cost.link(link) / GB:.2f}" for link in ("ici", "dcn"))
        table.add_row(
            p.name,
            f"{p.cost.flops / 1e12:.2f}",
            f"{p.cost.hbm / GB:.2f}",
            *links,
            kinds,
            *roof,
        )
    return table


def searched(found: Search) -> RenderableType:
    """Every slice that was considered, by arithmetic and by the compiler; the answers last."""
    table = Table(
        title="Slices: GiB a device, and tokens per chip-second", title_justify="left"
    )
    for name in (
        "slice",
        "mesh",
        "GiB, by hand",
        "compiled",
        "of",
        "fits",
        "tokens, by hand",
        "compiled",
    ):
        table.add_column(
            name,
            justify="left" if name in ("slice", "mesh") else "right",
            no_wrap=name == "slice",
        )
    for c in found.candidates:
        plan = found.plans.get(c.topology)
        need = (
            "-"
            if plan is None
            else gib(max(p.memory.peak + p.elsewhere for p in plan.programs))
        )
        fits = "-" if plan is None else {True: "yes", False: "no", None: "?"}[plan.fits]
        rate = f"{found.rate(c):,.0f}" if found.fits(c) else "-"
        row = (
            gib(c.expected.bytes),
            need,
            gib(c.capacity),
            fits,
            f"{c.expected_rate:,.0f}",
            rate,
        )
        table.add_row(c.topology, mesh_flags(c.mesh), *row)
    return Group(table, answers(found))


def answers(found: Search) -> str:
    """Smallest, best, and what the search took."""
    lines = []
    if found.fewest is not None and found.best is not None:
        each = ", ".join(found.smallest.values())
        lines.append(f"Smallest that fits: {found.fewest.topology}. By chip: {each}.")
        best = found.best
        lines.append(
            f"Most tokens per chip-second: {best.topology}, {found.rate(best):,.1f}; mesh {mesh_flags(best.mesh)}"
        )
    else:
        lines.append("None of those compiled fits.")
    lines.append(f"Compiled {len(found.plans)} of {len(found.candidates)} slices.")
    if found.exhausted:
        lines.append(
            "--compiles was reached: what is not compiled may be smaller or better."
        )
    return "\n".join(lines)


def mesh_flags(mesh: MeshConfig) -> str:
    axes = [f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1]
    return (
        ", ".join(
            [*axes, *(f"{name} whole" for name, over in mesh.rules.items() if not over)]
        )
        or "one device"
    )


def verdict(plan: Plan) -> str:
    """Lines for the end: fits or not and what would help; time, utilization and cost."""
    words = {
        True: "It fits.",
        False: "It does not fit.",
        None: "Whether it fits is unknown: no capacity is.",
    }
    lines = [words[plan.fits], *(f"  {line}" for line in advice(plan))]
    lines += [f"  {p.name}: {p.refused}" for p in plan.programs if p.refused]
    if plan.left_out:
        lines.append(
            f"Not compiled, and in none of these numbers: {', '.join(plan.left_out)}."
        )
    s, n = plan.sketch, parameters(plan.subject.model)
    lines.append(
        f"6ND of a step: {chips.training_flops(n, s.tokens):.3g} FLOPs for {s.tokens:,} tokens."
    )
    if plan.step_seconds is not None and plan.mfu is not None:
        seconds = plan.step_seconds
        hours = seconds * s.steps / 3600
        lines.append(
            f"At the roofline: {seconds:.3f} s a step, {s.tokens / seconds:,.0f} tokens/s, MFU {100 * plan.mfu:.0f} %; "
            f"{hours:,.1f} h and {hours * plan.target.chips:,.0f} chip-hours to the end, {s.steps} steps. "
            "A lower bound of the time: everything that can overlap does."
        )
    if unknown := sum(p.cost.unknown_loops for p in plan.programs if p.cost):
        lines.append(
            f"Loops whose number of rounds the program does not say, counted once: {unknown}."
        )
    return "\n".join(line.replace("[", "\\[") for line in lines)
