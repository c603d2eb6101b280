"""Fixtures of the system tests: conversations to train on, and a recipe that has been run once."""

import json
import os
import random
from pathlib import Path

# Before jax starts: four devices on one CPU, so that sharding is tested wherever the tests run.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from tests import tiny

WORDS = (
    *("I", "you", "we", "they", "like", "love", "hate", "see", "want", "good", "bad"),
    *("happy", "sad", "great", "awful", "tea", "music", "rain", "dogs", "books", "today"),
)


def write_conversations(folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """Small conversations of random words, {split}.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, n in (sizes or {"train": 60, "validation": 16, "test": 16}).items():
        rows = []
        for _ in range(n):
            turns = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(4)]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            rows.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Runs that a test repeats, in this process and in others, compile once."""
    folder = tmp_path_factory.mktemp("compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


@pytest.fixture(scope="session")
def finished(conversations, tmp_path_factory) -> Path:
    """The workdir of the tiny recipe, run to its end in this process."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    recipe.run(to_dict(tiny.get_config(f"data={conversations}")), workdir)
    return workdir
