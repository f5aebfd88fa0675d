"""The verbs on trained models: `evaluate`, `generate`, `serve`, `import`, `export`."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmfree_jax import api, distributed
from mmfree_jax.command_line import parse
from mmfree_jax.commands.train import Processes
from mmfree_jax.config import ConfigError, MeshConfig, ModelConfig, require
from mmfree_jax.data.reading.token_set import TOKENIZER
from mmfree_jax.devices import use_compile_cache
from mmfree_jax.evaluation.loss import score_lines
from mmfree_jax.files import cache_folder
from mmfree_jax.flops import parameters
from mmfree_jax.inference.sampling import PLAIN, Sampling
from mmfree_jax.inference.text import load_text_model, text_files
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
class GenerateArguments:
    """Complete a prompt, or every line of a file, with any model: a run, an imported, packed or Hugging Face folder."""

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    prompt: str = ""
    """Text to complete; empty begins a document."""
    file: Path | None = None
    """File of prompts, one a line, instead: completions come as JSON, one object a line in the same order."""
    max_tokens: int = 128
    """Tokens to generate, at most."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = PLAIN
    stop: tuple[str, ...] = ()
    """Strings at which the text ends."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    embedding: Literal["device", "host"] = "device"
    """host: leave the embedding in the host's memory, or in the mapped file of a packed model."""


@dataclasses.dataclass(frozen=True)
class ImportArguments:
    """Convert a Hugging Face folder (hgrn_bit, BitNet or Llama) into a model for `train --init` and `evaluate`."""

    source: tyro.conf.Positional[Path]
    """Hugging Face folder: config.json and safetensors."""
    out: Path
    """New folder."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a model for others to run: a Hugging Face folder, a packed folder, or a GGUF file."""

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    out: Path
    """New folder, or new file of format gguf."""
    format: Literal["huggingface", "packed", "gguf"] = "huggingface"
    """huggingface: for transformers and the official code. packed: for `generate`, with ternary weights in 2 bits.
    gguf: for llama.cpp (docs/llama-cpp.md)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of what is not ternary codes. Default: float32 for huggingface, bfloat16 for packed. gguf has --type."""
    type: Literal["auto", "tq2_0", "tq1_0", "q2_0", "f16", "f32"] = "auto"
    """Of a GGUF file's matrices; auto: tq2_0 for ternary models, f16 for dense ones."""
    layout: Literal["planes", "trits"] = "planes"
    """Of the codes of format packed: planes take 2 bits, trits 1.6, which is slower to compute with."""


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
    for file in [chosen.source / TOKENIZER, *text_files(chosen.source)]:
        if file.is_file():
            shutil.copyfile(file, chosen.out / file.name)
    print(f"{_size(model.config)} · {chosen.out}")
    return 0


def generate(arguments: list[str]) -> int:
    """Print what a model makes of prompts: the text of one as it comes, those of a file as JSON."""
    chosen = parse(GenerateArguments, arguments, f"{program()} generate")
    require(chosen.max_tokens >= 1, f"--max-tokens {chosen.max_tokens}: must be at least 1")
    require(not (chosen.prompt and chosen.file), "give --prompt or --file, not both")
    use_compile_cache(cache_folder() / "compiled")
    model = load_text_model(chosen.model, chosen.dtype, chosen.embedding)
    how: dict[str, Any] = {"max_tokens": chosen.max_tokens, "stop": chosen.stop, **dataclasses.asdict(chosen.sampling)}
    if chosen.file:
        prompts = chosen.file.read_text(encoding="utf-8").splitlines()
        for prompt, completion in zip(prompts, model.generate(prompts, **how), strict=True):
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}, ensure_ascii=False))
        return 0
    print(chosen.prompt, end="", flush=True)
    for piece in model.stream(chosen.prompt, **how):
        print(piece, end="", flush=True)
    print()
    return 0


def serve(arguments: list[str]) -> int:
    """Serve a model by HTTP."""
    try:
        from mmfree_jax.inference.serving import server
    except ModuleNotFoundError as error:
        raise ConfigError(f"`serve` needs {error.name}: pip install 'mmfree-jax[serve]'") from None
    return server.main(arguments)


def export_model(arguments: list[str]) -> int:
    """Convert a model into a Hugging Face folder, a packed folder or a GGUF file."""
    chosen = parse(ExportArguments, arguments, f"{program()} export")
    for name, default, only in (("type", "auto", "gguf"), ("layout", "planes", "packed")):
        value = getattr(chosen, name)
        require(value == default or chosen.format == only, f"--{name} {value} is of --format {only}")
    require(chosen.dtype is None or chosen.format != "gguf", "--format gguf has --type, not --dtype")
    api.export(chosen.model, chosen.out, chosen.dtype, format=chosen.format, type=chosen.type, layout=chosen.layout)
    config = model_config(chosen.model)
    padding = config.vocab - config.tokenizer_vocab if config.tokenizer_vocab else 0
    print(f"{_size(config)}{f', without {padding} tokens of padding' * (padding > 0)} · {chosen.out}")
    return 0


def _size(config: ModelConfig) -> str:
    return f"{config.family}, {parameters(config).total:,} parameters"
