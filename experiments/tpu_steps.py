"""Training steps compiled for TPUs that are not here: memory, and what the compiled programs must and must not contain.

    python -m experiments.tpu_steps --out experiments/results/tpu_steps.csv         (hours on a small machine)
    python -m experiments.tpu_steps --tiny --out FILE                               (a minute or two; CI)

Needs `pip install 'jax[tpu]'` and no TPU; nothing is computed. Rows that the file has already are kept. Exit status 1
if a gate fails:

- of ternary families the forward products are s8 x s8 -> s32, and what fsdp gathers of their weights is codes;
- no host transfers, no involuntary rematerialisation, no collective permute but that of a token shift and the tail of a
  reduce-scatter; that the compiler would say that it rematerialises, a program shows that makes it;
- the kernels of the family are in the program.

The model of `lower` is held to the memory in the table by tests/lowering/test_memory.py.
"""

import argparse
import csv
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmfree_jax.config import FAMILIES, MeshConfig, RunConfig
from mmfree_jax.lowering.compiled import ABSENT, Compiled, compile_absent
from mmfree_jax.lowering.memory import policies
from mmfree_jax.lowering.program import rematerialisations
from mmfree_jax.presets import run_preset

COLUMNS = ("device", "preset", "mesh", "rows", "sequence", "remat", "documents")  # rows: sequences of a chip
FOUND = ("state", "temporaries", "code", "seconds", "refused", "products", "kernels", "faults")
KERNELS = {  # that a family's step has to contain, by a part of their names
    "transformer++": ("splash",),
    "bitnet": ("splash",),  # its one norm stands before the quantiser without a second one, and XLA computes it
    "matmul-free": ("recurrence", "gated_codes", "norm_codes", "swiglu_codes"),
    "matmul-free-rwkv4": ("recurrence", "norm_codes"),
    "hgrn": ("recurrence",),
}
MESHES = "fsdp=4", "fsdp=2;tensor=2", "fsdp=2;sequence=2", "fsdp=4;tensor=2;sequence=2"
CHIPS = "tpu-v6e", "tpu-v5e", "tpu-v5p"
WHOLE_ROWS = "gated_codes", "swiglu_codes"  # which tensor cuts: XLA computes them then
SMALL = 2**17  # elements: sums for scales, gains and states may travel in float32


def cases(tiny: bool) -> list[tuple[str, ...]]:
    """The rows of the table but for what is found, the most wanted first."""
    if tiny:
        slices = (("tpu-v5e", "fsdp=4"), ("tpu-v6e", "fsdp=4;tensor=2;sequence=2"))
        return [
            (device, f"{family}-tiny", mesh, "1", "256", "none", "0") for device, mesh in slices for family in FAMILIES
        ]
    main = "transformer++", "matmul-free"
    plain = "4", "2048", "none", "0"
    families = [*main, *(family for family in FAMILIES if family not in main)]
    found: list[tuple[str, ...]] = []
    found += [("tpu-v5e", f"{family}-370m", "fsdp=4", *plain) for family in families]
    found += [("tpu-v5e", f"{family}-1.3b", "fsdp=16", "2", *plain[1:]) for family in main]
    for family, mesh in itertools.product(main, MESHES[1:]):
        device = "tpu-v6e" if mesh.count("=") > 2 else "tpu-v5e"
        found.append((device, f"{family}-370m", mesh, *plain))
    found += spanning(families)
    for family in main:
        for remat in policies(run_preset(f"{family}-370m"))[1:]:
            found.append(("tpu-v5e", f"{family}-370m", "fsdp=4", "4", "2048", remat, "0"))
    for device, family in itertools.product(("tpu-v5p", "tpu-v6e"), main):
        found.append((device, f"{family}-370m", "fsdp=4", *plain))
    found += [("tpu-v5e", f"{family}-370m", "fsdp=4", "4", "2048", "none", "1") for family in main]
    return list(dict.fromkeys(found))


def spanning(families: list[str]) -> list[tuple[str, ...]]:
    """Rows with every pair of a family and a policy, a mesh or a device, and of a size and a device."""
    found: list[tuple[str, ...]] = []
    for shift, family in enumerate(families):
        for number, remat in enumerate(policies(run_preset(f"{family}-370m"))):
            mesh, device = MESHES[(number + shift) % len(MESHES)], CHIPS[(number + shift) % len(CHIPS)]
            found.append((device, f"{family}-370m", mesh, "4", "2048", remat, "0"))
    for family, device in (("transformer++", "tpu-v5p"), ("matmul-free", "tpu-v6e")):
        found.append((device, f"{family}-1.3b", "fsdp=16", "2", "2048", "none", "0"))
    return found


# A move of two axes at once, for which the partitioner knows nothing better than all of the array on every chip.
INVOLUNTARY = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from mmfree_jax.lowering.compiled import absent_devices

