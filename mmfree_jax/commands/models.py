"""The verbs on trained models: `generate`, `serve`, `import`, `export`."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmfree_jax import api
from mmfree_jax.command_line import parse
from mmfree_jax.config import ConfigError, require
from mmfree_jax.data.reading.token_set import TOKENIZER
from mmfree_jax.devices import use_compile_cache
from mmfree_jax.files import cache_folder
from mmfree_jax.flops import parameters
from mmfree_jax.inference.sampling import PLAIN, Sampling
from mmfree_jax.inference.text import load_text_model, text_files
from mmfree_jax.interop.huggingface import load_huggingface, read_origin
from mmfree_jax.output import program
from mmfree_jax.remote.reading import fetched
from mmfree_jax.weights import model_config, save_model


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


def import_model(arguments: list[str]) -> int:
    """Convert a Hugging Face folder into one of ours."""
    options = parse(ImportArguments, arguments, f"{program()} import")
    # The tokenizer goes with the weights, because `generate` and `export` look for it in the folder of the model.
    model = load_huggingface(options.source)
    save_model(model, options.out, read_origin(options.source))
    for file in [options.source / TOKENIZER, *text_files(options.source)]:
        if file.is_file():
            shutil.copyfile(file, options.out / file.name)
    print(f"{model.config.family}, {parameters(model.config).total:,} parameters · {options.out}")
    return 0


def generate(arguments: list[str]) -> int:
    """Print what a model makes of prompts: the text of one as it comes, those of a file as JSON."""
    options = parse(GenerateArguments, arguments, f"{program()} generate", urls=("model",))
    require(options.max_tokens >= 1, f"--max-tokens {options.max_tokens}: must be at least 1")
    require(not (options.prompt and options.file), "give --prompt or --file, not both")
    use_compile_cache(cache_folder() / "compiled")
    model = load_text_model(fetched(options.model), options.dtype, options.embedding)
    settings: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "stop": options.stop,
        **dataclasses.asdict(options.sampling),
    }
    if options.file:
        # JSON, because prompts and completions may hold line ends of their own.
        prompts = options.file.read_text(encoding="utf-8").splitlines()
        for prompt, completion in zip(prompts, model.generate(prompts, **settings), strict=True):
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}, ensure_ascii=False))
        return 0
    print(options.prompt, end="", flush=True)
    # Piece by piece, flushed: a reader sees the first words while the last ones are being computed.
    for piece in model.stream(options.prompt, **settings):
        print(piece, end="", flush=True)
    print()
    return 0


def serve(arguments: list[str]) -> int:
    """Serve a model by HTTP."""
    # Only this verb needs the packages of a web server, so they are an extra.
    try:
        from mmfree_jax.inference.serving import server
    except ModuleNotFoundError as error:
        raise ConfigError(f"`serve` needs {error.name}: pip install 'mmfree-jax[serve]'") from None
    return server.main(arguments)


def export_model(arguments: list[str]) -> int:
    """Convert a model into a Hugging Face folder, a packed folder or a GGUF file."""
    options = parse(ExportArguments, arguments, f"{program()} export", urls=("model",))
    # An option of another format would be ignored without a word, and the user would believe it had been heeded.
    for name, default, only in (("type", "auto", "gguf"), ("layout", "planes", "packed")):
        value = getattr(options, name)
        require(value == default or options.format == only, f"--{name} {value} is of --format {only}")
    require(options.dtype is None or options.format != "gguf", "--format gguf has --type, not --dtype")
    model = fetched(options.model)
    api.export(model, options.out, options.dtype, format=options.format, type=options.type, layout=options.layout)
    config = model_config(model)
    padding = config.vocab - config.tokenizer_vocab if config.tokenizer_vocab else 0
    left_out = f", without {padding} tokens of padding" if padding > 0 else ""
    print(f"{config.family}, {parameters(config).total:,} parameters{left_out} · {options.out}")
    return 0
