"""docs/hardware.md shows the core and its programs as they are."""

from pathlib import Path

import pytest

from mmfree_jax.hardware.assembler import skeleton
from mmfree_jax.hardware.instructions import CoreShape
from mmfree_jax.hardware.report import published_table
from mmfree_jax.presets import model_preset

TEXT = (Path(__file__).parents[2] / "docs/hardware.md").read_text(encoding="utf-8")


def test_the_diagram_is_that_of_the_wires():
    pytest.importorskip("amaranth", reason="needs the extra `hardware`")
    from mmfree_jax.hardware.core.diagram import mermaid

    assert f"```mermaid\n{mermaid()}\n```" in TEXT


def test_every_unit_and_wire_is_in_the_diagram():
    pytest.importorskip("amaranth", reason="needs the extra `hardware`")
    from mmfree_jax.hardware.core.core import UNITS
    from mmfree_jax.hardware.core.diagram import mermaid

    lines = mermaid().splitlines()
    assert all(f"    {name}[{name} unit]" in lines for name in UNITS)
    assert "    reader -->|word| ternary" in lines
    assert "    ternary -->|sums| vector" in lines


def test_the_program_is_that_of_the_assembler():
    program = skeleton(model_preset("matmul-free", "tiny"), CoreShape(8, 1, 128, 384))
    first = [str(i) for i in program.instructions[1:26]]
    assert "```\n" + "\n".join(first) + "\n```" in TEXT


def test_published_designs_are_those_of_the_report():
    assert "\n".join(published_table()) in TEXT