chips = np.array(absent_devices("tpu-v5e", 8)).reshape(4, 2)
mesh = Mesh(chips, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
place = lambda *axes: NamedSharding(mesh, P(*axes))
move = lambda w_LDF: jax.lax.with_sharding_constraint(2 * w_LDF, place(None, "fsdp", "tensor"))
w_LDF = jax.ShapeDtypeStruct((64, 64, 64), jnp.float32, sharding=place(("tensor", "fsdp"), None, None))
jax.jit(move).lower(w_LDF).compile()
"""


def provoked() -> int:
    """Count the rematerialisations of a program that makes the compiler do one, as `compile_absent` counts them."""
    done = subprocess.run(
        [sys.executable, "-c", INVOLUNTARY], env={**os.environ, **ABSENT}, stderr=subprocess.PIPE, text=True, check=True
    )
    return rematerialisations(done.stderr)


def run_of(device: str, preset: str, mesh: str, rows: str, sequence: str, remat: str, documents: str) -> RunConfig:
    """The run of a row."""
    run = run_preset(preset)
    sizes = MeshConfig(**{axis: int(size) for axis, size in (part.split("=") for part in mesh.split(";"))})
    data = dataclasses.replace(
        run.data,
        batch=int(rows) * sizes.devices // (sizes.tensor * sizes.sequence),
        sequence=int(sequence),
        separate_documents=documents == "1",
    )
    return dataclasses.replace(run, data=data, mesh=sizes, precision="bfloat16", remat=remat)  # type: ignore[arg-type]


def faults(run: RunConfig, found: Compiled) -> list[str]:
    """What is in a compiled step and should not be, or the other way round."""
    model, wrong = run.model, []
    ternary, family = model.linear == "ternary", model.family
    if ternary and not found.products.get("s8 x s8 -> s32"):
        wrong.append("no product of integers")
    for one in found.traffic:
        each = one.sent / one.count
        gathered = one.kind == "all-gather" and one.dtype == "f32" and "fsdp" in one.axes
        if ternary and gathered and each > 4 * SMALL:
            wrong.append(f"{one.count} all-gathers of {one.dtype}")
        # Tokens go to the chip that has their place in time, and RWKV-4 shifts by a step. What ends a reduce-scatter is
        # another kind (`hlo.TAIL`).
        if one.kind == "collective-permute" and model.mixer != "rwkv4" and one.dtype != "s32":
            wrong.append(f"{one.count} collective permutes of {one.dtype}")
    if found.host_transfers:
        wrong.append(f"{found.host_transfers} host transfers")
    if found.rematerialised:
        wrong.append(f"{found.rematerialised} involuntary rematerialisations")
    expected = [name for name in KERNELS[family] if run.mesh.tensor == 1 or name not in WHOLE_ROWS]
    wrong += [f"no {name} kernel" for name in expected if not any(name in kernel for kernel in found.kernels)]
    return wrong


def row(case: tuple[str, ...]) -> dict[str, Any]:
    """Compile one step and describe it."""
    run, began = run_of(*case), time.time()
    found = compile_absent(run, case[0])
    listed = lambda counts: " ".join(f"{name.replace(' ', '')}:{count}" for name, count in sorted(counts.items()))
    return {
        **dict(zip(COLUMNS, case, strict=True)),
        "state": round(found.state),
        "temporaries": round(found.temporaries),
        "code": round(found.code),
        "seconds": round(time.time() - began),
        "refused": found.refused,
        "products": listed(found.products),
        "kernels": listed(found.kernels),
        "faults": "; ".join([] if found.refused else faults(run, found)),
    }


def main() -> int:
    """Compile what the file lacks, and say which rows fail a gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="all families at 128 channels on two topologies")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no row is begun")
    options = parser.parse_args()
    began, kept = time.time(), list(csv.DictReader(options.out.open())) if options.out.exists() else []
    have = {tuple(one[name] for name in COLUMNS) for one in kept}
    with options.out.open("a", newline="") as file:
        table = csv.DictWriter(file, (*COLUMNS, *FOUND), lineterminator="\n")
        if not kept:
            table.writeheader()
        lacking = (case for case in cases(options.tiny) if case not in have)
        in_time = itertools.takewhile(lambda _: time.time() - began < options.limit, lacking)
        # Compilations of large steps take gigabytes each: one after the other.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for made in (pool.map if options.tiny else map)(row, in_time):
                table.writerow(made)
                file.flush()
                kept.append({name: str(value) for name, value in made.items()})
                print(*list(made.values())[:8], made["refused"], made["faults"], flush=True)
    failed, said = [one for one in kept if one["faults"]], provoked()
    print(f"{len(kept)} steps, {len(failed)} of them fail a gate; {said} of 1 provoked rematerialisation is counted")
    return 1 if failed or said != 1 else 0


if __name__ == "__main__":
    sys.exit(main())
