"""Measures how the time and the memory of a step grow, one axis at a time.

    python -m benchmarks.scaling [--axes=length,batch,…] [--shape=tiny] [--steps=3]

prints a Markdown table of log-log slopes: 1 means that a quantity grows as the axis does, 0 that it
does not grow. Beside each stands the slope of the algorithm: of the FLOPs that it needs, and of the
bytes that it keeps (parameters, gradients, moments, activations), fitted to the same points. A
measured slope that is higher by more than 0.1 is marked. Each point runs in a separate process.
--steps=0 compiles and runs nothing: compiled memory alone, which no other load disturbs.

Compiled memory is what XLA's memory analysis says of the step's programs (`rlhfjax plan`), per
device. Resident memory is the process's peak less what it held after its imports. CPU seconds are
those of all threads; other load on the machine disturbs them less than the wall time.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks import machine, options, products
from rlhfjax import json_text
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.presets import preset
from rlhfjax.models.size import activations, parameters, token_flops

HERE = Path(__file__).parent
SPEC = json_text.read(HERE / "workloads.json", json_text.Object)
TOLERANCE = 0.1
# Bytes of a float32 parameter, its gradient and AdamW's two moments.
TRAINED_BYTES = 16.0
LONGEST = 4096
TOKENS = 8192  # of a step, on the axis of lengths

Values = dict[str, float]
Point = dict[str, Any]
"""What a process measures: workload, model (changed fields), sizes (changed ones), devices."""


def _length(x: int) -> Point:
    return {"workload": "pretrain", "sizes": {"seq": x, "batch": TOKENS // x}}


def _batch(x: int) -> Point:
    return {"workload": "pretrain", "sizes": {"batch": x}}


def _vocabulary(x: int) -> Point:
    sizes = {"batch": 8}
    return {"workload": "pretrain", "sizes": sizes, "model": {"vocab_size": x}}


def _layers(x: int) -> Point:
    sizes = {"batch": 8}
    return {"workload": "pretrain", "sizes": sizes, "model": {"n_layers": x}}


def _scanned_layers(x: int) -> Point:
    point = _layers(x)
    point["model"]["scan_layers"] = True
    return point


def _responses(x: int) -> Point:
    sizes = {"prompts": 4, "group": x, "batch": 4 * x}
    return {"workload": "grpo", "sizes": sizes}


def _devices(x: int) -> Point:
    return {"workload": "pretrain", "sizes": {"batch": 16}, "devices": x}


def _rows(x: int) -> Point:
    return {"workload": "data", "rows": x}


class Axis(NamedTuple):
    """What is varied."""

    what: str
    values: Sequence[int]
    point: Callable[[int], Point]


AXES = {
    "length": Axis(
        f"length, {TOKENS} tokens per step",
        (128, 256, 512, 1024, 2048, LONGEST),
        _length,
    ),
    "batch": Axis("sequences per step", (8, 16, 32, 64), _batch),
    "vocabulary": Axis("vocabulary", (1024, 4096, 16384, 65536), _vocabulary),
    "layers": Axis("layers", (2, 4, 8, 16), _layers),
    "scanned": Axis("layers, scan_layers", (2, 4, 8, 16), _scanned_layers),
    "responses": Axis("responses per prompt (grpo)", (2, 4, 8, 16), _responses),
    "devices": Axis("fake devices, fsdp", (1, 2, 4, 8), _devices),
    "rows": Axis("rows of data", (10**3, 10**4, 10**5, 10**6, 10**7), _rows),
}
NAMES = {
    "seconds": "seconds per step",
    "cpu_seconds": "CPU seconds per step",
    "compiled_mb": "compiled MB per device",
    "resident_mb": "resident MB",
    "first_seconds": "seconds of the first step",
    "index_seconds": "seconds of the first open (indexing)",
    "open_seconds": "seconds of the second open",
    "batch_seconds": "seconds per batch",
}


# ------------------------------------------------------------------ the algorithm's own cost


def sizes_of(point: Point) -> dict[str, Any]:
    """Returns the workload's sizes with the point's changes; one microbatch."""
    sizes = SPEC["workloads"][point["workload"]] | point.get("sizes", {})
    return sizes | {"microbatches": 1}


def config_of(point: Point, shape: str) -> TransformerConfig:
    return preset(shape, **({"max_length": LONGEST} | point.get("model", {})))


def expected(point: Point, shape: str) -> Values:
    """Returns what the algorithm needs, up to a constant: FLOPs as seconds, bytes as MB.

    A causal query sees half of the tokens on average. Data has an index: opening and reading cost
    nothing per row, but making the index does.
    """
    if point["workload"] == "data":
        rows = float(point["rows"])
        constant = dict.fromkeys(("open_seconds", "batch_seconds", "resident_mb"), 1.0)
        return {"index_seconds": rows, **constant}
    config, sizes = config_of(point, shape), sizes_of(point)
    devices = point.get("devices", 1)
    state = TRAINED_BYTES * parameters(config)
    if point["workload"] == "grpo":
        flops = products.flops(products.products("grpo", config, sizes))
        time = sizes["prompt"] + sizes["new"]
        state += 4.0 * parameters(config)  # the reference
    else:
        time = sizes["seq"]
        per_token = token_flops(parameters(config), config, time // 2)
        flops = per_token * sizes["batch"] * time
    kept = state + activations(config, sizes["batch"], time, 4)
    # All fake devices share this machine's cores and its memory.
    return {
        "seconds": flops,
        "cpu_seconds": flops,
        "compiled_mb": kept / devices,
        "resident_mb": kept,
    }


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the least-squares slope of log y over log x."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def is_above(measured: float, algorithm: float) -> bool:
    return measured > algorithm + TOLERANCE


# ------------------------------------------------------------------ one point, in its own process


def measure(point: Point, shape: str, steps: int) -> Values:
    """Returns what one point needs."""
    if point["workload"] == "data":
        from benchmarks import scaling_data

        return scaling_data.measure(point["rows"])
    from benchmarks import scaling_step

    config, sizes = config_of(point, shape), sizes_of(point)
    sizes |= {"steps": steps, "warmup": 1}
    devices = point.get("devices", 1)
    return scaling_step.measure(point["workload"], config, sizes, devices)


def measure_apart(point: Point, shape: str, steps: int) -> Values:
    """Runs `measure` in a new process with the point's number of fake devices."""
    devices = point.get("devices", 1)
    flags = f"--xla_force_host_platform_device_count={devices}"
    encoded = json_text.encode(point, "the point")
    command = [sys.executable, "-m", "benchmarks.scaling", f"--child={encoded}"]
    command += [f"--shape={shape}", f"--steps={steps}"]
    result = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json_text.parse(result.stdout.splitlines()[-1])


