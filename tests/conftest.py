"""Fixtures of the system tests: conversations to train on, and a recipe that has been run once.

jax and the package are imported where they are used: the process that only hands tests to others
needs neither, and the others start when it has read this file.
"""

import gc
import json
import os
import random
import uuid
from importlib.metadata import version
from pathlib import Path

import filelock
import pytest

from tests import compilation_cache

# Before jax starts: four devices on one CPU, so that sharding is tested wherever the tests run.
FLAGS = [
    "--xla_force_host_platform_device_count=4",
    "--xla_cpu_parallel_codegen_split_count=1",  # halves the memory maps that a program costs
]
if version("jaxlib").startswith(
    "0.10."
):  # later versions stop at a flag that they do not know
    FLAGS += [
        "--xla_cpu_use_fusion_emitters=false"
    ]  # halves the time of compiling, most of the tests' time
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Small programs are compiled by the hundred and run once or twice: optimizing them costs more than
# it gives.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["RLHFJAX_RATES"] = "off"  # what tests measure says nothing about runs
compilation_cache.use()
gc.set_threshold(
    100_000, 50, 100
)  # the heap is millions of objects of jax that stay: looking through it is slow

# a process may have 65,530 memory maps (vm.max_map_count); one module adds thousands
MANY_MAPS = 20_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees the compiled programs at the end of a module when the process holds many of them.

    Every compiled program costs 6 to 230 memory maps, and XLA crashes when there are no more.
    """
    if nextitem is None or nextitem.path == item.path:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


WORDS = (
    *("I", "you", "we", "they", "like", "love", "hate", "see", "want", "good", "bad"),
    *(
        "happy",
        "sad",
        "great",
        "awful",
        "tea",
        "music",
        "rain",
        "dogs",
        "books",
        "today",
    ),
)


def write_conversations(folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """Small conversations of random words, {split}.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, n in (sizes or {"train": 60, "validation": 16, "test": 16}).items():
        rows = []
        for _ in range(n):
            turns = [
                " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(4)
            ]
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(turns)
            ]
            rows.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_dtype():
    """Recipes compute in float32, whatever the CPU: `dtype="auto"` has its own tests."""
    from rlhfjax import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "here", lambda: "float32")
        yield


@pytest.fixture
def optimized():
    """Asked for by a test that looks at the compiled program, or computes for long."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def cloud():
    """Buckets, for this process and those that it starts; the URL of what serves them."""
    from tests import gcs

    with pytest.MonkeyPatch.context() as patch, gcs.serve() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment["STORAGE_EMULATOR_HOST"]


@pytest.fixture
def bucket(cloud):
    """A new folder in a bucket."""
    from rlhfjax import paths
    from tests import gcs

    return paths.path(f"gs://{gcs.BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of this run see."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def conversations(shared) -> Path:
    with filelock.FileLock(shared / "conversations.lock"):
        folder = shared / "conversations"
        return folder if folder.exists() else write_conversations(folder)


@pytest.fixture(scope="session")
def finished(conversations, shared) -> Path:
    """The workdir of the tiny recipe, run to its end once, by whichever worker needs it first."""
    from rlhfjax import recipe
    from rlhfjax.config import to_dict
    from tests import tiny

    workdir, done = shared / "finished", shared / "finished.done"
    with filelock.FileLock(shared / "finished.lock"):
        if not done.exists():
            recipe.run(to_dict(tiny.get_config(f"data={conversations}")), workdir)
            done.touch()
    return workdir
