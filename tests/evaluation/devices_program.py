"""Answers of one model on one and on all devices, and what each device computed: the model's folder; prints JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from mmfree_jax.evaluation import likelihood
from mmfree_jax.weights import load_model


def main(folder: Path) -> None:
    likelihood.SHORTEST, likelihood.BATCH_TOKENS = 32, 128
    used: set[int] = set()
    start = likelihood._start

    def noted(model, batch, arrays, device):
        pieces = start(model, batch, arrays, device)
        used.update(one.id for piece in pieces for array in piece for one in array.devices())
        return pieces

    likelihood._start = noted
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(1, 300, rng.integers(1, most)).tolist()
    requests = [(draw(24), draw(6)) for _ in range(64)]
    model = likelihood.scorable(load_model(folder))
    one, several = (likelihood.log_likelihoods(model, requests, 64, devices=d) for d in (jax.devices()[:1], None))
    print(json.dumps({"one": one, "several": several, "used": sorted(used)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
