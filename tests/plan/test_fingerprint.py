"""A digest changes with what a compiler is given, and with nothing else."""

import base64
import io
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.plan import fingerprint

MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


OTHER_MESH = jax.sharding.Mesh(
    MESH.devices[::-1], MESH.axis_names, axis_types=MESH.axis_types
)


def rows(n=8, dtype=jnp.float32, axes=("x",), mesh=MESH):
    return jax.ShapeDtypeStruct(
        (n, 16), dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )


def work(x):
    """Calls a function of its own twice, so that the module has one."""

    @jax.jit
    def inner(x):
        return jnp.tanh(x) * 2.0

    return {"first": inner(x), "second": inner(x + 1)}


def same_work(y):
    @jax.jit
    def other_inner(y):
        return jnp.tanh(y) * 2.0

    return {"one": other_inner(y), "two": other_inner(y + 1)}


def other_constant(x):
    @jax.jit
    def inner(x):
        return jnp.tanh(x) * 3.0

    return {"first": inner(x), "second": inner(x + 1)}


def digest(function=work, x=None, options=None, facts=None, **how):
    lowered = jax.jit(function, **how).lower(x or rows())
    return fingerprint.digest(
        lowered, options or {"xla_dump_to": ""}, **(facts or {"libtpu": "1"})
    )


def test_names_and_what_was_lowered_before_change_nothing():
    before = digest()
    assert digest(same_work) == before
    jax.clear_caches()
    digest(other_constant)
    assert digest() == before


CHANGES = {
    "constant": {"function": other_constant},
    "operations": {"function": lambda x: {"first": jnp.tanh(x) * 2.0}},
    "shape": {"x": rows(n=16)},
    "dtype": {"x": rows(dtype=jnp.bfloat16)},
    "devices": {"x": rows(mesh=OTHER_MESH)},
    "sharding": {"x": rows(axes=("y",))},
    "more-sharding": {"x": rows(axes=("x", "y"))},
    "donation": {"donate_argnums": 0},
    "out-sharding": {"out_shardings": NamedSharding(MESH, PartitionSpec("x"))},
    "layout": {"in_shardings": Format(Layout((1, 0)), rows().sharding)},
    "option": {"options": {"xla_dump_to": "", "xla_test_all_input_layouts": True}},
    "fact": {"facts": {"libtpu": "2"}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_what_a_compiler_is_given_changes_it(changes):
    assert digest(**changes) != digest()


def test_options_of_the_tests_are_none_of_the_programs():
    """tests/conftest.py turns optimizations off, and XLA_FLAGS there are of the CPU."""
    lowered = jax.jit(work).lower(rows())
    given = fingerprint.received(lowered, {})
    assert given.options["debug"] == {}
    assert given.options["build"]["use_shardy_partitioner"] == "True"
    assert given.devices == [device.id for device in MESH.devices.flat]
    assert given.module == lowered.as_text()
    assert jax.config.read("jax_disable_most_optimizations")


def test_options_by_hand():
    """Only what differs from the defaults counts; where this machine has CUDA does not."""
    defaults = {"xla_level": 3, "xla_gpu_cuda_data_dir": "", "optimization_level": 0}
    plain = types.SimpleNamespace(**defaults, device_assignment=None)
    changed = {
        "xla_level": 0,
        "xla_gpu_cuda_data_dir": "/cuda",
        "device_assignment": object(),
    }
    options = types.SimpleNamespace(**defaults | changed)
    assert fingerprint._differences(options, plain) == {"xla_level": "0"}


MODULE = """module @jit_{0} attributes {{mhlo.num_partitions = 4 : i32}} {{
  sdy.mesh @{1} = <["x"=2, "y"=2]>
  func.func public @main(%arg0: tensor<8xf32> {{sdy.sharding = #sdy.sharding<@{1}, [{{"x"}}]>}}) -> \
(tensor<8xf32> {{jax.result_info = "{2}"}}) {{
    %0 = call @{3}(%arg0) : (tensor<8xf32>) -> tensor<8xf32>
    %1 = call @{4}(%0) : (tensor<8xf32>) -> tensor<8xf32>
    return %1 : tensor<8xf32>
  }}
{5}}}
"""
DOUBLE = """  func.func private @{0}(%arg0: tensor<8xf32>) -> tensor<8xf32> {{
    %0 = stablehlo.add %arg0, %arg0 : tensor<8xf32>
    return %0 : tensor<8xf32>
  }}
"""
SQUARE = DOUBLE.replace("add", "multiply")


def module(name="f", mesh="mesh", result="", first="a", second="b", functions=None):
    functions = functions or DOUBLE.format("a") + SQUARE.format("b")
    return fingerprint.module_digest(
        MODULE.format(name, mesh, result, first, second, functions)
    )


def test_a_module_by_hand():
    """Its digest depends on which function is called when, not on names, order or copies."""
    expected = module()
    assert module("g", mesh="mesh_0", result="[0].params") == expected
    square = '"b<lambda>"'
    reordered = SQUARE.format(square) + DOUBLE.format("a_1")
    assert module(first="a_1", second=square, functions=reordered) == expected
    assert module(first="b", second="a") != expected
    twice = module(second="a")
    assert twice != expected
    assert (
        module(second="c", functions=DOUBLE.format("a") + DOUBLE.format("c")) == twice
    )
    wide = SQUARE.format("b").replace("f32", "f64")
    assert module(functions=DOUBLE.format("a") + wide) != expected


def kernel(constant: int, file: str) -> str:
    """Returns a module's text with a Pallas kernel whose operation stands in a line of a file."""
    with mlir.make_ir_context(), ir.Location.file(file, 7, 1):
        number = f'arith.constant {constant} : i32 loc("{file}":7:1)'
        module = ir.Module.parse(f"module {{ %0 = {number} }}")
        bytecode = io.BytesIO()
        module.operation.write_bytecode(bytecode)
    body = base64.b64encode(bytecode.getvalue()).decode()
    config = f"{{\\22body\\22: \\22{body}\\22}}"
    call = (
        f'    stablehlo.custom_call @tpu_custom_call() {{backend_config = "{config}"}}'
    )
    return f"module @jit_f {{\n  func.func public @main() {{\n{call}\n  }}\n}}\n"


def test_the_file_of_a_kernel_is_no_part_of_it_and_its_operations_are():
    here, there = kernel(3, "here.py"), kernel(3, "elsewhere/there.py")
    assert here != there
    assert fingerprint.module_digest(here) == fingerprint.module_digest(there)
    assert fingerprint.module_digest(here) != fingerprint.module_digest(
        kernel(4, "here.py")
    )
