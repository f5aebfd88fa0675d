"""Which family can do what? `python -m experiments.probes --out probes.csv` (docs/probes.md says what each probe asks).

Every family is trained on every probe by itself, three seeds in one program (vmap over seeds, scan over steps, without
kernels), and scored on test rows at the lengths of training and beyond them. A row of the table is a family, a probe, a
seed, a set of lengths (trained, beyond) and a range of distances ("all" of them first): accuracy with its 95 %
interval. The table is appended to after each pair of family and probe. The same command goes on where it stopped, and
starts no pair after --limit-seconds, so one call of ten minutes on a GPU can be followed by another. --picture draws
accuracy against distance, a panel a probe.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmfree_jax.architecture import FAMILIES, ModelConfig
from mmfree_jax.devices import backend
from mmfree_jax.evaluation.probes import PROBES, Draw, Probe, Recall, draw, score
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.fast.choice import kernels_allowed

TEST_ROWS, SEEDS, PART = 500, 3, 50  # PART: steps whose rows are of one seed of the drawing
# AdamW's peak. Of 1, 2, 4 and 8e-3 (three families, five probes, one seed) these are best, or within noise of the best.
RATES = {"dense": 2e-3, "ternary": 4e-3}
COLUMNS = (
    "family", "probe", "seed", "lengths", "nearest", "farthest", "targets", "accuracy", "low", "high", "chance", "loss",
    "width", "depth", "tokens", "steps", "seconds", "device",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes of the models and of their training; equal for all families and probes. A step reads `tokens`."""

    width: int = 128
    depth: int = 2
    tokens: int = 32768
    steps: int = 2000

    def batch(self, probe: Probe) -> int:
        """Rows of a step: as many as `tokens` hold, at least one."""
        return max(1, self.tokens // probe.length)


def main() -> None:
    """Append to the table what it has not yet, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probes.csv")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--probes", nargs="+", default=list(PROBES), choices=list(PROBES))
    parser.add_argument("--limit-seconds", type=float, default=float("inf"))
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    chosen = parser.parse_args()
    recipe = Recipe(*(getattr(chosen, field.name) for field in dataclasses.fields(Recipe)))
    began, held = time.monotonic(), done(chosen.out, recipe)
    for probe in chosen.probes:
        for family in chosen.families:
            if (family, probe) in held or time.monotonic() - began > chosen.limit_seconds:
                continue
            append(chosen.out, list(rows(family, probe, recipe)))
    if chosen.picture:
        picture(chosen.out, chosen.picture)


def done(path: Path, recipe: Recipe) -> set[tuple[str, str]]:
    """Return the pairs of a table. Raises SystemExit for a table of another recipe."""
    table = read(path) if path.exists() else []
    sizes = dataclasses.asdict(recipe)
    if any({name: int(row[name]) for name in sizes} != sizes for row in table):
        raise SystemExit(f"{path} is of another recipe than {recipe}: choose another --out")
    return {(row["family"], row["probe"]) for row in table}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, found: list[dict[str, Any]]) -> None:
    """Write the rows of a pair at once, so that a table holds whole pairs."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)
    whole = [f"{row['lengths']} {row['accuracy']:.3f}" for row in found if row["nearest"] == "all"]
    print(f"{found[0]['family']} {found[0]['probe']}: {', '.join(whole)}, {found[0]['seconds']:.0f} s", flush=True)


def beyond(probe: Any) -> Probe:
    """The same probe at up to four times the lengths; of `Recall` with twice the pairs. Its vocabulary is the same."""
    if isinstance(probe, Recall):
        return dataclasses.replace(probe, pairs=min(2 * probe.pairs, probe.keys))
    last = probe.distances[-1]
    return dataclasses.replace(probe, distances=(last, 2 * last, 4 * last))


def model_config(family: str, probe: Probe, recipe: Recipe) -> ModelConfig:
    """A model of a family with the vocabulary of a probe."""
    mixer, linear = FAMILIES[family]
    heads = {"heads": max(1, recipe.width // 32)} if mixer == "attention" else {}
    sizes: dict[str, Any] = {"width": recipe.width, "depth": recipe.depth, "glu_width": 2 * recipe.width, **heads}
    return ModelConfig(mixer=mixer, linear=linear, vocab=len(probe.words), **sizes)


def rows(family: str, name: str, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Train a family on a probe, and yield its rows of the table."""
    began, probe = time.monotonic(), PROBES[name]
    graph, params, losses = train(model_config(family, probe, recipe), probe, recipe)
    logits = kernels_allowed(False)(compiled(lambda params, tokens: nnx.merge(graph, params)(tokens)))
    found: list[tuple[int, str, str, Any]] = []
    for lengths, asked in (("trained", probe), ("beyond", beyond(probe))):
        test = draw(asked, 0, TEST_ROWS, "test")
        for seed in range(SEEDS):
            own = jax.tree.map(lambda a, seed=seed: a[seed], params)
            whole, *by_distance = score(functools.partial(logits, own), test, batch=32)
            found += [(seed, lengths, "all", whole), *((seed, lengths, str(one.nearest), one) for one in by_distance)]
    about = {"family": family, "probe": name, "chance": 1 / len(probe.answers), **dataclasses.asdict(recipe)}
    measured = {"seconds": round(time.monotonic() - began, 1), "device": jax.devices()[0].device_kind}
    for seed, lengths, nearest, one in found:
        bounds = {"farthest": one.farthest, "targets": one.targets}
        values = {key: round(getattr(one, key), 5) for key in ("accuracy", "low", "high")}
        values["loss"] = round(float(losses[seed]), 5)
        yield about | {"seed": seed, "lengths": lengths, "nearest": nearest, **bounds, **values, **measured}


def train(config: ModelConfig, probe: Probe, recipe: Recipe) -> tuple[nnx.GraphDef, Any, np.ndarray]:
    """Train all seeds at once. Returns the model's structure, parameters [SEEDS, ...] and the last losses [SEEDS]."""
    dtype = jnp.float32 if backend() == "cpu" else jnp.bfloat16
    build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key), dtype=dtype, unroll=config.depth)
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))
    rate = optax.warmup_cosine_decay_schedule(0.0, RATES[config.linear], recipe.steps // 10, recipe.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    @compiled
    @jax.vmap
    def start(key: jax.Array) -> tuple[Any, Any]:
        params = nnx.state(build(key), nnx.Param)
        return params, optimizer.init(params)

    def step(state: tuple[Any, Any], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
        tokens_BT, mask_BT = batch[0].astype(jnp.int32), batch[1]

        def loss(params: Any) -> jax.Array:
            found = nnx.merge(graph, params).loss(tokens_BT[:, :-1], tokens_BT[:, 1:], mask_BT)
            return found.total / found.targets

        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    # Seeds are the outer axis of state and batches, steps that of the scan.
    steps = compiled(lambda state, batches: jax.lax.scan(jax.vmap(step), state, batches), donate_argnums=0)
    with kernels_allowed(False):
        (params, _), losses = steps(start(jax.random.split(jax.random.key(0), SEEDS)), batches(probe, recipe))
    return graph, params, np.asarray(losses[-1])


def compiled(function: Any, **options: Any) -> Any:
    """`jax.jit` without trials of GPU code: for models this small they would take longer than the training."""
    quick = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return jax.jit(function, compiler_options=quick if backend() == "gpu" else None, **options)


@functools.lru_cache(1)  # the next family learns from the same rows
def batches(probe: Probe, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Tokens int16 [steps, SEEDS, batch, T+1] and masks of all steps, on the device."""
    batch = recipe.batch(probe)

    def drawn(seed: int, part: int) -> Draw:
        return draw(probe, SEEDS * part + seed, batch * min(PART, recipe.steps - part * PART))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = range(-(-recipe.steps // PART))
        seeds = [list(pool.map(functools.partial(drawn, seed), parts)) for seed in range(SEEDS)]
    whole = lambda name: [np.concatenate([getattr(one, name) for one in seed]) for seed in seeds]
    by_step = lambda rows, dtype: np.stack([a.reshape(recipe.steps, batch, -1).astype(dtype) for a in rows], axis=1)
    return jax.device_put((by_step(whole("tokens"), np.int16), by_step(whole("mask"), bool)))


def picture(table: Path, out: Path) -> None:
    """Draw accuracy against distance: a panel a probe, a colour a family, the spread of its seeds as a band.

    Full circles are rows of the lengths of training, hollow ones longer rows. Dotted: the longest distance of training;
    grey: chance.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = [row for row in read(table) if row["nearest"] != "all"]
    names = list(dict.fromkeys(row["probe"] for row in held))
    families = list(dict.fromkeys(row["family"] for row in held))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    size = 3.4 * columns, 2.9 * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        of_probe = [row for row in held if row["probe"] == name]
        for number, family in enumerate(families):
            _curve(axis, [row for row in of_probe if row["family"] == family], f"C{number}", family)
        trained = max(int(row["farthest"]) for row in of_probe if row["lengths"] == "trained")
        axis.axvline(trained, color="0.6", linewidth=0.8, linestyle=":")
        axis.axhline(float(of_probe[0]["chance"]), color="0.6", linewidth=0.8)
        axis.set(xscale="log", ylim=(-0.03, 1.03), title=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("distance in tokens", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    shown = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    lines_of = [shown[family] for family in families]
    figure.legend(lines_of, families, loc="outside upper center", ncols=len(families), frameon=False)
    figure.savefig(out, dpi=130)


def _curve(axis: Any, own: list[dict[str, str]], colour: str, label: str) -> None:
    """The mean of the seeds at each distance, trained and beyond, and the band from the lowest to the highest."""
    for lengths in ("trained", "beyond"):
        by_place: dict[int, list[tuple[float, float]]] = {}
        for row in own:
            if row["lengths"] == lengths:
                middle = (int(row["nearest"]) * int(row["farthest"])) ** 0.5
                by_place.setdefault(int(row["nearest"]).bit_length(), []).append((middle, float(row["accuracy"])))
        places = [np.array(by_place[key]) for key in sorted(by_place)]
        x, y = ([one[:, n].mean() for one in places] for n in (0, 1))
        style = {"marker": "o", "markersize": 3.5, "color": colour, "linewidth": 1.3, "label": label}
        if lengths == "beyond":
            style |= {"fillstyle": "none", "linestyle": "--", "label": None}
        axis.plot(x, y, **style)
        spread = [[reduce(one[:, 1]) for one in places] for reduce in (np.min, np.max)]
        axis.fill_between(x, *spread, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
