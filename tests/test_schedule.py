"""Reading a schedule: what is waited for, what is hidden, and how long collectives take on which links."""

import pytest

from rad_jax import schedule
from rad_jax.chips import CHIPS

CHIP = CHIPS["v5e"]
MILLISECOND = int(CHIP.clock / 1000)  # cycles
SIXTEEN = schedule.Network(CHIP, {"data": 1, "fsdp": 16, "tensor": 1})


def cycles(milliseconds):
    return f'backend_config={{"estimated_cycles":"{milliseconds * MILLISECOND}"}}'


def read(body, computations="", network=SIXTEEN):
    return schedule.read(
        f"{computations}\nENTRY %main (a: f32[64]) -> f32[64] {{\n  %a = f32[64]{{0}} parameter(0)\n{body}\n}}\n",
        network,
    )


WORK = """%work (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %t = f32[64]{0} tanh(%p)
}

%product (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
SIZE = 4 * 45_000_000  # bytes that 16 chips gather over one link in 4 ms, less a sixteenth and 16 hops
GATHER = "replica_groups=[1,16]<=[16], dimensions={0}"
SECONDS = SIZE * 15 / 16 / CHIP.ici + 16 * schedule.HOP


def test_operations_follow_each_other():
    found = read(
        f"  %one = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%work, {cycles(2)}\n"
        f"  %m = f32[8,8]{{1,0}} parameter(1)\n"
        f"  %two = f32[8,8]{{1,0}} fusion(%m), kind=kOutput, calls=%product, {cycles(3)}\n"
        f"  ROOT %three = f32[64]{{0}} copy(%one), {cycles(1)}",
        WORK,
    )
    assert (found.matmul, found.other, found.seconds) == (pytest.approx(3e-3), pytest.approx(3e-3), pytest.approx(6e-3))
    assert found.flops == 2 * 8**3


def test_a_collective_of_one_piece_is_waited_for():
    found = read(f"  ROOT %g = f32[{SIZE // 4}]{{0}} all-gather(%a), {GATHER}")
    assert found.exposed == found.seconds == found.transfers == pytest.approx(SECONDS)
    assert found.collectives["all-gather", "fsdp", "bytes"] == SIZE


@pytest.mark.parametrize("beside", [1, 9])
def test_an_asynchronous_collective_hides_behind_work(beside):
    found = read(
        f"  %s = (f32[64]{{0}}, f32[{SIZE // 4}]{{0}}) all-gather-start(%a), {GATHER}\n"
        f"  %one = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%work, {cycles(beside)}\n"
        f"  %g = f32[{SIZE // 4}]{{0}} all-gather-done(%s)\n"
        f"  ROOT %b = f32[64]{{0}} copy(%one)",
        WORK,
    )
    assert found.exposed == pytest.approx(max(0.0, SECONDS - beside * 1e-3))
    assert found.seconds == pytest.approx(max(SECONDS, beside * 1e-3))


def test_collectives_wait_for_each_others_links():
    starts = "".join(
        f"  %s{i} = (f32[64]{{0}}, f32[{SIZE // 4}]{{0}}) all-gather-start(%a), {GATHER}\n" for i in range(3)
    )
    ends = "".join(f"  %g{i} = f32[{SIZE // 4}]{{0}} all-gather-done(%s{i})\n" for i in range(3))
    assert read(starts + ends + "  ROOT %b = f32[64]{0} copy(%a)").seconds == pytest.approx(3 * SECONDS)


CARRIED = f"""%begin (p: f32[64]) -> (f32[64], f32[{SIZE // 4}]) {{
  %p = f32[64]{{0}} parameter(0)
  %g = f32[{SIZE // 4}]{{0}} all-gather(%p), {GATHER}, frontend_attributes={{chain_id="5"}}
  ROOT %c = (f32[64]{{0}}, f32[{SIZE // 4}]{{0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%carry (p: f32[64]) -> f32[64] {{
  %p = f32[64]{{0}} parameter(0)
  %g = f32[{SIZE // 4}]{{0}} all-gather(%p), {GATHER}, frontend_attributes={{chain_id="5"}}
  ROOT %t = f32[64]{{0}} tanh(%p)
}}

%end (p: f32[64]) -> f32[{SIZE // 4}] {{
  %p = f32[64]{{0}} parameter(0)
  %g = f32[{SIZE // 4}]{{0}} all-gather(%p), {GATHER}, frontend_attributes={{chain_id="5"}}
  ROOT %c = f32[{SIZE // 4}]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_carried_collective_gets_on_in_its_own_fusions_only():
    found = read(
        "  %s = (f32[64]{0}, f32[64]{0}) fusion(%a), kind=kCustom, calls=%begin\n"
        f"  %one = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%carry, {cycles(1)}\n"
        f"  %two = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%work, {cycles(2)}\n"
        "  ROOT %g = f32[64]{0} fusion(%s), kind=kCustom, calls=%end",
        WORK + CARRIED,
    )
    assert found.other == pytest.approx(3e-3)
    assert found.exposed == pytest.approx(SECONDS - 1e-3)
    assert found.collectives["all-gather", "fsdp", "number"] == 1


LOOP = f"""{WORK}
%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {{
  %p = (s32[], f32[64]{{0}}) parameter(0)
  %x = f32[64]{{0}} get-tuple-element(%p), index=1
  %w = f32[64]{{0}} fusion(%x), kind=kLoop, calls=%work, {cycles(2)}
  %g = f32[{SIZE // 4}]{{0}} all-gather(%w), {GATHER}
  ROOT %o = (s32[], f32[64]{{0}}) tuple(%x, %w)
}}

%condition (p: (s32[], f32[64])) -> pred[] {{
  %p = (s32[], f32[64]{{0}}) parameter(0)
  ROOT %n = pred[] constant(true)
}}
"""


def test_a_loop_takes_its_turns():
    loop = '%l = (s32[], f32[64]{0}) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}'
    found = read(f"  {loop}\n  ROOT %b = f32[64]{{0}} copy(%a)", LOOP)
    assert found.seconds == pytest.approx(8 * (2e-3 + SECONDS))
    assert found.collectives["all-gather", "fsdp", "bytes"] == 8 * SIZE


def kernel(name, length, heads=32, width=128, where="llm"):
    return (
        f"  %{name}.7 = (bf16[2,{heads},{length},{width}]{{3,2,1,0}}, f32[2,{heads},{length}]{{2,1,0}}) custom-call(%a), "
        f'custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/{where}/layers"}}\n'
    )


def test_kernels_of_splash_attention():
    """Instruction bundles per head of the compiled kernels on v5e, 1,792 tokens in blocks of 896: 15,741 forward, 14,570 and 19,014 back."""
    names = ("splash_mha_fwd_residuals", "splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals")
    found = read("".join(kernel(name, 1792) for name in names) + "  ROOT %b = f32[64]{0} copy(%a)")
    assert found.kernels == pytest.approx(64 * (15_741 + 14_570 + 19_014) / CHIP.clock, rel=0.02)
    assert found.flops == 64 * 2 * (2 + 3 + 4) * 3 * 896 * 896 * 128
    assert not found.unknown


def test_encoders_attend_to_everything_with_narrow_heads():
    decoder, tower = (
        read(kernel("splash_mha_fwd_residuals", 1792, 32, width, where) + "  ROOT %b = f32[64]{0} copy(%a)")
        for width, where in ((128, "llm"), (64, "vision"))
    )
    assert tower.flops == decoder.flops / 2 * 4 / 3
    assert tower.kernels == pytest.approx(decoder.kernels * 4 / 3)


def test_an_unknown_kernel_is_named():
    assert read(kernel("my_kernel", 128) + "  ROOT %b = f32[64]{0} copy(%a)").unknown == {"my_kernel"}


def torus(x, y, wrap, slices=1):
    places = [(s, (i, j, 0)) for s in range(slices) for i in range(x) for j in range(y)]
    return schedule.Network(CHIP, {"data": slices, "fsdp": x * y, "tensor": 1}, places, (wrap, wrap, False))


def test_links_that_a_group_spans():
    """Along both axes of a grid two links bring data in, on a torus four."""
    everyone, row = list(range(16)), list(range(4))
    grid, ring = torus(4, 4, False), torus(4, 4, True)
    gathered = 45_000_000 * 15 / 16 / 4.5e10
    assert grid.seconds("all-gather", 45_000_000, [everyone]) == pytest.approx(gathered / 2 + 6e-6)
    assert ring.seconds("all-gather", 45_000_000, [everyone]) == pytest.approx(gathered / 4 + 4e-6)
    assert grid.seconds("all-gather", 45_000_000, [row]) == pytest.approx(45_000_000 * 3 / 4 / 4.5e10 + 3e-6)
    whole, half = (grid.seconds(kind, 45_000_000, [everyone]) for kind in ("all-reduce", "reduce-scatter"))
    assert whole == pytest.approx(2 * half)
    assert grid.seconds("all-gather", 45_000_000, [[3]]) == 0


def test_between_slices_goes_what_is_left_within_them():
    two = torus(4, 4, False, slices=2)
    inside = two.seconds("all-reduce", 1e8, [list(range(16))])
    both = two.seconds("all-reduce", 1e8, [list(range(32))])
    assert both - inside == pytest.approx(2 * (1e8 / 16) / 2 / CHIP.dcn)
    assert two.seconds("all-reduce", 1e8, [[0, 16]]) == pytest.approx(2 * 1e8 / 2 / CHIP.dcn)


def test_hosts_of_slices_reduce_beside_work():
    """As the compiler writes it for several slices: arrays leave through the host, and come back added up."""
    where = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    found = read(
        f"  %x = f32[3125000]{{0}} parameter(1)\n  %s = (f32[3125000]{{0}}, u32[], token[]) send(%x, %a), {where}\n"
        f"  %r = (f32[3125000]{{0}}, u32[], token[]) recv(%a), {where}\n"
        f"  %w = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%work, {cycles(1)}\n"
        "  %d = (f32[3125000]{0}, token[]) recv-done(%r), is_host_transfer=true\n"
        "  ROOT %b = f32[64]{0} copy(%w)",
        WORK,
        torus(4, 4, False, slices=2),
    )
    assert found.collectives["all-reduce", "slices", "bytes"] == 4 * 3_125_000
    assert found.transfers == pytest.approx(12.5e6 / CHIP.dcn)  # there and back, half of it each
    assert found.exposed == pytest.approx(found.transfers - 1e-3)


def test_permutes_go_as_far_as_their_longest_way():
    assert torus(4, 4, False).seconds("collective-permute", 4.5e7, [[0, 1], [0, 12]]) == pytest.approx(
        3 * (1e-3 + 1e-6)
    )
    assert torus(4, 4, True).seconds("collective-permute", 4.5e7, [[0, 1], [0, 12]]) == pytest.approx(1e-3 + 1e-6)


@pytest.mark.parametrize(
    ("group", "axes"), [([0, 1, 2, 3], "fsdp+tensor"), ([0, 2], "fsdp"), ([0, 4], "data"), ([0, 7], "data+fsdp+tensor")]
)
def test_axes_that_a_group_spans(group, axes):
    assert schedule.Network(CHIP, {"data": 2, "fsdp": 2, "tensor": 2}).spanned(group) == axes