# ------------------------------------------------------------------ the table


def lines(axis: Axis, measured: Sequence[Values], shape: str) -> Iterator[str]:
    """Yields a line of the table per measured quantity."""
    needed = [expected(axis.point(x), shape) for x in axis.values]
    for name, title in NAMES.items():
        if name not in measured[0]:
            continue
        ys = [values[name] for values in measured]
        found = slope(axis.values, ys)
        algorithm = verdict = "—"
        if name in needed[0]:
            least = slope(axis.values, [values[name] for values in needed])
            algorithm = f"{least:.2f}"
            verdict = "above" if is_above(found, least) else "no"
        numbers = ", ".join(f"{y:.3g}" for y in ys)
        values = ", ".join(f"{x:,}" for x in axis.values)
        columns = (
            axis.what,
            values,
            title,
            numbers,
            algorithm,
            f"{found:.2f}",
            verdict,
        )
        yield "| " + " | ".join(columns) + " |"


HEADER = ("axis", "values", "quantity", "measured", "algorithm", "slope", "above it?")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also writes the points here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        point = json_text.parse(given.child)
        values = measure(point, given.shape, given.steps)
        print(json_text.encode(values, "what was measured"))
        return
    about = machine.describe()
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|", flush=True)
    records = []
    for name in options.names(parser, "axes", given.axes, AXES):
        axis = AXES[name]
        try:
            measured = []
            for x in axis.values:
                values = measure_apart(axis.point(x), given.shape, given.steps)
                print(name, x, values, file=sys.stderr, flush=True)
                measured.append(values)
                records.append({"axis": name, "x": x, **values})
        except subprocess.CalledProcessError as error:
            print(f"| {axis.what} | {x:,} failed: exit code {error.returncode} |")
            continue
        print("\n".join(lines(axis, measured, given.shape)), flush=True)
    print(f"\n{given.shape}. {machine.sentence(about)}")
    if given.json:
        given.json.write_text(json_text.encode([about, *records], given.json))


if __name__ == "__main__":
    main()
