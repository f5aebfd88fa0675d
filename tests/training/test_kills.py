"""A run that is killed at random instants ends bit-identical to an undisturbed one: a short form of the experiment."""

import pytest

from experiments.reliability_kills import MOMENTS, one_round, table


@pytest.mark.slow
def test_a_run_killed_in_a_step_a_save_and_the_writing_of_its_result_is_the_same_run(tmp_path):
    chosen = [moment for moment in MOMENTS if moment.name in ("step", "checkpoint write", "result write")]
    kills = one_round(1, "matmul-free", 1, tmp_path, chosen)
    assert [kill["wrong"] for kill in kills] == [[]] * len(kills)
    assert len(kills) >= 2  # one may come too late
    assert "| step |" in table(kills)
