"""The verbs on trained models: `evaluate`, `import`, `export`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax import api, distributed
from mmfree_jax.command_line import parse
from mmfree_jax.commands.train import Processes
from mmfree_jax.config import MeshConfig, ModelConfig
from mmfree_jax.evaluation.loss import score_lines
from mmfree_jax.flops import parameters
from mmfree_jax.interop.huggingface import load_huggingface, read_origin
from mmfree_jax.output import program
from mmfree_jax.weights import model_config, save_model


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Compute the held-out loss of a model: a run directory, an imported folder or a Hugging Face folder."""

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    corpus: str = ""
    """Corpus, or folder of a token set (default: that of the run; required for other models)."""
    sequence: int = 0
    """Tokens in a window (default: that of the run, else 2048)."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices to evaluate on, which may differ from those of training."""
    group: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)


@dataclasses.dataclass(frozen=True)
class ImportArguments:
    """Convert a Hugging Face folder (hgrn_bit or Llama) into a model for `train --init` and `evaluate`."""

    source: tyro.conf.Positional[Path]
    """Hugging Face folder: config.json and safetensors."""
    out: Path
    """New folder."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a model as a Hugging Face folder."""

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    out: Path
    """New folder."""
    format: Literal["huggingface"] = "huggingface"
    """File format."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the tensors on disk."""


def evaluate(arguments: list[str]) -> int:
    """Print the held-out loss of a model."""
    chosen = parse(EvaluateArguments, arguments, f"{program()} evaluate")
    chosen.group.join()
    warn = lambda line: print(line, file=sys.stderr)
    scores = api.evaluate(chosen.model, chosen.corpus, sequence=chosen.sequence, mesh=chosen.mesh, say=warn)
    if distributed.is_first():
        print("\n".join(score_lines(scores)))
    return 0


def import_model(arguments: list[str]) -> int:
    """Convert a Hugging Face folder into one of ours."""
    chosen = parse(ImportArguments, arguments, f"{program()} import")
    model = load_huggingface(chosen.source)
    save_model(model, chosen.out, read_origin(chosen.source))
    print(f"{_size(model.config)} · {chosen.out}")
    return 0


def export_model(arguments: list[str]) -> int:
    """Convert a model into a Hugging Face folder."""
    chosen = parse(ExportArguments, arguments, f"{program()} export")
    api.export(chosen.model, chosen.out, dtype=chosen.dtype)
    config = model_config(chosen.model)
    padding = config.vocab - config.tokenizer_vocab if config.tokenizer_vocab else 0
    print(f"{_size(config)}{f', without {padding} tokens of padding' * (padding > 0)} · {chosen.out}")
    return 0


def _size(config: ModelConfig) -> str:
    return f"{config.family}, {parameters(config).total:,} parameters"
