"""Every mesh computes what one device computes, and sends no more than it has to: `mesh_program.py`, read."""

import dataclasses
import json
import math

import jax
import pytest

from mmfree_jax.config import FAMILIES, ConfigError, MeshConfig, RunConfig
from mmfree_jax.lowering.program import REMATERIALISED
from mmfree_jax.sharding import MESH_AXES, idle_devices, make_mesh
from mmfree_jax.training.step import build_program, program_key
from tests.conftest import tiny_model
from tests.mesh_program import B, D, F, L, T, V
from tests.simulated import run, run_once

CODES = L * (4 * D * D + 3 * D * F)  # of all blocks; a byte each
SMALLEST = D * D  # weights of the smallest matrix


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the program found."""
    said, beside = run_once(tmp_path_factory, "meshes", "tests/mesh_program.py")
    assert REMATERIALISED not in beside
    return json.loads(said.splitlines()[-1])


def payload(traffic: list, kind: str, *dtypes: str) -> int:
    """Elements of the arrays of these types that all executions move."""
    arrays = ((array, times) for k, arrays, times, *_ in traffic if k == kind for array in arrays)
    return sum(math.prod(shape) * times for (dtype, shape), times in arrays if dtype in dtypes)


def shapes(traffic: list, kinds: set[str], axis: str) -> list[list[int]]:
    """Shapes of what crosses a mesh axis."""
    return [shape for k, arrays, _, axes, _ in traffic if k in kinds and axis in axes for _, shape in arrays]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "padded"])
def test_values_and_gradients_do_not_depend_on_the_mesh(found, family):
    for mesh, error in found["agree"][family].items():
        assert error["loss"] < 1e-6, mesh
        assert error["gradients"] < 5e-6, mesh  # of each parameter's largest


@pytest.mark.slow
def test_codes_and_scales_are_equal_bit_for_bit_on_every_mesh(found):
    assert found["different"] == []


@pytest.mark.slow
def test_integer_gradients_do_not_depend_on_the_mesh_where_outputs_have_their_own_scales(found):
    """Outputs are cut over fsdp, and so are their weight scales until the sums over tokens need whole ones."""
    error = found["integers"]
    assert error["loss"] < 5e-6
    assert error["inputs"] < 5e-6  # codes of gradients are by token: the same on every mesh
    assert error["weights"] < 0.03  # and by column of each device's rows: as in test_kernels_on_meshes.py


@pytest.mark.slow
@pytest.mark.parametrize(("case", "again"), [("none", 0), ("full", CODES - L * F * D)])
def test_ternary_weights_travel_as_one_byte_each(found, case, again):
    """Forward, backward, and again where remat makes all products but a block's last again; the head in one pass."""
    traffic = found["traffic"][case]
    assert payload(traffic, "all-gather", "s8") == 2 * CODES + again + D * V
    floats = [a for k, arrays, *_ in traffic if k == "all-gather" for a in arrays if a[0] in ("f32", "bf16")]
    assert [shape for _, shape in floats if math.prod(shape) >= SMALLEST] == [[V, D]]  # the embedding


@pytest.mark.slow
def test_packed_weights_travel_as_two_bits_each(found):
    traffic = found["traffic"]["packed"]
    assert payload(traffic, "all-gather", "s8") == 0
    assert 4 * payload(traffic, "all-gather", "u8") == 2 * CODES + D * V


@pytest.mark.slow
def test_each_weight_gradient_is_reduced_once_to_where_its_weights_live(found):
    traffic = found["traffic"]["none"]
    assert payload(traffic, "reduce-scatter", "f32") == CODES + 2 * V * D
    assert payload(traffic, "all-reduce", "f32") < SMALLEST * L


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlgru", "rwkv4"])
def test_recurrent_mixers_send_carries_along_the_sequence(found, case):
    """Two chunks of a state of each row and channel at most; of the residual stream, one token of each row."""
    rows, carry = B // 2, 2 * B // 2 * D // 2
    crossing = shapes(found["traffic"][case], {"all-gather", "collective-permute", "all-to-all"}, "sequence")
    assert crossing
    assert max(map(math.prod, crossing)) <= max(carry, rows * D)
    assert carry < rows * T // 2 * D // 2 / 4  # a quarter of a chunk of activations, or the test would be idle


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlgru", "dense"])
def test_neither_logits_nor_tables_are_gathered_over_tensor(found, case):
    gathers = {"all-gather", "all-to-all", "collective-permute"}
    crossing = shapes(found["traffic"][case], gathers, "tensor")
    assert not [shape for shape in crossing if math.prod(shape) >= B // 2 * T // 2 * D // 2]
    reduced = shapes(found["traffic"][case], {"all-reduce"}, "tensor")
    assert max(shape[-1] for shape in reduced if len(shape) == 3) == D  # activations, never [B, T, V]


# Of one layer in bfloat16 on four of the devices: bytes reduced, by type, and the loss and gradient norm of a step.
REDUCED = """
import dataclasses, json
from collections import Counter
import jax, numpy as np
from mmfree_jax.config import MeshConfig
from mmfree_jax.lowering.program import partition
from mmfree_jax.training.step import make_program, program_key
from tests.lowering.partition import small_run

run = small_run("matmul-free", MeshConfig(data=2, fsdp=2))
run = dataclasses.replace(run, model=dataclasses.replace(run.model, width=64, glu_width=192, depth=1), kernels="off")
tokens_BT = np.random.default_rng(0).integers(0, run.model.vocab, (run.data.batch, 65)).astype(np.int32)
found = {}
for reduction in ("compute", "float32"):
    one = dataclasses.replace(run, reduction=reduction)
    sent = Counter()
    for traffic in partition(one, "cuda").traffic:
        if traffic.kind == "reduce-scatter":
            sent[traffic.dtype] += traffic.sent
    program = make_program(program_key(one, None))
    with jax.set_mesh(program.mesh):
        _, step = program.train_step(program.init(jax.random.key(0)), program.place(tokens_BT), np.float32(1e-3))
    found[reduction] = {"sent": sent, "loss": float(step["loss"]), "norm": float(step["grad_norm"])}
print(json.dumps(found))
"""


def test_gradients_reduced_in_float32_take_twice_the_bytes_where_they_were_bfloat16():
    said, _ = run("-c", REDUCED)
    narrow, wide = (json.loads(said.splitlines()[-1])[name] for name in ("compute", "float32"))
    weights = 4 * 64**2 + 3 * 64 * 192  # of the block; each of two devices sends half, in two bytes
    assert narrow["sent"]["bf16"] == weights / 2 * 2
    assert wide["sent"].keys() == {"f32"}
    assert wide["sent"]["f32"] == narrow["sent"]["f32"] + 2 * narrow["sent"]["bf16"]
    assert wide["loss"] == narrow["loss"]
    assert wide["norm"] == pytest.approx(narrow["norm"], rel=1e-2)
    assert wide["norm"] != narrow["norm"]


def test_a_reduction_that_would_do_nothing_is_refused():
    for changes in ({}, {"mesh": MeshConfig(data=2), "precision": "float32"}):
        with pytest.raises(ConfigError, match="reduction='float32' would do nothing"):
            RunConfig("r", reduction="float32", **changes)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match="needs 4096 devices, only"):
        make_mesh(MeshConfig(data=64, fsdp=64))


