"""The coordinate check: how far a few optimizer steps move the activations, width by width (Yang et al. 2022, arXiv
2203.03466, appendix D.1).

Where a parametrisation transfers, the root mean square of the change neither grows nor vanishes with the width, at any
layer; where it grows, the best learning rate falls.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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

PARAMETRISATIONS: tuple[Parametrisation, ...] = ("standard", "mup")
DATA = DataConfig(vocab=257, sequence=32, batch=8)
RATES = {"dense": 4e-3, "ternary": 8e-3}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a few steps at each width, on random tokens, and print how far activations moved in each layer."""

    family: tyro.conf.Positional[Literal["transformer++", "bitnet", "matmul-free", "matmul-free-rwkv4", "hgrn"]]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Ascending; the first is the base of muP."""
    depth: int = 2
    steps: int = 5
    lr: float = 0.0
    """Learning rate (0: 4e-3 for dense families, 8e-3 for ternary ones)."""
    optimizer: Optimizer = "adamw"
    out: Path | None = None
    """Table (.csv) or picture (.png, .svg, .pdf) to write as well."""

    def __post_init__(self) -> None:
        ascending = len(self.widths) > 1 and list(self.widths) == sorted(set(self.widths))
        require(ascending, f"widths {self.widths}: give at least two, ascending")
        require(self.steps >= 1, f"steps={self.steps}: must be at least 1")
        suffixes = (".csv", ".png", ".svg", ".pdf")
        require(self.out is None or self.out.suffix in suffixes, f"out={self.out}: must end in {', '.join(suffixes)}")


def layer_names(depth: int) -> list[str]:
    """What `movement` measures."""
    return ["embedding", *(f"block {i + 1}" for i in range(depth)), "logits"]


def movement(model: ModelConfig, optim: OptimConfig, steps: int, seed: int = 0) -> np.ndarray:
    """Root mean square of the change of the residual stream after each block, and of the logits, in `steps` steps.

    Returns one number for each of `layer_names`. The tokens are random but skewed, as in text, and the same each step.
    """
    run = RunConfig("coordinates", model, dataclasses.replace(DATA, vocab=model.vocab), optim, steps=10**6)
    program = make_program(program_key(run, None))
    uniform = np.random.default_rng(seed).random((DATA.batch, DATA.sequence + 1))
    tokens_BT = program.place((model.vocab * uniform**3).astype(np.int32))

    @jax.jit
    def activations(params: nnx.State) -> list[jax.Array]:
        built = nnx.merge(program.graphdef, params)
        return [*built.residuals(tokens_BT[:, :-1]), built(tokens_BT[:, :-1])]

    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(seed))
        before = activations(state.params)
        for _ in range(steps):
            state, _ = program.train_step(state, tokens_BT, program.repeat(np.float32(optim.lr)))
        after = activations(state.params)
    return np.array([float(jnp.sqrt(jnp.mean((b - a) ** 2))) for a, b in zip(before, after, strict=True)])


def model_at(family: str, parametrisation: Parametrisation, width: int, base: int, depth: int) -> ModelConfig:
    """The family at a width, relative to a base width of the same depth."""
    model = ladder_model(family, width, DATA.vocab, depth)
    if parametrisation == "standard":
        return model
    return dataclasses.replace(model, parametrisation="mup", base_width=base, base_depth=depth)


def exponents(widths: Sequence[int], moved: np.ndarray) -> np.ndarray:
    """Slope of log change against log width for each layer, by least squares; `moved` is [widths, layers].

    0: independent of the width. 1: in proportion to it.
    """
    return np.polyfit(np.log(widths), np.log(moved), 1)[0]


def main(arguments: list[str]) -> int:
    """The command `coordinates`."""
    chosen = parse(Arguments, arguments, f"{program()} coordinates")
    check_platform()
    optim = OptimConfig(optimizer=chosen.optimizer, lr=chosen.lr or RATES[FAMILIES[chosen.family][1]])
    found = {}
    for parametrisation in PARAMETRISATIONS:
        models = [model_at(chosen.family, parametrisation, w, chosen.widths[0], chosen.depth) for w in chosen.widths]
        found[parametrisation] = np.stack([movement(model, optim, chosen.steps) for model in models])
        print("\n".join(table(parametrisation, chosen.widths, chosen.depth, found[parametrisation])))
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write = write_csv if chosen.out.suffix == ".csv" else draw
        write(chosen.out, chosen.widths, chosen.depth, found)
    return 0


def table(parametrisation: str, widths: Sequence[int], depth: int, moved: np.ndarray) -> list[str]:
    """Lines: a layer each, its change at every width, and the exponent."""
    heading = f"{parametrisation:<12}" + "".join(f"{f'width {width}':>12}" for width in widths) + f"{'exponent':>12}"
    rows = zip(layer_names(depth), moved.T, exponents(widths, moved), strict=True)
    lines = [
        f"{name:<12}" + "".join(f"{c:12.4g}" for c in changes) + f"{slope:+12.2f}" for name, changes, slope in rows
    ]
    return [heading, *lines]


def write_csv(path: Path, widths: Sequence[int], depth: int, found: dict[Parametrisation, np.ndarray]) -> None:
    """parametrisation, layer, width, change: a row each."""
    rows = [
        f"{parametrisation},{name},{width},{moved[i, j]:.6g}"
        for parametrisation, moved in found.items()
        for j, name in enumerate(layer_names(depth))
        for i, width in enumerate(widths)
    ]
    path.write_text("\n".join(["parametrisation,layer,width,change", *rows]) + "\n", encoding="utf-8")


def draw(path: Path, widths: Sequence[int], depth: int, found: dict[Parametrisation, np.ndarray]) -> None:
    """A panel for each parametrisation, a line for each layer."""
    import matplotlib
    from matplotlib.figure import Figure

    from scaling.report.plot import STYLE, save

    colours: Any = matplotlib.colormaps["viridis"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True)
    for axes, (parametrisation, moved) in zip(panels, found.items(), strict=True):
        for j, name in enumerate(layer_names(depth)):
            colour = colours(0.85 * j / (depth + 1))
            axes.plot(widths, moved[:, j], "o-", color=colour, ms=4, lw=1.5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_title("muP" if parametrisation == "mup" else parametrisation, fontsize=10)
        axes.set_xlabel("width")
    panels[0].set_ylabel("root mean square of the change")
    panels[-1].legend(frameon=False, fontsize=8)
    save(figure, path)
