"""Fixtures of the hardware's tests: packed models, compiled programs, a simulated core."""

import os
import shutil
from pathlib import Path

import pytest

import mmfree_jax
from mmfree_jax.hardware.assembler import assemble
from tests.conftest import tiny_run
from tests.hardware.small import CORES, odd_model


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """The model of odd sizes, its program for three lanes, and the image."""
    model, folder = odd_model(tmp_path_factory.mktemp("odd") / "packed")
    return model, *assemble(folder, CORES["three lanes"])


@pytest.fixture(scope="session")
def trained(token_set, tmp_path_factory) -> Path:
    """A folder with a small trained model: `run`, and `packed` as `export` writes it."""
    folder = tmp_path_factory.mktemp("trained")
    mmfree_jax.train(tiny_run("matmul-free", token_set.path, steps=60, checkpoint_every=60), folder / "run")
    mmfree_jax.export(folder / "run", folder / "packed", format="packed")
    return folder


@pytest.fixture(scope="session")
def simulation(tmp_path_factory) -> Path:
    """The simulation of a core of three lanes."""
    if "REQUIRE_SIMULATION" not in os.environ:
        pytest.importorskip("amaranth", reason="needs the extra `hardware`")
    from mmfree_jax.hardware.simulate import COMPILERS, build_simulation

    if "REQUIRE_SIMULATION" not in os.environ and not any(map(shutil.which, COMPILERS)):
        pytest.skip("needs a C++ compiler")
    return build_simulation(CORES["three lanes"], tmp_path_factory.mktemp("simulation"))
