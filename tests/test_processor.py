"""The CPU is named in what a run and a benchmark record."""

import pytest

from rlhfjax import paths, processor

X86 = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 amx_bf16 sse\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """cpuinfo(text) -> describe() where /proc/cpuinfo has this text; None: there is none."""

    def describe(text):
        file = paths.path(tmp_path / "cpuinfo")
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(processor, "FILE", file)
        monkeypatch.setattr("platform.processor", lambda: "")
        return processor.describe()

    processor.features.cache_clear()
    yield describe
    processor.features.cache_clear()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (X86 + X86.replace("A CPU", "another"), "A CPU (avx2, amx_bf16)"),
        (ARM, "unknown CPU"),
        (None, "unknown CPU"),
    ],
)
def test_the_cpu_is_named_with_the_sets_that_matter(cpuinfo, text, name):
    assert cpuinfo(text) == name


def test_the_features_of_another_architecture_are_listed_too(cpuinfo):
    cpuinfo(ARM)
    assert processor.features() == {"fp", "asimd"}
