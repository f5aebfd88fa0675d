"""The verb `hardware`, with and without its extra."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mmfree_jax.commands import main
from mmfree_jax.hardware import cli, report
from mmfree_jax.hardware.instructions import CoreShape
from mmfree_jax.presets import model_preset
from tests.hardware.small import odd_model


def test_a_report_needs_no_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "amaranth", None)
    assert main(["hardware", "report", "--memory-bits", "8", "--mhz", "60"]) == 0
    said = capsys.readouterr().out
    assert "core of 8 bits of memory and 1 lanes at 60 MHz, 0.06 GB/s" in said
    assert "| block d=512 | 878,293 | 1.031 | 100.0% | 68.31 | 1139 |" in said
    assert "| Zhu et al. 2024, one core at 60 MHz | block d=512 | 23.26 | 0.06 | 387.6 | 33% | 13.7 | arXiv" in said


@pytest.mark.parametrize("verb", ["build", "simulate"])
def test_without_the_extra_one_line_says_what_to_install(verb, monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.startswith(("amaranth", "mmfree_jax.hardware.core"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("synthesis", "simulate"):
        monkeypatch.delitem(sys.modules, f"mmfree_jax.hardware.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "amaranth", None)
    _, folder = odd_model(tmp_path / "packed")
    out = ["--out", str(tmp_path / "out")] if verb == "build" else []
    assert main(["hardware", verb, str(folder), *out]) == 1
    said = capsys.readouterr().err.strip()
    assert "amaranth" in said
    assert "\n" not in said
    assert said.endswith("pip install 'mmfree-jax[hardware]'")


def test_modules_outside_the_core_import_without_the_extra():
    code = "import sys; sys.modules['amaranth'] = None; import mmfree_jax.hardware.cli, mmfree_jax.hardware.cycles"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["place"], "no verb 'place'; one of build, simulate, report"),
        (["report", "--mhz", "0"], "--mhz 0.0: must be positive"),
        (["report", "--memory-bits", "12"], "memory bits 12"),
        (["report", "--bandwidth", "-1"], "--bandwidth -1.0"),
        (["report", "--mhz", "inf"], "--mhz inf"),
        (["report", "--latency", "0"], "--latency 0: must be at least 1"),
        (["report", "--lanes", "-1"], "-1 lanes"),
        (["simulate", "nowhere", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["simulate", "nowhere", "--latency", "-3"], "--latency -3: must be at least 1"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys):
    assert main(["hardware", *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_half_the_bandwidth_is_nearly_half_the_speed():
    config = model_preset("matmul-free", "370m")
    shape = report.fitting(config, 64)
    full, half = (report.model_cycles(config, shape, report.MemoryModel(20, rate)).total for rate in (1.0, 0.5))
    assert 1.9 < half / full < 2.0


def test_cycles_of_many_layers_are_those_of_the_whole_program():
    config = model_preset("matmul-free", "tiny")
    shape = CoreShape(8, 1, 128, 384)
    whole = report.token_cycles(report.skeleton(config, shape))
    assert report.model_cycles(config, shape).total == pytest.approx(whole.total, abs=1)


@pytest.mark.parametrize("size", report.MODELS)
def test_with_8_bits_a_cycle_every_width_is_near_the_memory_bound(size):
    config = model_preset("matmul-free", size)
    block = report.block_cycles(config, report.fitting(config, 8))
    assert block.products < block.bound / 0.95
    assert block.total < 1.15 * block.bound


def test_a_block_of_512_takes_at_most_a_million_cycles():
    block = report.block_cycles(report.paper_block(), report.fitting(report.paper_block(), 8))
    assert block.bound == 851_968
    assert block.total < 1_000_000


def test_energy_is_counted_by_operations():
    config, shape = report.paper_block(), CoreShape(8, 1, 512, 1536)
    memory, core = report.energy(report.skeleton(config, shape))
    weights = 4 * 512**2 + 3 * 512 * 1536 + 512 * config.vocab
    assert memory == pytest.approx(weights * 2 * 20e-12, rel=0.02)  # nearly all bits are weights
    assert core > weights * 0.1e-12


def test_build_writes_what_a_board_needs(tmp_path):
    pytest.importorskip("amaranth", reason="needs the extra `hardware`")
    from mmfree_jax.hardware.tools import run_yosys

    _, folder = odd_model(tmp_path / "packed")
    assert main(["hardware", "build", str(folder), "--out", str(tmp_path / "core"), "--memory-bits", "16"]) == 0
    program, image = cli.compile_for(folder, cli.Sizes(16, 0))
    assert (tmp_path / "core/memory.bin").read_bytes() == image
    assert (tmp_path / "core/program.txt").read_text() == str(program)
    words = np.array([[int(n, 16) for n in line.split()] for line in (tmp_path / "core/program.hex").open()])
    assert len(words) == 4 * len(program.instructions) + 3 * (len(program.loads) + 1)
    assert json.loads((tmp_path / "core/core.json").read_text())["core"]["width"] == 37
    # Another toolchain reads the Verilog: every module is there, and nothing is left undriven.
    said = run_yosys("read_verilog core.v; hierarchy -check -top core; proc; check -assert", tmp_path / "core")
    assert "Found and reported 0 problems." in said
