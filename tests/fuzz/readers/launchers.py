"""Readers of what launchers are given: names, times, environments, command lines."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import gke, shell, slurm, tpu_gcloud
from launch.gke_manifest import CHIPS
from tests.fuzz.inputs import SEPARATOR, words_bytes
from tests.fuzz.readers.table import Reader, Table, Trial, text_reader
from tests.fuzz.readers.words import NUMBERS, words_of

TABLE: Table = {}

REFUSED = (shell.LaunchError, flags.Error)
ONES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "environment": (lambda text: shell.environment([text]), ("A=b", "A", "=", "1A=b")),
    "secrets": (lambda text: shell.secrets([text]), ("A=b:latest", "A=b", "A=")),
    "slug": (shell.slug, ("kl=0.1,seed=1", "a", "-")),
    "seconds": (lambda text: shell.seconds("poll", text), ("1h30m", "90s", "0", ".")),
    "minutes": (slurm.minutes, ("1-02:03:04", "02:03:04", "::")),
    "sbatch": (lambda text: slurm.sbatch_options([text]), ("exclusive", "mem=1")),
    "accelerator": (tpu_gcloud.runtime_of, ("v5litepod-16", "v4-8", "tpu7x-4")),
    "redact": (shell.redact, ("A_TOKEN=xyz", "hf_" + "a" * 30)),
}


def _launch_words(name: str, define: Any, act: Any, good: Sequence[str]) -> None:
    words = (
        *("--name=x", "--name=", "--env=A=b", "--env=A", "--dry_run", "--help", "--"),
        *("rlhfjax", "run", "train", "--topology=4x4", "--topology=4", "--chip=v9"),
        *("--slices=0", "--grace=x", "--keep_days=nan", "--keep_days=inf", "--image="),
        *("--nodes=0", "--time=1", "--time=01:00:00", "--hosts=", "--hosts=a,b", "-x"),
        *("--bucket=b", "--workdir=gs://b/x", "--slices=" + "9" * 5000, "states", "up"),
        *(f"--topology={'x'.join('9' * 3)}", "--topology=0x0", "--topology=4x"),
    )

    def call(content: bytes) -> None:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                shell.launch("doc", define, act, ["x", "--dry_run", *words_of(content)])
            except SystemExit as end:
                if end.code not in (0, 1, 2, None):
                    raise AssertionError(f"exit code {end.code}") from None

    def make(folder: Path) -> Trial:
        seed = SEPARATOR.join(good).encode()
        return Trial([seed], words_bytes([good], words), call)

    TABLE[name] = Reader(make, 80)


for _name, (_call, _seeds) in ONES.items():
    text_reader(
        TABLE,
        f"launch_{_name}",
        _seeds[:1],
        (*_seeds, *NUMBERS),
        _call,
        examples=60,
        accepted=REFUSED,
    )
_launch_words(
    "launch_gke",
    gke._flags,
    gke.act,
    [
        "run",
        "--name=a",
        "--image=i",
        f"--chip={next(iter(CHIPS))}",
        "--topology=4x4",
        "--",
        "rlhfjax",
        "run",
        "--config=x.py",
        "--workdir=gs://b/x",
    ],
)
_launch_words(
    "launch_slurm",
    slurm._flags,
    slurm.act,
    ["run", "--name=a", "--nodes=1", "--", "rlhfjax", "run", "--workdir=w"],
)
