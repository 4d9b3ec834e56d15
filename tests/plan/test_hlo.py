"""Accounts of compiled programs against counts by hand, and against XLA's where nothing loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdyn.plan.hlo import cost_of


def compiled(function, *shapes):
    return jax.jit(function).lower(*shapes).compile()


def floats(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))


def test_a_scans_body_counts_as_often_as_it_runs():
    scan = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
    program = compiled(scan, floats(16, 32), floats(7, 32, 32))
    assert cost_of(program.as_text()).flops == 7 * 2 * 16 * 32 * 32
    # XLA's own account has the body once.
    assert program.cost_analysis()["flops"] < 2 * 2 * 16 * 32 * 32


def test_nested_scans_and_both_directions_multiply():
    inner = lambda x, w: (jnp.tanh(x @ w), None)
    outer = lambda x, ws: (jax.lax.scan(inner, x, ws, reverse=True)[0], None)
    nested = lambda x, ws: jax.lax.scan(outer, x, ws)[0].sum()
    forward = 3 * 5 * 2 * 16 * 32 * 32
    shapes = floats(16, 32), floats(3, 5, 32, 32)
    assert cost_of(compiled(nested, *shapes).as_text()).flops == forward
    gradient = jax.grad(nested, argnums=(0, 1))
    assert cost_of(compiled(gradient, *shapes).as_text()).flops == 3 * forward


def test_without_loops_it_agrees_with_xla():
    product = compiled(jnp.dot, floats(24, 40), floats(40, 56))
    cost, xla = cost_of(product.as_text()), product.cost_analysis()
    assert cost.flops == xla["flops"] == 2 * 24 * 40 * 56
    assert cost.bytes == xla["bytes accessed"] == 4 * (24 * 40 + 40 * 56 + 24 * 56)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": [(2, 1), (0, 3)]},
        {"window_strides": (2, 3), "padding": "SAME"},
        {"padding": [(4, 4), (4, 4)], "lhs_dilation": (3, 2), "rhs_dilation": (2, 1)},
    ],
)
def test_convolutions_multiply_no_zeros_of_padding_or_dilation(options):
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x, k, **({"window_strides": (1, 1)} | options)
    )
    x, k = floats(2, 3, 9, 11), floats(5, 3, 4, 3)
    # Products of ones count the places at which the kernel meets the input.
    ones = jax.tree.map(lambda s: jnp.ones(s.shape), (x, k))
    products = float(convolve(*ones).sum())
    assert cost_of(compiled(convolve, x, k).as_text()).flops == 2 * products


def test_a_loop_that_ends_by_what_it_computes_runs_as_often_as_is_said():
    def until_large(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ x, x)

    text = compiled(until_large, floats(16, 16)).as_text()
    assert cost_of(text).flops == 2 * 16**3
    assert cost_of(text, trips=9).flops == 9 * 2 * 16**3


def test_a_conditional_is_one_of_its_branches():
    choose = lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)
    text = compiled(choose, jax.ShapeDtypeStruct((), bool), floats(16, 16)).as_text()
    assert cost_of(text).flops == 2 * 2 * 16**3
    assert cost_of(text, branch=min).flops == 2 * 16**3


def test_collectives_of_a_divided_product():
    row = Mesh(np.array(jax.devices()[:4]), "b")
    of = lambda *axes: NamedSharding(row, P(*axes))
    product = jax.jit(jnp.dot, out_shardings=of())
    # The contracted axis is divided: a product of parts, then a sum of what all have.
    shapes = floats(16, 32, sharding=of(None, "b")), floats(32, 24, sharding=of("b"))
    cost = cost_of(product.lower(*shapes).compile().as_text())
    assert cost.flops == 2 * 16 * (32 // 4) * 24
    assert cost.moved == {("all-reduce", 4): 16 * 24 * 4}
    assert cost.sent == {("all-reduce", 4): 2 * 3 / 4 * 16 * 24 * 4}


@pytest.mark.parametrize(
    "kind, collective, whole, share",
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "b", tiled=True), 4 * 64, 3 / 4),
        ("all-reduce", lambda x: jax.lax.psum(x, "b"), 64, 2 * 3 / 4),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True),
            64,
            3 / 4,
        ),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "b", 1, 0, tiled=True), 64, 3 / 4),
    ],
)
def test_each_kind_among_four_of_eight_devices(mesh, kind, collective, whole, share):
    """Of 64 numbers a device, five times over in a scan."""

    def five(x):
        turn = lambda total, _: (total + collective(x * total[:1, :1]).sum(), None)
        return jax.lax.scan(turn, x, length=5)[0]

    spec = P("a", "b")
    divided = jax.jit(jax.shard_map(five, mesh=mesh, in_specs=spec, out_specs=spec))
    shape = floats(2 * 4, 4 * 16, sharding=NamedSharding(mesh, spec))
    cost = cost_of(divided.lower(shape).compile().as_text())
    assert cost.moved == {(kind, 4): 5 * 4 * whole}
    assert cost.sent == {(kind, 4): share * 5 * 4 * whole}


def test_a_permutation_sends_all_of_it(mesh):
    ring = [(i, (i + 1) % 4) for i in range(4)]
    shift = lambda x: jax.lax.ppermute(x, "b", ring)
    spec = P("a", "b")
    divided = jax.jit(jax.shard_map(shift, mesh=mesh, in_specs=spec, out_specs=spec))
    shape = floats(2 * 4, 4 * 16, sharding=NamedSharding(mesh, spec))
    cost = cost_of(divided.lower(shape).compile().as_text())
    assert list(cost.sent.values()) == [64 * 4]


# What the compiler for TPUs writes: matrix products as convolutions, loops without their counts,
# arrays in the chip's own memory, groups as axes of a mesh, a collective over several fusions, a
# weight in tiles of another size (for v7x) within the fusion that takes a layer of it.
# ruff: noqa: E501
TPU = """HloModule step, is_scheduled=true, num_partitions=8

