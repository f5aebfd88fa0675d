"""The Python interface: `import mmfree_jax`, then `preset`, `train`, `load`, `evaluate`, `export` (docs/python.md).

Each function does what the verb of that name does. Nothing here prints; `say` is called with the lines of progress.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfree_jax import held_out
from mmfree_jax.config import MeshConfig, RunConfig, require, with_changes
from mmfree_jax.data import TokenSet, resolve_data
from mmfree_jax.devices import check_platform, check_settings
from mmfree_jax.evaluation.loss import Scores, scores
from mmfree_jax.files import url_of
from mmfree_jax.inference.model import Place
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.inference.text import TextModel, find_ends, find_tokenizer, load_text_model, text_files
from mmfree_jax.interop.gguf import Kind, save_gguf
from mmfree_jax.interop.huggingface import save_huggingface
from mmfree_jax.lowering.out_of_memory import explained
from mmfree_jax.ops.packed import Layout
from mmfree_jax.output import Say, quiet
from mmfree_jax.presets import run_preset
from mmfree_jax.remote.reading import fetched
from mmfree_jax.remote.working import working_folder
from mmfree_jax.run_folder import corpus_places
from mmfree_jax.sharding import idle_devices, make_mesh
from mmfree_jax.training import loop
from mmfree_jax.training.step import make_program, program_key
from mmfree_jax.weights import load_model, origin


def preset(name: str, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the config of a preset, FAMILY-SIZE, with some of its fields changed.

    changes: dotted field -> value, such as {"steps": 100, "optim.lr": 4e-3}.
    Raises ConfigError for a name or field that does not exist, and for a run that cannot be.
    """
    return with_changes(run_preset(name), changes or {})


def prepare(run: RunConfig, out: Path, say: Say = quiet) -> tuple[RunConfig, TokenSet]:
    """Find the devices and the corpus of a run, and fill in what its config leaves open.

    Building the embedded corpus for the first time takes half a minute. Raises ConfigError if devices are missing, the
    corpus does not fit the model, or an axis of the mesh divides no parameter.
    """
    check_platform()
    # Cheap checks first: a missing device or a mesh that fits nothing is found before half a minute of building a
    # corpus.
    make_mesh(run.mesh)  # before a corpus is prepared
    if idle := idle_devices(run.mesh):
        say(idle)
    token_set = resolve_data(run.data, say, corpus_places(out))
    run = loop.completed_config(run, out, token_set)
    for line in make_program(program_key(run, token_set.end_of_document)).replicated:
        say(line)
    return run, token_set


def train(run: RunConfig, out: str | Path, say: Say = quiet) -> dict[str, Any]:
    """Train a run in the folder `out`, or resume it there, and return its row of the runs table.

    A finished run is returned at once. Raises ConfigError (another run is in the folder, the corpus does not fit),
    SelfCheckError, Diverged, OutOfMemory, or Interrupted once the state has been saved after a signal. `out` may be a
    URL such as s3://BUCKET/RUN; then also RemoteError, or NotCopied where training was all that succeeded.
    """
    with working_folder(Path(out)) as folder:
        run, token_set = prepare(run, folder, say)
        with explained(run):
            return loop.train(run, folder, token_set)


def load(path: str | Path, dtype: str = "float32", embedding: Place = "device") -> TextModel:
    """Load a model to generate with: a run directory (its newest checkpoint), a packed, imported or HF folder.

    `model.generate(prompts, ...)` completes text; calling the model with tokens, int32 [B, T], gives logits [B, T, V].
    `dtype` is that of the activations. Ternary weights are held in 2 bits, or in the 1.6 of a packed folder of layout
    trits. embedding: "host" leaves the embedding's memory to the host, at a round trip a token. Raises ConfigError for
    another folder, CheckpointError and PackedError for a damaged one.
    """
    return load_text_model(fetched(Path(path)), dtype, embedding)


def evaluate(
    path: str | Path, corpus: str = "", *, sequence: int = 0, mesh: MeshConfig | None = None, say: Say = quiet
) -> Scores:
    """Compute the loss of a model on held-out text.

    corpus: name, or folder of a token set, or file of text; by default the token set of the run. sequence: tokens in a
    window; 0: that of the run, else 2048. mesh: by default one device.
    Returns `loss` (nats a token), `loss_se` (its standard error by document), `bpb` (bits per byte), `tokens` and
    `documents`. Raises ConfigError for a model that was not trained here if no corpus is given, and for a corpus of
    another tokenizer.
    """
    check_settings()
    check_platform()
    path = fetched(Path(path))
    (source,) = held_out.sources(path, [corpus] if corpus else [])
    model = held_out.open_model(path, source, mesh or MeshConfig(), say)
    return scores(held_out.sums_of(model, model.load(None), source, sequence), source.text)


def export(
    path: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    format: str = "huggingface",
    type: Kind = "auto",
    layout: Layout = "planes",
) -> None:
    """Write a model for others to run.

    format: "huggingface" and "packed" are new folders, "gguf" a new file. dtype: of what is not ternary codes, float32
    by default, bfloat16 for "packed". type: of a GGUF file's matrices (`interop.gguf`). layout: of packed codes.
    Raises ConfigError for an architecture that the format cannot express, or a GGUF file of a model whose tokenizer is
    not known; FileExistsError if something is there.
    """
    require(not url_of(out), f"out={out} is a URL: give a path of this machine")
    path, out = fetched(Path(path)), Path(out)
    if format == "huggingface":
        save_huggingface(load_model(path), out, dtype or "float32", origin=origin(path))
        return
    require(format in ("packed", "gguf"), f"format={format!r}: choose one of huggingface, packed, gguf")
    tokenizer = find_tokenizer(path)
    ends = list(find_ends(path, tokenizer))
    text = "" if tokenizer is None else tokenizer.backend.to_str(pretty=True)
    if format == "packed":
        stored: Any = dtype or "bfloat16"
        require(stored in ("bfloat16", "float32"), f"dtype={stored!r}: a packed folder has bfloat16 or float32")
        save_packed(
            load_model(path), out, stored=stored, layout=layout, tokenizer_json=text, end=ends, beside=text_files(path)
        )
        return
    require(tokenizer is not None, f"the tokenizer of {path} is not known, and a GGUF file needs it")
    context = origin(path).positions or 2048
    save_gguf(load_model(path), out, text, kind=type, end=ends[0] if ends else 0, context=context)
