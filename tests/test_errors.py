"""Errors in one line, whatever is caught: with several lines, with none, from a process that said
nothing."""

import re
import tomllib
from pathlib import Path

import pytest

import rlhfjax
from rlhfjax import hosts
from rlhfjax.errors import ConfigError, HostLost, first_line, install


@pytest.mark.parametrize(
    ("error", "line", "with_kind"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (RuntimeError("\n  \n two \nthree"), "two", "RuntimeError: two"),
        (RuntimeError(""), "RuntimeError", "RuntimeError"),
        (RuntimeError("\n"), "RuntimeError", "RuntimeError"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
        (KeyError("a"), "'a'", "KeyError: 'a'"),
        ("\nerror: no space\nmore", "error: no space", "error: no space"),
        ("", "no message", "no message"),
    ],
)
def test_pitfall_43_the_first_line_of_an_error_is_there_without_a_message(
    error, line, with_kind
):
    assert first_line(error) == line
    assert first_line(error, kind=True) == with_kind


def test_pitfall_43_hosts_that_cannot_be_joined_without_a_reason(monkeypatch):
    def refuse(**options):
        raise RuntimeError("")

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere:1")
    monkeypatch.setattr(hosts.jax.distributed, "initialize", refuse)
    monkeypatch.setattr(hosts.jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(hosts, "_exit_on_abort", lambda message: None)
    with pytest.raises(
        HostLost,
        match=r"^the other hosts did not come within --join_timeout=3600 s \(RuntimeError\);",
    ):
        hosts.join()


def test_pitfall_43_a_host_that_is_lost_without_a_reason(monkeypatch):
    def fail(message, code):
        assert message == f"{HostLost.message} (RuntimeError)"
        raise SystemExit(code)

    monkeypatch.setattr(hosts.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hosts, "fail", fail)
    with pytest.raises(SystemExit, match=r"^75$"):
        hosts.fail_for_another(RuntimeError(""))


def test_an_extra_is_installed_from_the_clone(monkeypatch, tmp_path):
    clone = Path(rlhfjax.__file__).parents[1]
    monkeypatch.chdir(clone)
    assert install("gguf") == "pip install -e '.[gguf]'"
    monkeypatch.chdir(tmp_path)
    assert install("gguf") == f"pip install -e '{clone}[gguf]'"


def test_extras_that_errors_name_exist():
    package = Path(rlhfjax.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text())
    named = set()
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert "pip install 'rlhfjax[" not in text, f"{file}: use errors.install"
        named |= set(re.findall(r"""\binstall\(["'](\w+)["']\)""", text))
    assert {"gcs", "gguf", "wandb"} <= named
    assert named <= project["project"]["optional-dependencies"].keys()


def test_the_middle_of_a_message_that_repeats_a_long_name_is_left_out():
    error = ConfigError(f"rule {'x' * 5000!r}: expected MODULE:FUNCTION")
    assert len(str(error)) == 1000 and str(error).count("…") == 1
    assert str(error).startswith("rule 'xxx")
    assert str(error).endswith("xxx': expected MODULE:FUNCTION")
    assert str(ConfigError("x" * 1000)) == "x" * 1000
    several = "x" * 1001 + "\ny"
    assert str(ConfigError(several)) == several
