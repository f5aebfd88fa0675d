"""D, U and FLOPs of runs that go on from what others wrote. The numbers themselves are for tests/test_axes.py."""

import dataclasses

import pytest

from mmfree_jax.data import TokenSet
from mmfree_jax.data.building.packing import pack
from mmfree_jax.files import read_json
from mmfree_jax.training import loop
from mmfree_jax.training.interrupt import Interrupted
from mmfree_jax.training.loop import train
from tests.conftest import read_metrics, tiny_run
from tests.training.stopping import stop_after


def counted(folder) -> list:
    result = read_json(folder / "result.json")
    return [(row["step"], row["tokens"], row["flops"]) for row in read_metrics(folder)] + [
        result[name] for name in ("D", "U", "flops")
    ]


def test_a_stopped_run_goes_on_counting_and_averaging(token_set: TokenSet, tmp_path, monkeypatch):
    """Padding does not count, and the step at which it is stopped is in the middle of a row of metrics."""
    packed = pack(token_set, tmp_path / "packed", 32)
    run = tiny_run("transformer++", packed.path, evaluate=False, log_every=4, checkpoint_every=0)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, separate_documents=True))
    train(run, tmp_path / "whole", packed)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Diagnostics", stop_after(6))
        with pytest.raises(Interrupted):
            train(run, tmp_path / "stopped", packed)
    result = train(run, tmp_path / "stopped", packed)
    assert counted(tmp_path / "stopped") == counted(tmp_path / "whole")
    assert 0.5 * run.positions < result["D"] == result["U"] < run.positions
    assert [row["loss"] for row in read_metrics(tmp_path / "stopped")] == [
        row["loss"] for row in read_metrics(tmp_path / "whole")
    ]
