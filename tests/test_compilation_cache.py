"""Compiled programs on disk: where they are kept, by whom, and that they compute the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import compilation_cache as jax_cache

from rlhfjax import compilation_cache, hosts, processor

ROOT = Path(__file__).parents[1]
NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without settings of JAX, whose cache folder is empty."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "rlhfjax" / "programs" / compilation_cache.machine()
    for name, value in before.items():
        jax.config.update(name, value)


def test_one_host_keeps_programs_in_the_users_folder_for_its_processor(home):
    compilation_cache.use(None)
    assert jax.config.jax_compilation_cache_dir == str(home)
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.LIMIT
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    assert seconds == compilation_cache.SHORTEST
    assert home.stat().st_mode & 0o777 == 0o700


def test_the_users_own_settings_stand(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    before = jax.config.jax_compilation_cache_max_size
    compilation_cache.use(None)
    assert jax.config.jax_compilation_cache_max_size == before
    compilation_cache.use("/mine")
    assert jax.config.jax_compilation_cache_dir == "/mine"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    compilation_cache.use(None)
    assert jax.config.jax_compilation_cache_dir == "/mine"


@pytest.mark.parametrize("given", ["", None])
def test_it_can_be_turned_off(given, home):
    """By an empty flag, and by JAX's own variable."""
    if given is None:
        jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.use(given)
    assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_compilation_cache_dir is None and not home.exists()


def test_several_hosts_have_no_default(home, monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    compilation_cache.use(None)
    assert jax.config.jax_compilation_cache_dir is None and not home.exists()


def test_another_processor_or_number_of_cores_has_another_folder(monkeypatch):
    class Processor:
        text = "flags\t: sse amx_tile\nmodel name\t: A\ncpu MHz\t: 2000\n"

        def read_text(self):
            return self.text

    monkeypatch.setattr(compilation_cache.paths, "path", lambda name: Processor())
    names = [compilation_cache.machine()]
    Processor.text = Processor.text.replace("2000", "3000")
    assert compilation_cache.machine() == names[0]  # it varies from moment to moment
    for old, new in (("amx_tile", "avx2"), ("name\t: A", "name\t: B")):
        Processor.text = Processor.text.replace(old, new)
        names.append(compilation_cache.machine())
    monkeypatch.setattr(processor, "cores", lambda: 1000)
    names.append(compilation_cache.machine())
    assert len(set(names)) == 4


def test_a_folder_that_others_may_write_is_not_used(home, caplog):
    """It holds machine code, which the process runs."""
    home.mkdir(parents=True)
    home.chmod(0o777)
    with caplog.at_level("INFO", "rlhfjax"):
        compilation_cache.use(None)
    assert jax.config.jax_compilation_cache_dir is None
    assert f"compiled programs are not kept: {home}: others may write" in caplog.text


def test_programs_whose_writing_was_cut_off_are_removed(home):
    home.mkdir(parents=True, mode=0o700)
    for name in ("a-cache", "a-atime", "b-cache"):
        (home / name).write_bytes(bytes(8))
    compilation_cache.use(None)
    kept = {path.name for path in home.iterdir()}
    assert kept - {compilation_cache.LOCK} == {"a-cache", "a-atime"}


def test_jax_writes_and_loads_programs_there(home, monkeypatch):
    monkeypatch.setattr(compilation_cache, "SHORTEST", 0.0)
    hits = []

    def count(event, **_):
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(count)
    compilation_cache.use(None)
    jax_cache.compilation_cache.reset_cache()
    try:
        x = np.arange(8.0)
        results = [jax.jit(lambda x: x * 3 + 1)(x) for _ in range(2)]
        assert len(hits) == 1
        np.testing.assert_array_equal(*results)
        assert [path for path in home.iterdir() if path.name.endswith("-cache")]
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax_cache.compilation_cache.reset_cache()


TRAIN = """
import sys
import jax
from rlhfjax.main import main
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None
)
main(["rlhfjax", "run", *sys.argv[1:]])
print("hits", len(hits))
"""


@pytest.mark.nightly
def test_a_run_of_loaded_programs_has_the_bits_of_one_that_compiled_them(
    conversations, tmp_path
):
    """Every stage of the tiny recipe: compiled, compiled and written, and loaded."""
    results, hits = [], []
    names = {name.upper() for name in NAMES}
    env = {name: value for name, value in os.environ.items() if name not in names}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    flags = {"off": ["--compilation_cache="], "cold": [], "warm": []}
    for run, flag in flags.items():
        workdir = tmp_path / run
        config = f"--config=tests/tiny.py:data={conversations},steps=3"
        words = [sys.executable, "-c", TRAIN, config, f"--workdir={workdir}", *flag]
        done = subprocess.run(
            words, cwd=ROOT, env=env, check=True, capture_output=True, text=True
        )
        hits.append(int(done.stdout.rsplit("hits", 1)[1]))
        results.append((workdir / "metrics.jsonl").read_bytes())
    assert results[0] == results[1] == results[2]
    assert hits[0] == 0 and hits[2] > hits[1]
