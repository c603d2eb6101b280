"""Reading programs: by hand where the text is ours, against known counts where XLA wrote it."""

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.models import size
from rlhfjax.models.presets import preset
from rlhfjax.models.transformer import Model
from rlhfjax.plan import hlo
from rlhfjax.plan.hlo import Module, group_size
from rlhfjax.plan.hlo_cost import module_cost, sent_bytes

# A loop of 10 iterations, each with a product of one slice of stacked weights and an all-reduce of
# its result. Then an all-gather over 4 devices in two parts of one channel, and a send to another
# slice.
TEXT = """
HloModule jit_f, is_scheduled=true

%sliced (p0: f32[10,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[10,8,8]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8]{1,0} bitcast(%cut)
}

%body (arg: (s32[], f32[4,8], f32[10,8,8])) -> (s32[], f32[4,8], f32[10,8,8]) {
  %arg = (s32[]{:T(128)}, f32[4,8]{1,0}, /*index=2*/f32[10,8,8]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[10,8,8]{2,1,0} get-tuple-element(%arg), index=2
  %layer = f32[8,8]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%sliced
  %y = f32[4,8]{1,0} dot(%x, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[4,8]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[4,8], f32[10,8,8]) tuple(%next, %sum, %w)
}

%condition (arg.1: (s32[], f32[4,8], f32[10,8,8])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}, f32[10,8,8]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %ten = s32[]{:T(128)} constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (a: (s32[], f32[4,8], f32[10,8,8])) -> f32[16,8] {
  %a = (s32[], f32[4,8]{1,0}, f32[10,8,8]{2,1,0}) parameter(0)
  %loop = (s32[], f32[4,8]{1,0}, f32[10,8,8]{2,1,0}) while(%a), condition=%condition, body=%body
  %r = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %whole = bf16[16,8]{1,0} all-gather(%r), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %again = bf16[16,8]{1,0} all-gather(%r), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %far = (f32[4,8]{1,0}, u32[], token[]) send(%r, %t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %q = f32[16,8]{1,0} convert(%whole), metadata={op_name="jit(f)/wide"}
}
"""


def test_buffers_that_live_at_once():
    """The listed element of a tuple counts, nothing on the chip does, and equal ones add up."""
    live = (
        ("loop{2}", 2560.0),
        ("q{}", 512.0),
        ("whole{}", 256.0),
        ("again{}", 256.0),
        ("layer{}", 256.0),
    )
    assert Module(TEXT).buffers(live) == [
        ("f32[10,8,8] loop", 2560.0),
        ("f32[16,8] jit(f)/wide", 512.0),
        ("bf16[16,8] whole", 256.0),
        ("bf16[16,8] again", 256.0),
    ]
    twice = (("q{}", 512.0), ("q{}", 512.0), ("unknown{}", 9.0))
    assert Module(TEXT).buffers(twice) == [("f32[16,8] jit(f)/wide", 1024.0)]


def test_a_program_by_hand():
    cost = module_cost(Module(TEXT))
    assert cost.flops == 10 * 2 * 4 * 8 * 8
    # An iteration: the slice of 256 bytes is read onto the chip (its index does not count), x read
    # and y written, y read and sum written, the counter. Then the gather (128 + 256) twice and the
    # conversion (256 + 512).
    a_round = 256 + (128 + 128) + (128 + 128) + 3 * 4
    assert cost.hbm == 10 * a_round + 2 * (128 + 256) + 256 + 512
    assert dict(cost.sent) == {
        ("all-reduce", "ici"): 10 * 128 * 2 * 3 / 4,
        ("all-gather", "ici"): 128 * 3,  # once: one channel
        ("all-reduce", "dcn"): 128,
    }
    assert (cost.link("ici"), cost.link("dcn"), cost.unknown_loops) == (
        10 * 192 + 384,
        128,
        0,
    )


