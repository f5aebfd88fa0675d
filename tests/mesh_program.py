"""What test_sharding.py reads: eight simulated devices in a process of their own, everything compiled once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mmfree_jax.config import FAMILIES, DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.hlo import collectives
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, quantise_kernel
from mmfree_jax.ops.fast.products import gather_kernel
from mmfree_jax.sharding import MESH_AXES, divisible_spec, make_mesh, packed_gathers, shardings, spec
from mmfree_jax.tracing import during
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import make_program, program_key

V, D, F, L, B, T = 512, 64, 128, 2, 8, 32


def run_config(family: str, shape: tuple, **changes) -> RunConfig:
    mixer, linear = FAMILIES[family]
    heads = 4 if mixer == "attention" else 1
    model = ModelConfig(mixer=mixer, linear=linear, vocab=V, width=D, depth=L, glu_width=F, heads=heads)
    return RunConfig("m", model, DataConfig(batch=B, sequence=T), mesh=MeshConfig(*shape), **changes)


def on_mesh(shape: tuple, f, *args):
    """f(*args) compiled for a mesh, from arrays that every device has."""
    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        return jax.jit(f)(*args)


def agreement(family: str, shapes: list, bits: int = 0, words: int = 0) -> dict:
    """Loss and gradients, with documents that end anywhere, on each mesh against one device.

    `bits` of ternary layers' activations: with some, a rounding error may tip one into the next code. `words`: tokens
    of the vocabulary, the rest of which is padding.
    """
    model = dataclasses.replace(run_config(family, (1, 1, 1, 1)).model, tokenizer_vocab=words)
    if model.linear == "ternary":
        model = dataclasses.replace(model, activation_bits=bits)
    graphdef, params = nnx.split(LanguageModel(model, rngs=nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(0, words or V, (B, T + 1)), jnp.int32)
    segments_BT = jnp.asarray(np.cumsum(rng.uniform(size=(B, T)) < 0.1, axis=1), jnp.int32)

    def loss(params):
        found = nnx.merge(graphdef, params).loss(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT=segments_BT)
        return found.total / found.targets

    found = {}
    for shape in [(1, 1, 1, 1), *shapes]:
        mesh = make_mesh(MeshConfig(*shape))
        placed = jax.device_put(params, shardings(mesh, params))
        with jax.set_mesh(mesh):
            found[shape] = jax.device_get(jax.jit(jax.value_and_grad(loss))(placed))
    one = found.pop((1, 1, 1, 1))
    error = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
    return {
        "x".join(map(str, shape)): {
            "loss": float(abs(value / one[0] - 1)),
            "gradients": max(map(error, jax.tree.leaves(grads), jax.tree.leaves(one[1]))),
        }
        for shape, (value, grads) in found.items()
    }


def codes_everywhere() -> list:
    """[name, mesh] of every case whose codes or scales differ in a bit from those of one device."""
    cases = {
        "joint": (Recipe(scale_axes=(-3, -2, -1), axes=("embed", "mlp")), (2, 256, 704)),
        "each": (Recipe(axes=("embed", "heads")), (3, 256, 256)),
        "out": (Recipe(axes=("mlp", "embed")), (1, 704, 256)),
        "channel": (Recipe(scale_axes=(-2,), axes=("embed", "mlp")), (1, 256, 704)),
        "best": (Recipe(scale_axes=(-3, -2, -1), axes=("embed", "mlp"), best_scale=True), (2, 256, 704)),
    }
    different = []
    for name, (recipe, size) in cases.items():
        w = jax.random.normal(jax.random.key(1), size) * jnp.linspace(0.1, 3, size[-1])
        quantise = lambda w, recipe=recipe: gather_kernel(recipe, quantise_kernel(recipe, w))
        expected = jax.device_get(on_mesh((1, 1, 1, 1), quantise, w))
        for shape in ((1, 8, 1, 1), (1, 4, 2, 1), (2, 1, 4, 1)):
            mesh = make_mesh(MeshConfig(*shape))
            placed = jax.device_put(w, NamedSharding(mesh, divisible_spec(w.shape, spec(None, *recipe.axes), mesh)))
            with jax.set_mesh(mesh), during(packed_gathers, shape == (1, 4, 2, 1)):
                found = jax.device_get(jax.jit(quantise)(placed))
            same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), found, expected)
            different += [] if all(jax.tree.leaves(same)) else [[name, shape]]
    return different


def integer_gradients(shape: tuple) -> dict:
    """Errors of a layer whose outputs are cut over fsdp, of their own weight scales, beside one device."""
    recipe = Recipe(scale_axes=(-2,), axes=("mlp", "embed"), gradient_bits=8)
    draw = lambda seed, *size: jax.random.normal(jax.random.key(seed), size) * jnp.linspace(0.1, 3, size[-1])
    x, w, weigh = draw(1, B, T, F), draw(2, 1, F, D), draw(3, B, T, D)
    score = jax.value_and_grad(lambda x, w: jnp.sum(bit_linear(recipe, x, Weights(w))[0] * weigh), (0, 1))
    pairs = zip(*(jax.tree.leaves(jax.device_get(on_mesh(s, score, x, w))) for s in (shape, (1, 1, 1, 1))), strict=True)
    errors = (float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    return dict(zip(("loss", "inputs", "weights"), errors, strict=True))


def sent(family: str, shape: tuple, **changes) -> list:
    """The collectives of a train step: kind, arrays, executions, mesh axes, where in the program they come from."""
    run = run_config(family, shape, **changes)
    program = make_program(program_key(run, None))
    one = jax.ShapeDtypeStruct((), jnp.float32)
    tokens_BT = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    with jax.set_mesh(program.mesh):
        compiled = program.train_step.lower(program.abstract_state, tokens_BT, Rates(one, one)).compile()
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    return [[c.kind, c.arrays, c.executions, c.axes(sizes), c.origin] for c in collectives(compiled.as_text())]


def main() -> None:
    every, fsdp = (1, 2, 2, 2), (1, 8, 1, 1)
    agree = {family: agreement(family, [every]) for family in FAMILIES}
    agree["matmul-free"] |= agreement("matmul-free", [fsdp, (1, 1, 1, 8)], bits=8)
    agree["padded"] = agreement("matmul-free", [every], words=200)  # of 512: one half of the vocabulary has none
    traffic = {
        "none": sent("matmul-free", fsdp),
        "full": sent("matmul-free", fsdp, remat="full", unroll=L),
        "packed": sent("matmul-free", fsdp, gather="packed", optim=OptimConfig(z_loss=1e-4)),
        "mlgru": sent("matmul-free", every),
        "rwkv4": sent("matmul-free-rwkv4", every),
        "dense": sent("transformer++", every),
    }
    found = {"agree": agree, "integers": integer_gradients(every), "different": codes_everywhere(), "traffic": traffic}
    print(json.dumps(found))


if __name__ == "__main__":
    assert jax.device_count() == 8
    main()