%product (a: bf16[16,64], b: bf16[64,64]) -> bf16[16,64] {
  %a = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[16,64]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%retiled (all.1: bf16[4,8,64]) -> bf16[4,8,64] {
  %all.1 = bf16[4,8,64]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copied = bf16[4,8,64]{2,1,0:T(8,128)(2,1)} copy(%all.1)
}

%layer_of (all: bf16[4,8,64], i: s32[]) -> bf16[8,64] {
  %i = s32[]{:T(128)S(6)} parameter(1)
  %all = bf16[4,8,64]{2,1,0:T(16,128)(2,1)} parameter(0)
  %tiled = bf16[4,8,64]{2,1,0:T(8,128)(2,1)} fusion(%all), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled
  %zero = s32[] constant(0)
  %slice = bf16[1,8,64]{2,1,0} dynamic-slice(%tiled, %i, %zero, %zero), dynamic_slice_sizes={1,8,64}
  ROOT %flat = bf16[8,64]{1,0} bitcast(%slice)
}

%begin (part: bf16[8,64]) -> bf16[64,64] {
  %part = bf16[8,64]{1,0} parameter(0)
  ROOT %g1 = bf16[64,64]{1,0} all-gather(%part), channel_id=3, replica_groups=mesh['x'=8,'y'=1] {'x'}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%end (part.1: bf16[8,64]) -> bf16[64,64] {
  %part.1 = bf16[8,64]{1,0} parameter(0)
  ROOT %g2 = bf16[64,64]{1,0:S(1)} all-gather(%part.1), channel_id=3, replica_groups=mesh['x'=8,'y'=1] {'x'}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%body (state: (s32[], bf16[16,64], bf16[4,8,64], s32[])) -> (s32[], bf16[16,64], bf16[4,8,64], s32[]) {
  %state = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[4,8,64]{2,1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%state), index=1
  %ws = bf16[4,8,64]{2,1,0} get-tuple-element(%state), index=2
  %one = s32[] get-tuple-element(%state), index=3
  %next = s32[] add(%i.1, %one)
  %w = bf16[8,64]{1,0} fusion(%ws, %i.1), kind=kLoop, calls=%layer_of
  %begun = bf16[64,64]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%begin
  %whole = bf16[64,64]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%end
  %y = bf16[16,64]{1,0} fusion(%x, %whole), kind=kOutput, calls=%product
  ROOT %new = (s32[], bf16[16,64]{1,0}, bf16[4,8,64]{2,1,0}, s32[]) tuple(%next, %y, %ws, %one)
}

%condition (state.1: (s32[], bf16[16,64], bf16[4,8,64], s32[])) -> pred[] {
  %state.1 = (s32[], bf16[16,64]{1,0}, bf16[4,8,64]{2,1,0}, s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%i.2, %limit), direction=LT
}

%sum (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %add = f32[] add(%p, %q)
}

ENTRY %main (x.1: bf16[16,64], ws.1: bf16[4,8,64], old: f32[100,16], row: f32[1,16]) -> f32[100,16] {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %ws.1 = bf16[4,8,64]{2,1,0} parameter(1)
  %old = f32[100,16]{1,0} parameter(2)
  %row = f32[1,16]{1,0} parameter(3)
  %zero.1 = s32[] constant(0)
  %one.1 = s32[] constant(1)
  %start = (s32[], bf16[16,64]{1,0}, bf16[4,8,64]{2,1,0}, s32[]) tuple(%zero.1, %x.1, %ws.1, %one.1)
  %loop = (s32[], bf16[16,64]{1,0}, bf16[4,8,64]{2,1,0}, s32[]) while(%start), condition=%condition, body=%body
  %started = (f32[1,16]{1,0}, f32[1,16]{1,0}, u32[]) collective-permute-start(%row), source_target_pairs={{0,1},{1,0}}
  %done = f32[1,16]{1,0} collective-permute-done(%started)
  %total = f32[1,16]{1,0} all-reduce(%done), replica_groups=[4,2]<=[8], to_apply=%sum
  ROOT %updated = f32[100,16]{1,0} dynamic-update-slice(%old, %total, %zero.1, %zero.1)
}
"""


def test_a_program_for_tpus():
    cost = cost_of(TPU)
    turns = 4
    assert cost.flops == turns * 2 * 16 * 64 * 64
    assert cost.moved == {
        ("all-gather", 8): turns * 64 * 64 * 2,
        ("collective-permute", 2): 16 * 4,
        ("all-reduce", 2): 16 * 4,
    }
    assert cost.sent == {
        ("all-gather", 8): turns * 7 / 8 * 64 * 64 * 2,
        ("collective-permute", 2): 16 * 4,
        ("all-reduce", 2): 2 * 1 / 2 * 16 * 4,
    }
    # A turn: a layer's slice is read and written, twice read to be gathered into the chip's own
    # memory, whence it is free; x and y.  The scalars: the index, three for its sum, two to compare
    # and a truth value.  Then the permutation and the sum read and write a row, and the update
    # reads and writes one in place.
    layer, x, row = 8 * 64 * 2, 16 * 64 * 2, 16 * 4
    scalars = 4 + 3 * 4 + (2 * 4 + 1)
    assert cost.bytes == turns * (4 * layer + 2 * x + scalars) + 6 * row


def test_products_of_cublas_and_calls_that_are_not_known():
    text = """HloModule gpu

ENTRY %main (a: bf16[4,16,32], b: bf16[4,32,8]) -> bf16[4,16,8] {
  %a = bf16[4,16,32]{2,1,0} parameter(0)
  %b = bf16[4,32,8]{2,1,0} parameter(1)
  %c = (bf16[4,16,8]{2,1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}}
  %d = bf16[4,16,8]{2,1,0} get-tuple-element(%c), index=0
  ROOT %e = bf16[4,16,8]{2,1,0} custom-call(%d), custom_call_target="__cudnn$norm"
}
"""
    cost = cost_of(text)
    assert cost.flops == 2 * 4 * 16 * 8 * 32
    assert cost.uncounted == {"__cudnn$norm": 1}
    a, b, c = 2 * 4 * 16 * 32, 2 * 4 * 32 * 8, 2 * 4 * 16 * 8
    assert cost.bytes == a + b + c + 2 * c  # and nothing of the workspace


def test_a_weight_that_a_fusion_looks_at_through_another_is_read():
    """As the compiler for TPUs writes the logits' product: W through a fusion that moves nothing."""
    text = """HloModule logits

%view (w: bf16[128,32]) -> bf16[128,32] {
  %w = bf16[128,32]{1,0} parameter(0)
  ROOT %same = bf16[128,32]{1,0} bitcast(%w)
}

%product (x: bf16[16,32], w.1: bf16[128,32]) -> f32[16,128] {
  %x = bf16[16,32]{1,0} parameter(0)
  %w.1 = bf16[128,32]{1,0} parameter(1)
  %seen = bf16[128,32]{1,0} fusion(%w.1), kind=kLoop, calls=%view
  ROOT %f = f32[16,128]{1,0} convolution(%x, %seen), dim_labels=bf_oi->bf
}

ENTRY %main (phi: bf16[16,32], weight: bf16[128,32]) -> f32[16,128] {
  %phi = bf16[16,32]{1,0} parameter(0)
  %weight = bf16[128,32]{1,0} parameter(1)
  ROOT %logits = f32[16,128]{1,0} fusion(%phi, %weight), kind=kOutput, calls=%product
}
"""
    assert cost_of(text).bytes == 2 * 16 * 32 + 2 * 128 * 32 + 4 * 16 * 128


def test_attention_of_cudnn():
    """Of 3 rows, 4 heads of 16 and 32 slots: two products of the weights' size, and back five."""
    text = """HloModule gpu

ENTRY %main (q: bf16[3,32,4,16], k: bf16[3,32,4,16], v: bf16[3,32,4,16]) -> bf16[3,32,4,16] {
  %q = bf16[3,32,4,16]{3,2,1,0} parameter(0)
  %k = bf16[3,32,4,16]{3,2,1,0} parameter(1)
  %v = bf16[3,32,4,16]{3,2,1,0} parameter(2)
  %a = (bf16[3,4,32,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["3", "4", "32", "32"]}, "bmm1_dot_dimension_numbers": {"lhs_contracting_dimensions": ["3"]}}}
  %b = (bf16[3,4,32,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["3", "4", "32", "32"]}}}
  ROOT %c = bf16[3,4,32,16]{3,1,2,0} get-tuple-element(%b), index=0
}
"""
    cost = cost_of(text)
    assert cost.flops == (2 + 5) * 2 * 3 * 4 * 32 * 32 * 16
    assert not cost.uncounted


@pytest.mark.parametrize(
    "groups, sent, across",
    [
        ("all-gather(%a), replica_groups=[2,8]<=[16], dimensions={0}", 7 / 8, 0),
        ("all-gather(%a), replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", 7 / 8, 0),
        # Every eighth: two devices on two hosts, each of which takes the other's half.
        ("all-gather(%a), replica_groups=[8,2]<=[2,8]T(1,0), dimensions={0}", 1 / 2, 1 / 2),
        # Sixteen on two: a host takes in half, through eight devices.
        ("all-gather(%a), replica_groups={}, dimensions={0}", 15 / 16, 1 / 16),
        ("all-reduce(%a), replica_groups=[1,16]<=[16], to_apply=%s", 2 * 15 / 16, 2 / 16),
        ("all-to-all(%a), replica_groups=[1,16]<=[16]", 15 / 16, 1 / 2),
        ("collective-permute(%a), source_target_pairs={{0,1},{1,0}}", 1, 0),
        ("collective-permute(%a), source_target_pairs={{0,1},{7,8}}", 1, 1),
    ],
)
def test_what_leaves_a_host_of_eight(groups, sent, across):
    text = f"""HloModule gpu, num_partitions=16

ENTRY %main (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %b = f32[64]{{0}} {groups}
}}
"""
    cost = cost_of(text, hosts=2)
    assert cost.collective_bytes == sent * 4 * 64 and cost.across == across * 4 * 64
    assert cost_of(text).across == 0