def test_what_is_asynchronous_is_counted_where_it_begins():
    """A slice of 1024 bytes out of 4096 is read once, not at its start and at its end."""
    text = """
%sliced (p: f32[4,256]) -> f32[1,256] {
  %p = f32[4,256]{1,0} parameter(0)
  ROOT %cut = f32[1,256]{1,0:T(1,128)S(1)} slice(%p), slice={[0:1], [0:256]}
}

ENTRY %main (a: f32[4,256]) -> f32[1,256] {
  %a = f32[4,256]{1,0} parameter(0)
  %began = ((f32[4,256]{1,0}), f32[1,256]{1,0:S(1)}, u32[]) async-start(%a), calls=%sliced
  ROOT %done = f32[1,256]{1,0:T(1,128)S(1)} async-done(%began), calls=%sliced
}
"""
    assert module_cost(Module(text)).hbm == 1024


def test_buffers_by_size_with_what_they_are():
    largest = Module(TEXT).buffers(most=2)
    assert largest == [("f32[10,8,8] a", 2560), ("f32[16,8] jit(f)/wide", 512)]


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", 2),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}",
            4,
        ),
        ("channel_id=3", 1),
    ],
)
def test_group_sizes(attributes, size):
    assert group_size(attributes) == size


def test_bytes_on_a_ring():
    # 4 devices, 100 bytes each put in
    assert sent_bytes("all-gather", 100, 4) == 300
    assert sent_bytes("reduce-scatter", 100, 4) == 75
    assert sent_bytes("all-reduce", 100, 4) == 150
    assert sent_bytes("all-to-all", 100, 4) == 75
    assert sent_bytes("collective-permute", 100, 1) == 100
    assert sent_bytes("all-reduce", 100, 1) == 0


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[4,6]{1,0} convolution(%l, %r), dim_labels=bf_io->bf", 2 * 4 * 6 * 8),
        # XLA for TPUs: 3 products [4, 8] x [8, 6]; the dilated window keeps them apart.
        ("f32[3,4,6]{2,1,0} convolution(%L, %R), window={size=3 stride=2 lhs_dilate=3}, "
         "dim_labels=0bf_0io->0bf",
         2 * 3 * 4 * 6 * 8),
        # A 3-tap convolution over 5 places, padded by one: 15 pairs, 2 of which meet padding.
        ("f32[1,5,1]{2,1,0} convolution(%s, %k), window={size=3 pad=1_1}, "
         "dim_labels=b0f_0io->b0f", 2 * 13),
    ],
)  # fmt: skip
def test_products_as_convolutions(line, flops):
    text = f"""
ENTRY %main (l: f32[4,8]) -> f32[4,6] {{
  %l = f32[4,8]{{1,0}} parameter(0)
  %r = f32[8,6]{{1,0}} parameter(1)
  %L = f32[3,4,8]{{2,1,0}} parameter(2)
  %R = f32[3,8,6]{{2,1,0}} parameter(3)
  %s = f32[1,5,1]{{2,1,0}} parameter(4)
  %k = f32[3,1,1]{{2,1,0}} parameter(5)
  ROOT %o = {line}
}}
"""
    assert module_cost(Module(text)).flops == flops


@pytest.mark.parametrize("scan", [True, False])
def test_a_real_models_products_are_those_of_the_formula(scan):
    """A forward pass is 2 N + 4 L H Q T per token, N the parameters of matrix products."""
    c = preset(
        "tiny",
        n_layers=3,
        d_model=64,
        n_heads=2,
        d_ff=96,
        vocab_size=256,
        scan_layers=scan,
    )
    model, tokens = Model(c), jnp.zeros((2, 32), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def forward(params, tokens):
        return model.logits(params, model.hidden(params, tokens)).sum()

    text = jax.jit(forward).lower(params, tokens).compile().as_text()
    cost = module_cost(Module(text))
    multiplied = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 256
    assert cost.flops == 2 * 32 * size.token_flops(multiplied, c, 32) / 3
    assert cost.unknown_loops == 0 and cost.hbm > 4 * multiplied


def test_numbers_have_their_sizes():
    assert hlo.Array("bf16", (3, 4)).size == 24 and hlo.Array("s4", (4,)).size == 2
    assert hlo.Array("f8e4m3fn", (4,)).size == 4 and hlo.Array("token", ()).size == 0
