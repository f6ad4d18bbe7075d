"""Reading compiled programs: FLOPs against XLA's own count where that can count, and loops, which it counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax import hlo


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_flops_of_a_product_are_those_of_xla():
    program = compiled(lambda x, y, z: jnp.tanh(x @ y) @ z, (64, 96), (96, 160), (160, 32))
    assert hlo.parse(program.as_text()).flops == 2 * 64 * 160 * (96 + 32)
    # XLA also counts a few for tanh.
    assert hlo.parse(program.as_text()).flops == pytest.approx(program.cost_analysis()["flops"], rel=0.02)


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize(("stride", "spread", "dilate"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_flops_of_a_convolution_are_those_of_xla(padding, stride, spread, dilate):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            (padding, padding),
            lhs_dilation=(spread, spread),
            rhs_dilation=(dilate, dilate),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    program = compiled(convolve, (2, 13, 12, 8), (3, 3, 8, 16))
    found = hlo.parse(program.as_text()).flops
    assert found > 0
    assert found == pytest.approx(program.cost_analysis()["flops"], rel=1e-6)


def test_a_loop_counts_as_often_as_it_turns():
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    one, many = (hlo.parse(compiled(function, (8, 32), (n, 32, 32)).as_text()).flops for n in (3, 30))
    assert one == 3 * 2 * 8 * 32 * 32
    assert many == 10 * one


def test_a_loop_that_ends_by_its_data_counts_its_bound():
    def function(x, w):
        def more(carry):
            return (carry[0] < 7) & (carry[1].sum() > 0)

        return jax.lax.while_loop(more, lambda carry: (carry[0] + 1, carry[1] @ w), (jnp.zeros((), jnp.int32), x))[1]

    assert hlo.parse(compiled(function, (8, 32), (32, 32)).as_text()).flops == 7 * 2 * 8 * 32 * 32


UNROLLED = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0:T(256)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (s32[], f32[4]{0:T(256)}) tuple(%next, %x)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0:T(256)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %end = s32[]{:T(128)} constant(30)
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0:T(256)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], f32[4]{0:T(256)}) tuple(%zero, %a)
  %loop = (s32[], f32[4]{0:T(256)}) while(%start), condition=%condition, body=%body
  %kernel.1 = (f32[2,4]{1,0}, f32[2,4]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="first line
second line" source_line=3}
  ROOT %b = f32[4]{0:T(256)} get-tuple-element(%loop), index=1
}
"""


def test_trip_count_of_an_unrolled_loop():
    module = hlo.parse(UNROLLED)
    assert module.entry == "main"
    main = module.computations["main"]
    assert module.trips(main, main.instructions["loop"]) == 15


def test_trip_count_of_a_loop_whose_first_turn_was_taken_out():
    module = hlo.parse(UNROLLED.replace("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(2)"))
    main = module.computations["main"]
    assert module.trips(main, main.instructions["loop"]) == 14


def test_metadata_with_a_line_break_stays_with_its_instruction():
    call = hlo.parse(UNROLLED).computations["main"].instructions["kernel.1"]
    assert call.operands == ("a",)
    assert call.attribute(r'op_name="([^"]*)"') == "first line\nsecond line"
    assert hlo.arrays(call.shape) == [("f32", (2, 4)), ("f32", (2, 4))]
    assert hlo.size(call.shape) == 64


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={}, dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups(attributes, expected):
    line = f"  %c = f32[8]{{0}} all-gather(%x), channel_id=1, {attributes}"
    text = f"ENTRY %main (x: f32[1]) -> f32[8] {{\n  %x = f32[1]{{0}} parameter(0)\n{line}\n}}\n"
    collective = hlo.parse(text).computations["main"].instructions["c"]
    assert collective.collective == "all-gather"
    np.testing.assert_array_equal(hlo.groups(collective, 8), expected)
