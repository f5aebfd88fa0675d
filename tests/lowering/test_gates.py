"""What the partitioner makes of the training step of every family, on eight simulated devices.

Older versions of XLA say nothing about arrays that they put whole on every device, and count collectives differently.
"""

import json
from pathlib import Path

import jax
import pytest

from mmfree_jax import flops
from mmfree_jax.lowering.program import REMATERIALISED
from tests.lowering.partition import MESHES, cases, small_run
from tests.simulated import run, run_once

GOLDEN = json.loads((Path(__file__).parent / "collectives.json").read_text())
newest = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the gates hold for the newest JAX, 0.12 or later")

UNGUARDED = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
place = lambda *axes: NamedSharding(mesh, P(*axes))
move = jax.jit(
    lambda w_LDF: jax.lax.with_sharding_constraint(2 * w_LDF, place(None, "fsdp", "tensor")),
    in_shardings=place(("tensor", "fsdp"), None, None),
)
move.lower(jax.ShapeDtypeStruct((64, 64, 64), jnp.float32)).compile()
"""  # both axes in one move


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory) -> tuple[dict, str]:
    """What tests/lowering/partition.py prints, and the compiler's words."""
    said, beside = run_once(tmp_path_factory, "gates", "-m", "tests.lowering.partition")
    return json.loads(said), beside


@newest
@pytest.mark.slow
def test_nothing_is_put_whole_on_every_device_for_want_of_a_better_way(partitioned):
    """That the compiler would say so, a program shows that moves two axes at once."""
    assert REMATERIALISED not in partitioned[1]
    assert REMATERIALISED in run("-c", UNGUARDED)[1]


@newest
@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_collectives_are_those_that_are_known_and_parameters_are_cut(case, partitioned):
    """A change that is meant renews the table, by the command in tests/lowering/partition.py."""
    found = partitioned[0][" ".join(case)]
    assert found["collectives"] == GOLDEN[" ".join(case)]["collectives"]
    assert found["sharded"] >= 0.98


@newest
@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "item"), [("transformer++", "bf16", 2), ("matmul-free", "s8", 1)])
def test_weights_are_gathered_once_forward_and_once_backward(family, dtype, item, partitioned):
    """Seven eighths of every matrix come from other devices: two bytes a weight, or one where it travels as its code.
    The head is used once: its loss makes both passes. The embedding is gathered once, in bfloat16."""
    model = small_run(family, MESHES["fsdp=8"]).model
    count = flops.parameters(model)
    expected = 7 / 8 * item * (2 * count.N_nonemb + count.head)
    expected += 7 / 8 * 2 * count.embedding if dtype == "bf16" else 0
    assert partitioned[0][f"{family} fsdp=8"]["gathered"][dtype] == pytest.approx(expected, rel=1e-3)
