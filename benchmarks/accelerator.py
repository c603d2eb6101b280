"""Measures one GPU or TPU machine with one command; nothing else is to be installed.

    python -m benchmarks.accelerator [--minutes=8] [--out=FILE.json]

prints a Markdown table and writes one JSON file. The parts run in order of importance, each in a
separate process, so that its peak memory is measured alone. A part that does not end within the
minutes is stopped, and those after it are skipped; the table says so. MFU and shares of the
bandwidth need the device's peaks (rlhfjax/plan/chips.py): "unknown peak" has neither. On a CPU the
sizes are tiny and the numbers mean nothing; that is a test of this program.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import accelerator_numerics, machine, options
from benchmarks import accelerator_parts as parts
from benchmarks.accelerator_parts import FULL, TINY, Result, Sizes
from rlhfjax import json_text

Call = Callable[..., Result]
"""(function, *arguments) -> its result in a new process, or {"error": ...}."""


def numerics(call: Call, sizes: Sizes) -> Result:
    return call(accelerator_numerics.numerics, sizes)


def attention(call: Call, sizes: Sizes) -> Result:
    return call(accelerator_numerics.attention_kernel, sizes)


def _training(stage: str, model: str) -> Callable[[Call, Sizes], Result]:
    return lambda call, sizes: call(parts.training, stage, model, sizes)


def _policy(stage: str) -> Callable[[Call, Sizes], Result]:
    return lambda call, sizes: call(parts.policy, stage, sizes)


def _generation(index: int) -> Callable[[Call, Sizes], Result]:
    return lambda call, sizes: call(parts.generation, sizes.decode[index], sizes)


def resume(call: Call, sizes: Sizes) -> Result:
    """Compares a run that is killed and started again with one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        whole = call(parts.resumable, f"{folder}/whole", 0, sizes)
        killed = call(parts.resumable, f"{folder}/killed", 5, sizes)
        resumed = call(parts.resumable, f"{folder}/killed", 0, sizes)
    if "error" in whole:
        return whole
    if killed.get("exit_code") != -9:
        return {"error": f"the run was not killed: {killed}"}
    if "error" in resumed:
        return resumed
    return {"is_same": whole == resumed, "whole": whole, "resumed": resumed}


PARTS: dict[str, Callable[[Call, Sizes], Result]] = {
    "numerics": numerics,
    "attention": attention,
    "pretrain_124m": _training("pretrain", "small"),
    "generation_first": _generation(0),
    "generation_second": _generation(1),
    "pretrain_1b": _training("pretrain", "large"),
    "ppo": _policy("ppo"),
    "grpo": _policy("group"),
    "reward": _training("reward", "small"),
    "resume": resume,
    "generation_third": _generation(2),
    "generation_fourth": _generation(3),
    "sft_124m": _training("sft", "small"),
    "sft_1b": _training("sft", "large"),
}


class Runner:
    """Runs functions in new processes until the time is spent, each for at most a third of it.

    The processes are forked off one that has imported everything and has started no device.
    """

    def __init__(self, seconds: float, cache: str):
        self._end = time.monotonic() + seconds
        self._most = (
            seconds / 3
        )  # so that one slow compilation does not cost all others
        self._cache = cache
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.accelerator_numerics"])

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self._end - time.monotonic()

    def __call__(self, function: Callable[..., Result], *args: Any) -> Result:
        receiver, sender = self._context.Pipe(duplex=False)
        given = (sender, self._cache, function, args)
        process = self._context.Process(target=_send_result, args=given)
        process.start()
        sender.close()
        try:
            limit = max(min(self.left(), self._most), 0.0)
            if not receiver.poll(limit):
                return {"error": f"stopped after {limit:.0f} s"}
            return receiver.recv()
        except EOFError:
            process.join()
            code = process.exitcode
            return {"error": f"its process ended with {code}", "exit_code": code}
        finally:
            process.kill()
            process.join()


