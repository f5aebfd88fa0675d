"""Collectives are counted where they run, in every notation that XLA writes."""

import json

import pytest

from mmfree_jax.hlo import TAIL, collectives, host_transfers, kernels, products, total
from tests.simulated import run

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mmfree_jax.hlo import collectives

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
wsc = lambda a, *axes: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(*axes)))

def layer(x, w):  # three of these in each of five: the codes of w are gathered along fsdp
    codes = wsc(wsc(jnp.sign(w).astype(jnp.int8), "fsdp", None), None, None)
    return jnp.tanh(x @ codes.astype(x.dtype)), None

def program(x, w_L):
    x, _ = jax.lax.scan(lambda x, _: jax.lax.scan(layer, x, w_L), x, None, length=5)
    return jnp.sum(x)

place = lambda *axes: NamedSharding(mesh, P(*axes))
shape = jax.ShapeDtypeStruct
compiled = jax.jit(program, in_shardings=(place(("data", "fsdp"), None), place(None, "fsdp", None))).lower(
    shape((16, 64), jnp.float32), shape((3, 64, 64), jnp.float32)).compile()
found = collectives(compiled.as_text())
rows = [[c.kind, c.arrays, c.executions, c.axes({"data": 2, "fsdp": 4}), c.payload, c.sent] for c in found]
print(json.dumps(rows))
"""


def module(instruction: str) -> str:
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {instruction}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", ("fsdp",)),  # devices 0 2 4 6 1 3 5 7, in pairs
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", ("tensor",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
    ],
)
def test_every_notation_of_device_groups(groups, axes):
    (found,) = collectives(module(f"%g = s8[8,4]{{1,0}} all-gather(%p), {groups}, dimensions={{0}}"))
    assert found.axes(MESH) == axes
    assert found.payload == 32


def test_asynchronous_and_fused_instructions():
    both = "((f32[4]{0}, s8[2,2]{1,0}), (f32[8]{0}, s8[4,2]{1,0}))"  # operands and results
    (found,) = collectives(module(f"%s = {both} all-gather-start(%a, %b), replica_groups=[4,2]<=[8]"))
    assert found.arrays == (("f32", (8,)), ("s8", (4, 2)))
    assert total([found]) == {("all-gather", "f32"): (1, 16), ("all-gather", "s8"): (1, 4)}
    assert total([found, found])["all-gather", "s8"] == (2, 8)
    (found,) = collectives(module("%r = bf16[3]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={0}"))
    assert (found.payload, found.sent) == (24, 18)
    both = "((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0}))"
    (found,) = collectives(module(f"%r = {both} reduce-scatter-start(%a, %b), replica_groups=[2,4]<=[8]"))
    assert (found.payload, found.sent) == (48, 36)
    assert total([found]) == {("reduce-scatter", "f32"): (2, 36)}  # two arrays in one instruction
    (found,) = collectives(module("%r = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%a), replica_groups=[2,4]<=[8]"))
    assert (found.payload, found.sent) == (32, 48)
    (found,) = collectives(module("%p = f32[3]{0} collective-permute(%a), source_target_pairs={{0,2},{2,0},{4,6}}"))
    assert (found.groups, found.sent, found.axes(MESH)) == (((0, 2), (2, 0), (4, 6)), 12, ("fsdp",))


SCATTERED = """HloModule m

%all-reduce-scatter.1 (input: bf16[1024,2816]) -> bf16[528,2816] {
  %all-reduce.37 = bf16[1056,2816]{1,0} all-reduce(%pad), channel_id=4, replica_groups={{0,2},{1,3}}
  ROOT %part = bf16[528,2816]{1,0} dynamic-slice(%all-reduce.37, %at, %zero), dynamic_slice_sizes={528,2816}
}

