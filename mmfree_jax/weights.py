"""A model on disk, of whichever kind: a run directory, an imported folder, or a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, from_json, to_json
from mmfree_jax.distributed import put
from mmfree_jax.files import read_json, write_atomically, write_json
from mmfree_jax.interop import UNKNOWN, Origin, load_huggingface, read_config, read_origin, read_parameters
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.training.checkpoint import Checkpoints, restore, restore_params
from mmfree_jax.training.folder import corpus_facts
from mmfree_jax.training.optim import make_optimizer
from mmfree_jax.training.step import TrainState

ORIGIN = "origin.json"  # in an imported folder: what its source says about the text that it was trained on
MODEL = "model.json"  # in an imported folder, instead of a run's config.json


def model_config(path: Path) -> ModelConfig:
    """The architecture of a model on disk. Raises ConfigError for a folder that is none of the known kinds."""
    if (path / MODEL).exists():
        return from_json(ModelConfig, (path / MODEL).read_text(encoding="utf-8"), str(path / MODEL))
    if not (path / "config.json").exists():
        raise ConfigError(f"{path} is not a model: it has neither {MODEL} nor config.json")
    if is_run(path):
        return run_config(path).model
    return read_config(path)


def run_config(path: Path) -> RunConfig:
    """The config of the run that made a model, on one device; for others a default one with their architecture."""
    if is_run(path):
        here = {"mesh": {}, "gather": "int8", "reduction": "compute"}  # the last two need a mesh
        return from_json(RunConfig, json.dumps(read_json(path / "config.json") | here), str(path / "config.json"))
    model = model_config(path)
    return RunConfig("model", model, DataConfig(vocab=max(257, model.vocab), sequence=2048))


def load_model(path: Path, dtype: str = "float32") -> LanguageModel:
    """Read a model with float32 parameters and activations of `dtype`; of a run, its newest checkpoint.

    Raises ConfigError (not a model), CheckpointError (a run without a checkpoint, a damaged folder).
    """
    config = model_config(path)
    if _is_huggingface(path):
        return load_huggingface(path, dtype)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    here = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)
    return nnx.merge(graph, load_params(path, here))


def load_params(path: Path, abstract: Any) -> nnx.State:
    """Read the parameters of a model onto the devices of any mesh.

    abstract: a tree of ShapeDtypeStructs with shardings, which says where each goes. Only parameters are read; of a run
    or an imported folder each process reads the shards that its devices hold. A Hugging Face folder passes whole
    through the host memory of each process, but not through its devices' memory.
    Raises ConfigError (not a model, another architecture), CheckpointError, InteropError.
    """
    config = model_config(path)
    if is_run(path):
        opt = jax.eval_shape(make_optimizer(run_config(path).optim, config).init, abstract)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        return restore_params(path / "checkpoints", TrainState(step, abstract, opt))
    if not _is_huggingface(path):
        return restore(path / "checkpoints", abstract)[0]
    return jax.tree.map(lambda host, a: put(host, a.sharding), read_parameters(path, abstract), abstract)


def origin(path: Path) -> Origin:
    """What is known of the text that a model on disk was trained on, from its run here or from its source.

    Documents of a corpus here are separated by one token, which is both their first and their last.
    """
    if is_run(path):
        end = corpus_facts(path).get("end_of_document")
        return Origin(bos=end, eos=end, positions=run_config(path).data.sequence)
    if (path / MODEL).exists():
        return Origin(**read_json(path / ORIGIN)) if (path / ORIGIN).exists() else UNKNOWN
    return read_origin(path)


def save_model(model: LanguageModel, path: Path, known: Origin = UNKNOWN) -> None:
    """Write parameters, architecture and what is known of the text into a new folder.

    Raises ConfigError if the folder is not empty.
    """
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path} exists and is not an empty folder: choose another")
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(nnx.state(model, nnx.Param), {"kind": "weights"}, 0)
    write_json(path / ORIGIN, known._asdict())
    write_atomically(path / MODEL, to_json(model.config) + "\n")  # last: a folder without it is not a model


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run here, and not an imported or a Hugging Face folder."""
    return (path / "config.json").exists() and "model_type" not in read_json(path / "config.json")


def _is_huggingface(path: Path) -> bool:
    return not (path / MODEL).exists() and not is_run(path)
