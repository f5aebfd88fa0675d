"""`lower --serve`: sizes are those of the files and states themselves, and times follow what is read."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import pytest

from mmfree_jax import commands
from mmfree_jax.config import FAMILIES
from mmfree_jax.devices import DEVICES
from mmfree_jax.inference.engine import Engine
from mmfree_jax.inference.model import load_packed
from mmfree_jax.inference.packed import abstract_tensors, map_tensors, save_packed
from mmfree_jax.lowering.serving import ServingArguments, bytes_read, find_config, serving_memory, token_time
from mmfree_jax.ops.fast.cpu.library import find_compiler
from tests.inference.small import made

H200 = DEVICES["h200"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["planes", "trits"])
def test_weights_and_state_are_those_of_the_model_itself(tmp_path, family, layout):
    save_packed(made(family), tmp_path / "packed", layout=layout)
    config, chosen = find_config(str(tmp_path / "packed")), ServingArguments(str(tmp_path), 100, 3, layout=layout)
    held = {name: a.nbytes for name, a in map_tensors(tmp_path / "packed" / "model.safetensors").items()}
    assert {one.name: one.size for one in abstract_tensors(config, "bfloat16", layout)} == held
    memory = serving_memory(config, chosen)
    assert memory.codes + memory.matrices == sum(held.values())
    engine = Engine(load_packed(tmp_path / "packed", "bfloat16"), 3, 100)
    state = sum(a.nbytes for a in jax.tree.leaves(engine._progress.state.mixers))
    assert memory.state == state


def predicted(model: str, context: int = 2048, batch: int = 1) -> tuple[float, float]:
    chosen, config = ServingArguments(model, context, batch), find_config(model)
    return serving_memory(config, chosen).total, token_time(config, chosen, H200).total


def test_what_grows_with_context_and_batch_and_what_does_not():
    free, plain = predicted("matmul-free-1.3b"), predicted("transformer++-1.3b")
    assert plain[0] > 6 * free[0]
    assert plain[1] > 2.5 * free[1]
    longer = predicted("matmul-free-1.3b", context=32_768)
    assert longer[0] < 1.001 * free[0]
    assert longer[1] == free[1]
    assert predicted("transformer++-1.3b", context=32_768)[1] > 1.3 * plain[1]
    assert predicted("transformer++-1.3b", batch=64)[1] > 2 * plain[1]


def test_predictions_are_those_measured():
    """Memory, but for the prompt that is read meanwhile, within 10 % and time within 25 % of a table from an H200."""
    table = Path(__file__).parents[2] / "experiments" / "results" / "h200_decode.csv"
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["kernels"] == "auto"]
    assert len(rows) >= 6
    for row in rows:
        dtype = "bfloat16" if row["preset"].startswith("transformer") else "float32"
        form = {"layout": row["layout"], "embedding": row["embedding"]}
        chosen = ServingArguments(row["preset"], int(row["context"]), int(row["batch"]), dtype=dtype, **form)
        config = find_config(row["preset"])
        memory, time = serving_memory(config, chosen), token_time(config, chosen, H200)
        assert memory.total - memory.prompt == pytest.approx(1e9 * float(row["resident_gb"]), rel=0.10), row
        assert time.total == pytest.approx(1e-3 * float(row["ms"]), rel=0.25), (row, time, "fit lowering.serving.RATES")


def test_the_command_says_whether_it_fits(capsys):
    assert commands.main(["lower", "matmul-free-13b", "--serve", "--batch", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["memory"]["total"] == pytest.approx(sum(v for k, v in found["memory"].items() if k != "total"))
    assert found["tokens_per_s"] == pytest.approx(8 / found["time"]["total"])
    assert commands.main(["lower", "transformer++-13b", "--serve", "--device", "tpu-v5e"]) == 2
    assert "does not fit" in capsys.readouterr().out.splitlines()[-1]
    assert commands.main(["lower", "matmul-free-tiny", "--serve", "--device", "cpu"]) == 0
    assert commands.main(["lower", "matmul-free-tiny", "--serve", "--context", "0"]) == 1
    assert commands.main(["lower", "matmul-free-tinny", "--serve"]) == 1
    assert "matmul-free-tiny" in capsys.readouterr().err


def test_what_is_stored_and_computed_in_changes_what_is_needed():
    config = find_config("matmul-free-370m")
    sizes = {
        stored: serving_memory(config, dataclasses.replace(ServingArguments("", 8), stored=stored)).matrices
        for stored in ("bfloat16", "float32")
    }
    embedding = config.vocab * config.width
    assert sizes["float32"] - sizes["bfloat16"] == 2 * embedding


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_a_cpu_reads_bfloat16_as_it_lies_where_few_rows_decode():
    """More rows are multiplied by XLA, which makes a float32 copy first: two bytes are read, four written and read."""
    config = find_config("transformer++-370m")
    held = sum(one.size for one in abstract_tensors(config, "bfloat16", "planes") if one.name != "embedding")
    few, many = (bytes_read(config, ServingArguments("transformer++-370m", 256, b, device="cpu"))[0] for b in (1, 16))
    assert few == held
    assert many > 1.9 * held