def test_devices_that_a_mesh_leaves_idle_are_said(monkeypatch):
    monkeypatch.setattr("jax.devices", lambda: [None] * 8)
    assert idle_devices(MeshConfig()).startswith("7 of 8 devices stay idle: --mesh.data")
    assert idle_devices(MeshConfig(data=2, fsdp=4)) == ""


def abstract(mesh: MeshConfig) -> jax.sharding.AbstractMesh:
    sizes = tuple(dataclasses.asdict(mesh)[axis] for axis in MESH_AXES)
    return jax.sharding.AbstractMesh(sizes, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def said_of(width: int, **mesh: int) -> tuple[str, ...]:
    """What is said of a model of this width, with a GLU of twice that and a vocabulary of 257, on a mesh."""
    config = RunConfig("r", tiny_model("matmul-free", width=width, glu_width=2 * width), mesh=MeshConfig(**mesh))
    return build_program(program_key(config, None), abstract(config.mesh)).replicated


def test_parameters_that_a_mesh_does_not_divide_are_named():
    assert said_of(16, data=4) == ()
    assert said_of(16, fsdp=8) == ()
    (embedding, head) = said_of(16, fsdp=2, tensor=4)
    assert embedding == "embedding [257, 16] is replicated along tensor=4: 257 is not divisible by 4"
    assert head.startswith("head.kernel [16, 257] is replicated")
    twenty = said_of(20, tensor=8)  # which divides the GLU's 40 alone
    assert any("mixer" in line and "along tensor=8: 20 is not divisible by 8" in line for line in twenty)
    assert not any("glu" in line for line in twenty)


def test_a_mesh_axis_that_would_cut_no_parameter_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.fsdp=8 would shard no parameter.* sizes 36; use fsdp=6"):
        said_of(36, fsdp=8)
    with pytest.raises(ConfigError, match=r"mesh.tensor=5 would shard no parameter"):
        said_of(36, tensor=5)


def test_a_gather_that_would_do_nothing_is_refused():
    with pytest.raises(ConfigError, match="gather='packed' would do nothing"):
        RunConfig("r", gather="packed")


SCATTERING = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from mmfree_jax.config import MeshConfig
from mmfree_jax.devices import traced_for
from mmfree_jax.sharding import _scattered, make_mesh
mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
for shape, axis in [((16, 6), 0), ((1, 8, 24), 2), ((3, 8, 6), 1), ((2, 5, 24), 2), ((2, 3, 1024), 2), ((8,), 0)]:
    parts = np.random.default_rng(0).standard_normal((4, *shape), np.float32)
    out = P(*("fsdp" if i == axis else None for i in range(len(shape))))
    names = {}
    for platform in ("cuda", "tpu"):
        with traced_for(platform), jax.set_mesh(mesh):
            scatter = jax.shard_map(lambda a: _scattered(a[0], ("fsdp",), axis), in_specs=P("fsdp"), out_specs=out)
            names[platform] = str(jax.jit(scatter).trace(parts).jaxpr)
            found = jax.jit(scatter)(parts)
        np.testing.assert_allclose(found, parts.sum(0), rtol=1e-5, atol=1e-6)
    print("tiled=True" in names["cuda"], "tiled=True" in names["tpu"])
"""


@pytest.mark.slow
def test_a_scattered_sum_has_its_pieces_in_order_however_it_is_cut():
    said = run("-c", SCATTERING)[0].splitlines()
    assert all(line.startswith("True") for line in said)  # GPUs keep the program that was measured
    # TPUs: single matrices and broken lanes by pieces; stacks along another axis and whole lanes as they are.
    assert [line.split()[1] for line in said] == ["False", "False", "True", "False", "True", "False"]
