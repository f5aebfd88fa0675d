"""What the tests share: a small token set, and small runs of both main families on it."""

import dataclasses
import gc
import json
import os
from pathlib import Path

from tests.compiling import xla_flags

os.environ.setdefault("XLA_FLAGS", xla_flags())  # before JAX loads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run beside each other: waiting threads would spin

import hypothesis
import jax
import numpy as np
import pytest

from mmfree_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests compile, for later tests and for the next session.

    Each process of pytest-xdist has a folder of its own: JAX does not write atomically, and another would read half.
    """
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    folder = config.cache.mkdir(f"compiled-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Give each process a stretch of the tests, so that tests of one file share its fixtures and compiled programs."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """The cache folder of the commands that tests run: what one has compiled the next one finds."""
    return tmp_path_factory.mktemp("programs")


hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

MAIN_FAMILIES = ("transformer++", "matmul-free")


def sentences(count: int, seed: int) -> list[str]:
    """Documents of made-up text with some structure to learn."""
    rng = np.random.default_rng(seed)
    words = "the loss of a model falls with compute while data and parameters grow together in time".split()
    return [" ".join(rng.choice(words, rng.integers(20, 80))) + "." for _ in range(count)]


# A compiled program takes three memory mappings. Linux allows a process 65,530: one that asks for more is killed.
MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Unload compiled programs between modules once there are many: one process runs thousands of tests."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch):
    """Runs in the tests' own process skip the comparison before the first step, which compiles more than they do.
    tests/training/test_self_check.py tests it; commands in processes of their own make it."""
    monkeypatch.setattr("mmfree_jax.training.loop.self_check", lambda *a: None)


@pytest.fixture(scope="session")
def token_set(tmp_path_factory) -> TokenSet:
    """About 60 thousand training and 6 thousand held-out byte tokens."""
    path = tmp_path_factory.mktemp("corpus") / "tiny"
    texts = {"train": sentences(250, 0), "valid": sentences(25, 1)}
    return write_token_set(path, texts, byte_tokenizer(), {"name": "tiny", "description": "made up", "sources": []})


def tiny_model(family: str, **changes) -> ModelConfig:
    """Two layers of width 16 over bytes."""
    shape = {"vocab": 257, "width": 16, "depth": 2, "glu_width": 32, **changes}
    if family == "transformer++":
        return ModelConfig(mixer="attention", linear="dense", **{"heads": 2, **shape})
    assert family == "matmul-free"
    return ModelConfig(mixer="mlgru", linear="ternary", **shape)


def tiny_run(family: str, corpus: Path, **changes) -> RunConfig:
    """Twelve steps of 4 x 32 tokens, a checkpoint every five."""
    run = RunConfig(
        name=f"{family}-tiny",
        model=tiny_model(family),
        data=DataConfig(corpus=str(corpus), vocab=257, sequence=32, batch=4),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, decay_steps=4),
        steps=12,
        log_every=2,
        checkpoint_every=5,
    )
    return dataclasses.replace(run, **changes)


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
