"""Models on disk: run directories, imported folders and Hugging Face folders."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.checkpoint import Checkpoints, restore, restore_params
from mmfree_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, from_json, require, to_json
from mmfree_jax.distributed import put
from mmfree_jax.files import read_json, write_atomically, write_json
from mmfree_jax.interop.huggingface import UNKNOWN, Origin, load_huggingface, read_config, read_origin, read_parameters
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import run_preset
from mmfree_jax.run_folder import corpus_facts, saved_run

ORIGIN = "origin.json"  # in an imported folder: what its source says about the training text
MODEL = "model.json"  # in an imported folder, instead of a run's config.json
CHOICES_OF_RUN = ("gradient_bits", "tokenizer_vocab")  # fields of ModelConfig that do not change the weights


def model_config(path: Path) -> ModelConfig:
    """Return the architecture of a model on disk. Raises ConfigError for a folder of another kind."""
    if (path / MODEL).exists():
        return from_json(ModelConfig, (path / MODEL).read_text(encoding="utf-8"), str(path / MODEL))
    if not (path / "config.json").exists():
        raise ConfigError(f"{path} is not a model: it has neither {MODEL} nor config.json")
    if is_run(path):
        return run_config(path).model
    return read_config(path)


def run_config(path: Path) -> RunConfig:
    """Return the config of the run that made a model, on one device; for other models a default with their
    architecture."""
    # A run of eight GPUs is read on one device; other meshes and what only they can have are dropped.
    if is_run(path):
        here = {"mesh": {}, "gather": "int8", "reduction": "compute"}  # the last two need a mesh
        return from_json(RunConfig, json.dumps(read_json(path / "config.json") | here), str(path / "config.json"))
    model = model_config(path)
    return RunConfig("model", model, DataConfig(vocab=max(257, model.vocab), sequence=2048))


def load_model(path: Path, dtype: str = "float32") -> LanguageModel:
    """Load a model with float32 parameters and activations of `dtype`; of a run, its newest checkpoint.

    Raises ConfigError (not a model), CheckpointError (a run without a checkpoint, a damaged folder).
    """
    config = model_config(path)
    if _is_huggingface(path):
        return load_huggingface(path, dtype)
    # The model is never initialised: its structure comes from an abstract evaluation, its arrays from the file.
    graph, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    here = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)
    return nnx.merge(graph, load_params(path, here))


def load_params(path: Path, abstract: Any, step: int | None = None) -> nnx.State:
    """Load the parameters of a model onto the devices of any mesh.

    abstract: a tree of ShapeDtypeStructs with the target shardings. step: of a run's checkpoint; None: the newest. Only
    parameters are read. Of a run or an imported folder each process reads the shards that its devices hold; a Hugging
    Face folder is read completely into the host memory of each process, but not into the memory of each device.
    Raises ConfigError (not a model, another architecture), CheckpointError, InteropError.
    """
    if is_run(path):
        return restore_params(path / "checkpoints", abstract, step)
    if not _is_huggingface(path):
        return restore(path / "checkpoints", abstract)[0]
    return jax.tree.map(lambda host, a: put(host, a.sharding), read_parameters(path, abstract), abstract)


def with_initial_weights(run: RunConfig, preset: str, out: Path) -> RunConfig:
    """Return the run with the architecture of the weights that it starts from (`run.init`), if there are any.

    preset: the name of the preset that the run was made from, which shows what the user has overridden. out: the run's
    folder; once it holds a checkpoint, it holds the architecture too, and the weights need not exist any more.
    Raises ConfigError if the weights are of another family than the preset, whose rate and schedule would not fit, or
    if the user has asked for another architecture than theirs.
    """
    held, init = saved_run(out), run.init and str(Path(run.init).resolve())
    if held is not None and held.init and init in ("", held.init):
        run, found = dataclasses.replace(run, init=held.init), held.model
    elif run.init:
        found = model_config(Path(run.init))
    else:
        return run
    usual = run_preset(preset).model
    require(
        found.family == usual.family,
        f"init={run.init} holds a model of family {found.family}, and {preset} is of {usual.family}: take a preset of "
        f"{found.family}",
    )
    # What the user has not overridden still has the preset's value; what differs from both was asked for, and cannot be
    # had.
    for name in (field.name for field in dataclasses.fields(found) if field.name not in CHOICES_OF_RUN):
        asked = getattr(run.model, name)
        require(
            asked in (getattr(usual, name), getattr(found, name)),
            f"model.{name}={asked!r}, but init={run.init} has {getattr(found, name)!r}: leave it out",
        )
    return dataclasses.replace(run, init=str(Path(run.init).resolve()), model=with_choices_of(found, run.model))


def with_choices_of(found: ModelConfig, model: ModelConfig) -> ModelConfig:
    """Return the architecture `found` of some weights, with what a run of `model` may choose for itself."""
    return dataclasses.replace(found, **{name: getattr(model, name) for name in CHOICES_OF_RUN})


def origin(path: Path) -> Origin:
    """Return what is known about the training text of a model on disk, from its run or its source.

    Documents of our corpora are separated by one token, which is both the first and the last of a document.
    """
    if is_run(path):
        end = corpus_facts(path).get("end_of_document")
        return Origin(bos=end, eos=end, positions=run_config(path).data.sequence)
    if (path / MODEL).exists():
        return Origin(**read_json(path / ORIGIN)) if (path / ORIGIN).exists() else UNKNOWN
    return read_origin(path)


def save_model(model: LanguageModel, path: Path, source: Origin = UNKNOWN) -> None:
    """Write parameters, architecture and what is known about the training text into a new folder.

    Raises ConfigError if the folder is not empty.
    """
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path} exists and is not an empty folder: choose another")
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(nnx.state(model, nnx.Param), {"kind": "weights"}, 0)
    write_json(path / ORIGIN, source._asdict())
    write_atomically(path / MODEL, to_json(model.config) + "\n")  # last: a folder without it is not a model


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory, and not an imported or a Hugging Face folder."""
    return (path / "config.json").exists() and "model_type" not in read_json(path / "config.json")


def _is_huggingface(path: Path) -> bool:
    return not (path / MODEL).exists() and not is_run(path)