ENTRY %main (p: bf16[1024,2816]) -> bf16[8,128] {
  %fusion.3 = bf16[528,2816]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.4 = bf16[528,2816]{1,0} fusion(%p), kind=kLoop, calls=%elsewhere
  %end.1 = bf16[16,2816]{1,0} slice(%fusion.3), slice={[512:528], [0:2816]}
  %end.2 = bf16[16,2816]{1,0} slice(%fusion.4), slice={[512:528], [0:2816]}
  %start.1 = (bf16[16,2816], bf16[16,2816]) collective-permute-start(%end.1), source_target_pairs={{0,2},{1,3}}
  %start.2 = (bf16[16,2816], bf16[16,2816]) collective-permute-start(%end.2), source_target_pairs={{0,2},{1,3}}
  ROOT %start.3 = (bf16[8,128], bf16[8,128]) collective-permute-start(%q), source_target_pairs={{0,2},{1,3}}
}

%elsewhere (p: bf16[1024,2816]) -> bf16[528,2816] {
}
"""


def test_a_permute_is_the_tail_of_a_reduce_scatter_only_where_it_sends_a_part_of_one():
    """As the compiler for TPUs writes a reduce-scatter whose pieces are not whole granules of its ring."""
    assert {key: count for key, (count, _) in total(collectives(SCATTERED)).items()} == {
        ("reduce-scatter", "bf16"): 1,
        (TAIL, "bf16"): 1,
        ("collective-permute", "bf16"): 2,
    }
    whole, tail = (one for one in collectives(SCATTERED) if one.kind in ("reduce-scatter", TAIL))
    assert whole.sent == 1056 * 2816 * 2 / 2  # half of it, to the other device
    assert tail.sent == 16 * 2816 * 2


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="not understood"):
        collectives(module("%g = s8[8]{0} all-gather(%p), replica_groups=<new notation>"))
    loop = "%b (p: f32[8]) -> f32[8] {\n  %g = s8[8]{0} all-gather(%p), replica_groups=[1,8]<=[8]\n}\n"
    with pytest.raises(ValueError, match="unknown length"):
        collectives(loop + module("%w = f32[8]{0} while(%p), condition=%b, body=%b").replace("HloModule m", ""))


def test_instructions_in_nested_loops_count_once_an_iteration():
    rows = {row[0]: row[1:] for row in json.loads(run("-c", PROGRAM)[0].splitlines()[-1])}
    assert rows["all-gather"] == [[["s8", [64, 64]]], 15, ["fsdp"], 4096, 15 * 4096 * 3 / 4]
    assert rows["all-reduce"][1:] == [1, ["data", "fsdp"], 4, 7]


OF_A_TPU = """HloModule step
%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(24), metadata={op_name="x"}
  %i.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.7), direction=LT
}

%begins.1 (p: s8[2,8]) -> s8[8,8] {
  %all-gather.1 = s8[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], attributes={chain_id="0"}
}

%ends.1 (p: s8[2,8]) -> s8[8,8] {
  %all-gather.2 = s8[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], attributes={chain_id="0"}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x.1 = s8[4,8]{1,0} parameter(0)
  %w.1 = s8[8,8]{1,0:T(32,128)(4,1)} fusion(%x.1), kind=kLoop, calls=%begins.1
  %v.1 = s8[8,8]{1,0:T(32,128)(4,1)} fusion(%x.1), kind=kLoop, calls=%ends.1
  %y.1 = s32[4,8]{1,0:T(8,128)} convolution(%x.1, %w.1), dim_labels=bf_io->bf
  %recurrence.3 = (f32[8]{0}) custom-call(%y.1), custom_call_target="tpu_custom_call"
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t.1), condition=%condition.1, body=%body.1
  %copy.1 = f32[8]{0:T(128)S(5)} copy(%p)
}
"""


def test_programs_for_tpus():
    """Their loops have no trip counts, and a collective that goes on beside other work stands in each part of it."""
    (gather,) = collectives(OF_A_TPU)
    assert (gather.kind, gather.executions, gather.arrays) == ("all-gather", 24, (("s8", (8, 8)),))
    assert products(OF_A_TPU) == {("s8", "s8", "s32"): 1}
    assert kernels(OF_A_TPU) == {"recurrence": 1}
    assert host_transfers(OF_A_TPU) == ["%copy.1 = f32[8]{0:T(128)S(5)} copy(%p)"]
