"""Configs: validated on construction, a lossless JSON round trip, a fingerprint that notices every change."""

import dataclasses
import json

import pytest

from mmfree_jax.config import (
    FAMILIES,
    Branch,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    from_json,
    to_json,
)


def attention(**changes) -> ModelConfig:
    return ModelConfig(**{"mixer": "attention", "linear": "dense", "width": 64, "heads": 4, **changes})


RUN = RunConfig(
    "r",
    attention(),
    branch=Branch("t", 40),
    milestones=(20, 60),
    optim=OptimConfig(decay_steps=50, lr=1 / 3),
    steps=100,
)
DECAYING = OptimConfig(decay_steps=10)


def test_json_round_trip_is_exact():
    assert from_json(RunConfig, to_json(RUN)) == RUN


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_config_that_knows_its_name(name):
    mixer, linear = FAMILIES[name]
    assert ModelConfig(mixer=mixer, linear=linear, width=64).family == name


def leaves(config, path=()):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name), value


@pytest.mark.parametrize("path", [p for p, v in leaves(RUN) if isinstance(v, int | float) and not isinstance(v, bool)])
def test_fingerprint_notices_a_change_of_any_number(path):
    values = json.loads(to_json(RUN))
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = at[path[-1]] * 2 if at[path[-1]] else 1
    try:
        changed = from_json(RunConfig, json.dumps(values))
    except ConfigError:
        return  # an impossible value needs no fingerprint
    assert changed.fingerprint() != RUN.fingerprint()


def test_fingerprint_is_the_same_in_every_process():
    assert RunConfig("x").fingerprint() == from_json(RunConfig, to_json(RunConfig("x"))).fingerprint()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: attention(heads=5), "does not divide model.width=64.*use one of 1, 2, 4, 8"),
        (lambda: attention(heads=64), "even heads"),
        (lambda: attention(kv_heads=3), "must divide model.heads=4"),
        (lambda: attention(activation_bits=4), "would do nothing: linear=dense"),
        (lambda: attention(output_gate="paper"), "would do nothing: mixer=attention"),
        (lambda: ModelConfig(heads=8), "has no heads"),
        (lambda: ModelConfig(rope_theta=5e5), "has no rotary embeddings"),
        (lambda: attention(rope_theta=-1.0), "rope_theta=-1.0: must be positive"),
        (lambda: OptimConfig(schedule="constant", final_lr=0.1), "would do nothing with schedule=constant"),
        (lambda: OptimConfig(schedule="wsd", final_lr=0.1), "or the length of a decay"),
        (lambda: RunConfig("r", attention(), optim=OptimConfig(bounds_lr=2.0)), "has no lower bounds"),
        (lambda: RunConfig("r", ModelConfig(tie_embeddings=True), optim=OptimConfig(head_lr=2.0)), "embedding_lr"),
        (lambda: ModelConfig(mixer="lstm"), "mixer='lstm': choose one of attention, mlgru, rwkv4"),
        (lambda: ModelConfig(width=0), "at least 1"),
        (lambda: OptimConfig(lr=0.0), "positive"),
        (lambda: OptimConfig(lr=float("nan")), "positive"),
        (lambda: OptimConfig(schedule="cosine", decay_steps=5), "would do nothing with schedule=cosine"),
        (lambda: RunConfig("r", steps=60, optim=OptimConfig(warmup_steps=50, decay_steps=20)), "exceed steps=60"),
        (lambda: RunConfig("r", data=DataConfig(batch=10), mesh=MeshConfig(data=4)), "batch=10 is not .*use 8"),
        (lambda: RunConfig("r", data=DataConfig(batch=8), optim=OptimConfig(accumulate=3)), "use 6"),
        (lambda: DataConfig(mixture=("s",), weights=(1.0,)), "one positive number for data.corpus and each of"),
        (lambda: DataConfig(weights=(0.0,)), "one positive number"),
        (lambda: RunConfig("r", mesh=MeshConfig(sequence=3)), "sequence=256 is not divisible"),
        (lambda: RunConfig("r", steps=100, optim=DECAYING, branch=Branch("t", 91)), "inside the decay"),
        (lambda: RunConfig("r", steps=100, branch=Branch("t", 100)), "branch.step=100 leaves nothing of steps=100"),
        *((lambda name=name: RunConfig(name), "plain file name") for name in ("a/b", "..", "-x", "")),
    ],
)
def test_impossible_values_say_what_to_change(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"name": "r", "optim": {"lrr": 1}}', r"optim.lrr: no such key \(did you mean lr\?\)"),
        ('{"name": "r", "steps": "many"}', "steps: expected int, found 'many'"),
        ('{"name": "r", "steps": true}', "steps: expected int"),
        ('{"name": "r", "model": 3}', "model.: expected an object"),
        ('{"name": "r", "milestones": 3}', "milestones: expected a list"),
        ("{", "not JSON"),
    ],
)
def test_wrong_json_names_the_key(text, says):
    with pytest.raises(ConfigError, match=says):
        from_json(RunConfig, text)
