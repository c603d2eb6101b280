"""Shows plans by hand in the terminal: GPUs, and what fits one card."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.markup import escape

from rlhfjax.plan.by_hand import BY_HAND, HandPlan
from rlhfjax.plan.one_card import Choice, Fits
from rlhfjax.plan.tables import FITS, arithmetic_of, gib, new_table
from rlhfjax.strategy import FULL

LOWER_BOUND = "The time is a lower bound: everything that can overlap does."


def hand_tables(plan: HandPlan) -> RenderableType:
    """Returns the tables of a plan by hand, the verdict last."""
    workload = plan.subject.workload()
    axes = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1)
    table = new_table(
        f"Memory per device, GiB: {plan.cluster.name} ({axes or 'one device'}), {BY_HAND}",
        ["what", "GiB"],
        left=["what"],
    )
    for part, size in plan.expected.parts.items():
        table.add_row(part, gib(size))
    table.add_row("together", gib(plan.expected.bytes))
    table.add_row(f"of, with a margin of {1 - FULL:.0%}", gib(FULL * plan.capacity))
    by_hand = arithmetic_of(plan.subject.model, workload.rows, workload.length)
    return Group(*by_hand, table, verdict(plan))


def verdict(plan: HandPlan) -> str:
    """Returns whether the stage fits, its time, utilization and cost."""
    family = plan.cluster.chip.name
    lines = [
        f"This plan is {BY_HAND}: a GPU's compiler needs the GPU. There, --topology=here compiles."
    ]
    if plan.fits:
        lines.append("It should fit.")
    else:
        lines.append(
            f"It does not fit. --topology=search --chips={family} looks for what does."
        )
    seconds, tokens = plan.expected.seconds, plan.expected.tokens
    lines.append(
        f"At the roofline: {seconds:.3f} s per step, {tokens / seconds:,.0f} tokens/s, "
        f"MFU {100 * plan.mfu:.0f} %; {plan.cost.text()} for all "
        f"{plan.subject.config.steps} steps. {LOWER_BOUND}"
    )
    return escape("\n".join(lines))


def fits_tables(result: Fits) -> RenderableType:
    """Returns what fits a card, by LoRA and dtype, and the answer."""
    card = result.card
    timed = ["s/step", "days"] if card.chip else []
    money = ["money"] if result.price is not None else []
    table = new_table(
        f"One device with {card.name}: GiB of {gib(card.room)} (a margin of {1 - FULL:.0%}), "
        f"{BY_HAND}",
        ["options of the stage", "GiB", "fits", *timed, *money],
        left=["options of the stage"],
    )
    for kind in result.kinds:
        table.add_row(*_row(result, kind[0]))
    return Group(table, escape(answer(result)))


def _row(result: Fits, choice: Choice) -> list[str]:
    fits = FITS[result.fits(choice)]
    cells = [described(choice.options), gib(choice.expected.bytes), fits]
    if (whole := result.cost(choice)) is not None:
        cells += [f"{choice.expected.seconds:,.3g}", f"{whole.days:,.3g}"]
        if whole.money is not None:
            cells.append(f"{whole.money:,.4g}")
    return cells


def described(options: Mapping[str, object]) -> str:
    """Returns options as text; of no options, that the config stays as it is."""
    return ", ".join(f"{k}={v}" for k, v in options.items()) or "as the config has them"


def answer(result: Fits) -> str:
    """Returns which settings fit, or the nearest miss."""
    best = result.best
    if best is None:
        nearest, room = result.nearest, result.card.room
        over = nearest.expected.bytes - room
        parts = sorted(nearest.expected.parts.items(), key=lambda part: -part[1])
        largest = ", ".join(f"{part} {gib(size)}" for part, size in parts[:3])
        return (
            f"Nothing that was tried fits. The nearest miss is {described(nearest.options)}: "
            f"{gib(nearest.expected.bytes)} GiB, {gib(over)} too many ({largest})."
        )
    text = f"It should fit with: {described(best.options)}."
    return f"{text} {LOWER_BOUND}" if result.card.chip else text
