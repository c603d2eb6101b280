"""A missing package: skipped on a contributor's machine, run and so failed in CI."""

import pytest

from tests import needs


@pytest.mark.parametrize(
    ("ci", "package", "skipped"),
    [
        (None, "no_such_package", True),
        ("false", "no_such_package", True),
        ("true", "no_such_package", False),
        (None, "jax", False),
    ],
)
def test_a_missing_package_is_skipped_except_in_ci(ci, package, skipped, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    if ci is not None:
        monkeypatch.setenv("CI", ci)
    mark = needs.needs("jax", package, extra="plan").mark
    assert mark.args == (skipped,)
    if skipped:
        reason = "no_such_package not installed: pip install -e '.[plan]'"
        assert mark.kwargs["reason"] == reason


def test_a_missing_program_is_skipped_with_a_reason(monkeypatch):
    needs.needs_program("sh")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="sh is not in PATH"):
        needs.needs_program("sh")
