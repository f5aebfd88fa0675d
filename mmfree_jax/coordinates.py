"""The coordinate check: how far a few optimizer steps move the activations, width by width (Yang et al. 2022, arXiv
2203.03466, appendix D.1).

If a parametrisation transfers, the root mean square of the change neither grows nor vanishes with the width, in any
layer. If it grows, the best learning rate falls.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from mmfree_jax.command_line import parse
from mmfree_jax.config import (
    FAMILIES,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Optimizer,
    Parametrisation,
    RunConfig,
    require,
)
from mmfree_jax.devices import check_platform
from mmfree_jax.output import program
from mmfree_jax.sweep.shapes import ladder_model
from mmfree_jax.training.step import make_program, program_key

# Short windows of a small batch are enough: what is measured is how an update changes activations, not learning.
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("standard", "mup")
DATA = DataConfig(vocab=257, sequence=32, batch=8)
RATES = {"dense": 4e-3, "ternary": 8e-3}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a few steps at each width, on random tokens, and print how far the activations of each layer moved."""

    family: tyro.conf.Positional[Literal["transformer++", "bitnet", "matmul-free", "matmul-free-rwkv4", "hgrn"]]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Ascending; the first is the base of muP."""
    depth: int = 2
    steps: int = 5
    lr: float = 0.0
    """Learning rate (0: 4e-3 for dense families, 8e-3 for ternary ones)."""
    optimizer: Optimizer = "adamw"

    def __post_init__(self) -> None:
        ascending = len(self.widths) > 1 and list(self.widths) == sorted(set(self.widths))
        require(ascending, f"widths {self.widths}: give at least two, ascending")
        require(self.steps >= 1, f"steps={self.steps}: must be at least 1")


def movement(model: ModelConfig, optim: OptimConfig, steps: int) -> np.ndarray:
    """Return the root mean square change of embedding, residual stream after each block, and logits in `steps` steps.

    The tokens are random, but skewed as in text, and the same in each step.
    """
    # Far longer than the few steps taken, so the schedule plays no part: each step is given its rate here.
    run = RunConfig("coordinates", model, dataclasses.replace(DATA, vocab=model.vocab), optim, steps=10**6)
    step = make_program(program_key(run, None))
    # The third power of a uniform number makes small tokens frequent and large ones rare, as words are.
    uniform = np.random.default_rng(0).random((DATA.batch, DATA.sequence + 1))
    tokens_BT = step.place((model.vocab * uniform**3).astype(np.int32))

    @jax.jit
    def activations(params: nnx.State) -> list[jax.Array]:
        built = nnx.merge(step.graphdef, params)
        return [*built.residuals(tokens_BT[:, :-1]), built(tokens_BT[:, :-1])]

    # The same tokens before and after, so the change is that of the weights alone.
    with jax.set_mesh(step.mesh):
        state = step.init(jax.random.key(0))
        before = activations(state.params)
        for _ in range(steps):
            state, _ = step.train_step(state, tokens_BT, step.repeat(np.float32(optim.lr)))
        after = activations(state.params)
    return np.array([float(jnp.sqrt(jnp.mean((b - a) ** 2))) for a, b in zip(before, after, strict=True)])


def model_at(family: str, parametrisation: Parametrisation, width: int, base: int, depth: int) -> ModelConfig:
    """Return the family at a width, relative to a base width of the same depth."""
    model = ladder_model(family, width, DATA.vocab, depth)
    # The depth of the base is that of every model, so only the width varies.
    if parametrisation == "standard":
        return model
    return dataclasses.replace(model, parametrisation="mup", base_width=base, base_depth=depth)


def exponents(widths: Sequence[int], moved: np.ndarray) -> np.ndarray:
    """Return the slope of log change against log width for each layer, by least squares; `moved` is [widths, layers].

    0: independent of the width. 1: in proportion to it.
    """
    return np.polyfit(np.log(widths), np.log(moved), 1)[0]


def main(arguments: list[str]) -> int:
    """Print a table for each parametrisation: for every layer its change at every width, and the exponent."""
    options = parse(Arguments, arguments, f"{program()} coordinates")
    check_platform()
    widths, depth = options.widths, options.depth
    optim = OptimConfig(optimizer=options.optimizer, lr=options.lr or RATES[FAMILIES[options.family][1]])
    layers = ["embedding", *(f"block {i + 1}" for i in range(depth)), "logits"]
    for parametrisation in PARAMETRISATIONS:
        models = [model_at(options.family, parametrisation, width, widths[0], depth) for width in widths]
        moved = np.stack([movement(model, optim, options.steps) for model in models])
        columns = "".join(f"{f'width {width}':>12}" for width in widths)
        print(f"{parametrisation:<12}{columns}{'exponent':>12}")
        for name, changes, slope in zip(layers, moved.T, exponents(widths, moved), strict=True):
            print(f"{name:<12}" + "".join(f"{change:12.4g}" for change in changes) + f"{slope:+12.2f}")
    return 0
