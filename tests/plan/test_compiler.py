"""What the TPU compiler decided, read before it has written machine code."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhfjax.config import to_dict
from rlhfjax.errors import UserError
from rlhfjax.plan import compiled, compiler, programs, shapes, topology
from rlhfjax.plan.hlo import Module
from rlhfjax.plan.hlo_cost import module_cost
from tests import tiny
from tests.needs import needs

needs_libtpu = needs("libtpu", extra="plan")
ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, page 0, thread-local:
allocation 1: size 4096, page 0, parameter 3, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 p3 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 512, page 0, parameter 0, shape |f32[4]| at ShapeIndex {}:
allocation 3: size 2048, page 0, output shape is |(f32[8,128], f32[4,128])|, maybe-live-out:
allocation 4: size 512, page 0, constant:
allocation 5: size 8192, page 0, preallocated-temp:
 value: <2 x @0> (size=8192,offset=0): f32[16,128]{1,0:T(8,128)}
allocation 6: size 67108864, color 1, page 0, preallocated-temp:
allocation 7: size 4, color 2, page 0, preallocated-temp:
"""
RANGES = """HloLiveRange (max 9):
  BufferLiveRange:
    p0{}:0-9
  Live ranges at 8 (peak):
    all-gather.7{}: 8192 bytes (cumulative: 8192 bytes)
    fusion.1{1}: 512 bytes (cumulative: 8704 bytes)
  Stack trace breakdown for peak usage: 8 704 bytes
    main.0_spmd (100.0%, total: 8 704 bytes, current: 0 bytes, remaining: 8 704 bytes)
"""
LIVE = (("all-gather.7{}", 8192.0), ("fusion.1{1}", 512.0))

TRACED_AFTERWARDS = """
import sys
import jax
from rlhfjax.plan import topology
topology.target("v5e:2x2")
jax.profiler.start_trace(sys.argv[1])
jax.profiler.stop_trace()
"""


def request(stage, program, mesh=None, where="v5e:2x2", slices=1, **changes):
    config = to_dict(tiny.get_config("data=nowhere"))
    config[stage]["mesh"] |= mesh or {}
    config["pretrain"]["model"] |= changes
    return compiler.Request(shapes.subject(config, stage), where, slices, 2, program)


def test_memory_is_what_is_allocated_in_hbm():
    """Parameters 4096 + 512; outputs 2048 and the donated 4096; temporaries 8192; no VMEM."""
    found = compiler._memory(ASSIGNMENT)
    assert found == (4608.0, 8192.0, 6144.0, 4096.0, 4608 + 8192 + 2048)


def test_an_answer_is_read_when_all_of_it_is_written(tmp_path: Path):
    def write(part, text):
        (tmp_path / f"module_0000.jit_f.after_optimizations{part}.txt").write_text(text)

    assert compiler._complete_output(tmp_path) is None
    write("-buffer-assignment", ASSIGNMENT)
    write("-live-range", RANGES)
    write("", "HloModule jit_f\n")
    write("_before_buffer_assignment", "HloModule jit_f\n")
    assert compiler._complete_output(tmp_path) is None
    write("_after_buffer_assignment", "HloMod")
    assert compiler._complete_output(tmp_path) is None
    write("_after_buffer_assignment", "HloModule jit_f\n")
    assert compiler._complete_output(tmp_path) == (
        compiler._memory(ASSIGNMENT),
        "HloModule jit_f\n",
        "",
        LIVE,
    )


def test_what_fails_otherwise_is_one_line():
    with pytest.raises(
        UserError,
        match=r"plan: the TPU compiler on sample of sft: 'sample'|pip install",
    ):
        compiler.compile_program(request("sft", "sample"))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "program"), [("sft", "step"), ("ppo", "update")])
def test_the_answer_is_that_of_a_whole_compilation(stage, program, optimized):
    """Arguments, work and temporaries are final once memory is assigned.

    To temporaries libtpu adds 15.5 KiB of its own, whatever the program.
    """
    wide = {"d_model": 512, "d_ff": 1024, "n_heads": 4}
    asked = request(stage, program, {"data": 1, "fsdp": 4}, scan_layers=True, **wide)
    answer = compiler.compile_program(asked)
    target = topology.target("v5e:2x2")
    layout = programs.layout_for(asked.subject, target)
    (whole,) = (
        p
        for p in programs.step_programs(asked.subject, layout).programs
        if p.name == program
    )
    with topology.quiet():
        done = whole.lower().compile()
    stats = done.memory_analysis()
    assert answer.memory.arguments == stats.argument_size_in_bytes
    assert 0 <= stats.temp_size_in_bytes - answer.memory.temporaries <= 16 * 1024
    ours = module_cost(Module(answer.text))
    theirs = module_cost(Module(done.as_text()))
    assert (ours.flops, ours.sent) == (theirs.flops, theirs.sent) and ours.flops > 0
    assert ours.hbm == pytest.approx(theirs.hbm, rel=1e-6)


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_known_to_the_byte():
    """A layer of 2^32 numbers and its moments do not fit one chip; libtpu reports our sum."""
    asked = request(
        "pretrain",
        "step",
        {"data": 1},
        "v5e:1x1",
        d_model=8192,
        d_ff=65536,
        n_heads=64,
        scan_layers=True,
    )
    answer = compiler.compile_program(asked)
    reported = float(answer.error.partition("temporaries (")[2].partition("G)")[0])
    assert "exceeds available HBM (15.75G)" in answer.error
    assert answer.memory.peak / 2**30 == pytest.approx(reported, abs=0.01)
    measured = compiled.analyze(
        programs.step_programs(
            asked.subject,
            programs.layout_for(asked.subject, topology.target("v5e:1x1")),
        ).programs[0],
        topology.target("v5e:1x1"),
        lambda _: answer,
    )
    assert (
        measured.fits is False
        and max(size for _, size in measured.buffers) >= 4 * 8192 * 65536
    )


@needs_libtpu
def test_a_process_that_has_loaded_libtpu_can_be_traced(tmp_path: Path):
    """Without a TPU libtpu's own profiler ends the process with SIGSEGV."""
    command = [sys.executable, "-c", TRACED_AFTERWARDS, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    assert list(tmp_path.rglob("*.trace.json.gz"))