def _send_result(
    connection: Any, cache: str, function: Callable[..., Result], args: Any
) -> None:
    """Sends what a function returns. Programs that a process compiled are reused by later ones."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        connection.send(function(*args))
    except Exception as error:  # one part's failure must not cost the others
        connection.send({"error": f"{type(error).__name__}: {error}"[:500]})


def measure(runner: Runner, sizes: Sizes, names: list[str]) -> dict[str, Result]:
    """Returns the result of every part, in order."""
    results: dict[str, Result] = {}
    for name in names:
        start = time.monotonic()
        if runner.left() <= 0:
            results[name] = {"skipped": "the minutes are spent"}
            continue
        results[name] = PARTS[name](runner, sizes)
        results[name]["took_s"] = round(time.monotonic() - start, 1)
    return results


# ------------------------------------------------------------------ the table


def markdown(device: Result, results: dict[str, Result], sizes: Sizes) -> str:
    lines = [
        f"{device['devices']} x {device['kind']} ({device['peak']})",
        "",
        "| part | measured | share of the peak | memory GB: measured, plan | took s |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        took = result.get("took_s", "—")
        lines.append(
            f"| {_title(name, sizes)} | {' | '.join(_cells(result))} | {took} |"
        )
    return "\n".join(lines)


def _title(name: str, sizes: Sizes) -> str:
    order = ("first", "second", "third", "fourth")
    kind, _, which = name.partition("_")
    if kind == "generation":
        index = order.index(which)
        rows = sizes.decode[index]
        return f"generation, {sizes.large}, batch {rows}"
    models = {"124m": sizes.small, "1b": sizes.large}
    return f"{kind}, {models[which]}" if which in models else name


def _cells(result: Result) -> tuple[str, str, str]:
    """Returns the cells of what was measured, its share of the peak, and memory."""
    if problem := result.get("error") or result.get("skipped"):
        return problem.replace("|", "/").splitlines()[0], "—", "—"
    memory = [_number(result.get(name)) for name in ("peak_gb", "plan_gb")]
    has_memory = "plan_gb" in result
    return (
        "; ".join(_measured(result)),
        _share(result),
        ", ".join(memory) if has_memory else "—",
    )


def _measured(result: Result) -> Iterator[str]:
    """Yields what matters of a part."""
    if "is_same" in result:
        yield "the same bits" if result["is_same"] else "OTHER BITS"
    units = {
        "loss_difference": "nats per token off",
        "output_error": "output error",
        "gradient_error": "gradient error",
        "tokens_per_s": "tokens/s",
        "new_tokens_per_s": "new tokens/s",
        "response_tokens_per_s": "response tokens/s",
        "decode_step_s": "s per decode step",
        "gb_per_s": "GB/s",
        "seconds": "s",
        "einsum_seconds": "s by einsum",
    }
    for name, unit in units.items():
        if name in result:
            yield f"{_number(result[name])} {unit}"
    for program, seconds in result.get("programs", {}).items():
        yield f"{program} {_number(seconds)} s"


def _share(result: Result) -> str:
    shares = {"mfu": "MFU", "bandwidth_share": "of the bandwidth"}
    for name, what in shares.items():
        if name in result:
            share = result[name]
            return "unknown peak" if share is None else f"{100 * share:.0f} % {what}"
    return "—"


def _number(x: float | None) -> str:
    if x is None:
        return "—"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...")
    given = parser.parse_args()
    names = options.names(parser, "parts", given.parts, PARTS)
    with tempfile.TemporaryDirectory() as cache:
        runner = Runner(60 * given.minutes, cache)
        device = runner(parts.device)
        if "error" in device:
            raise SystemExit(f"no device: {device['error']}")
        sizes = TINY if device["platform"] == "cpu" else FULL
        about = {"device": device, "machine": runner(machine.describe)}
        results = measure(runner, sizes, names)
    record = json_text.null_nonfinite(about | {"parts": results})
    given.out.write_text(json_text.encode(record, given.out, indent=1) + "\n")
    print(markdown(device, results, sizes))


if __name__ == "__main__":
    main()
