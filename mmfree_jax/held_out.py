"""Losses of models on disk: on any token set or text file, of any checkpoint, as rows that `scaling` reads."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax import flops
from mmfree_jax.checkpoint import read_meta, saved_steps
from mmfree_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, require
from mmfree_jax.data import TokenSet, resolve_data
from mmfree_jax.data.building.inputs import HUGGING_FACE, Documents, Reading, plan
from mmfree_jax.data.reading.token_set import INDEX
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.evaluation.loss import Nats, Sums, Text, by_reach, document_sums, scores
from mmfree_jax.files import read_json
from mmfree_jax.inference.model import ServedModel, load_packed
from mmfree_jax.inference.packed import is_packed, read_packed
from mmfree_jax.inference.text import find_tokenizer
from mmfree_jax.output import Say, quiet
from mmfree_jax.run_folder import check_held_out_text, corpus_places, held_out_corpus, with_padding
from mmfree_jax.sharding import idle_devices, make_mesh
from mmfree_jax.training.step import concrete, make_program, program_key
from mmfree_jax.weights import is_run, load_params, run_config

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A text to evaluate on: what the user calls it, its tokens, and the vocabulary that they are of."""

    name: str
    text: Text
    vocab_size: int
    vocab_hash: str
    end_of_document: int


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model ready to score texts of one vocabulary. `load` reads the parameters of a step; None: the newest."""

    path: Path
    run: RunConfig | None  # of the run that made it, or a default around its architecture; None: packed
    config: ModelConfig
    mesh: jax.sharding.Mesh
    nats: Nats
    load: Callable[[int | None], Any]
    separator: int | None


def sources(path: Path, corpora: Sequence[str] = (), domains: bool = False) -> list[Source]:
    """Return the texts to evaluate a model on: those named, or the held-out text of its run.

    corpora: names and folders of token sets; files and folders of text, which the model's own tokenizer encodes.
    domains: all corpora of the run's mixture that have held-out text, instead of the first only.
    Raises ConfigError for a model that was not trained here if no corpus is named, for a corpus of another tokenizer,
    and for one without held-out text.
    """
    require(not (corpora and domains), "give --corpus or --domains, not both")
    require(path.is_dir(), f"{path} is no folder: give that of a model")
    known = bool(corpora) or (not is_packed(path) and is_run(path))
    require(known, f"{path} was not trained here: give the corpus to evaluate on with --corpus")
    if domains:
        data = run_config(path).data
        sets = resolve_data(data, places=corpus_places(path)).sets
        for one, content in zip(sets, data.contents, strict=False):
            require(one.fingerprint == content, f"{one.path} holds other text than {path} was trained on")
        found = [(str(one.path), one) for one in sets if "valid" in one.splits and len(one.split("valid")) > 1]
        require(bool(found), f"no corpus that {path} was trained on has held-out text")
        return [_of_token_set(name, one) for name, one in found]
    return [_source(path, name) for name in corpora or ("",)]


def _source(path: Path, name: str) -> Source:
    if name.startswith(HUGGING_FACE) or Path(name).is_file() or (name and _is_text_folder(Path(name))):
        tokenizer = find_tokenizer(path)
        require(tokenizer is not None, f"the tokenizer of {path} is not known, and {name} is text: give a token set")
        assert tokenizer is not None
        text = text_of_files(name, tokenizer)
        return Source(name, text, tokenizer.vocab_size, tokenizer.vocab_hash, tokenizer.end_of_document)
    data = DataConfig(vocab=read_packed(path)[0]["model"].vocab) if is_packed(path) else run_config(path).data
    token_set = held_out_corpus(path, data, name)
    check_held_out_text(token_set)
    return _of_token_set(name or str(token_set.path), token_set)


def _is_text_folder(path: Path) -> bool:
    return path.is_dir() and not (path / INDEX).is_file()


def _of_token_set(name: str, found: TokenSet) -> Source:
    return Source(name, Text.held_out(found), found.vocab_size, found.vocab_hash, found.end_of_document)


def text_of_files(name: str, tokenizer: Tokenizer) -> Text:
    """Encode the documents of text files, JSON lines, Parquet, a folder of these, or `hf:NAME`.

    An end of document stands before the first one, so that every token of the text is predicted.
    """
    size = 0

    def documents() -> Iterator[str]:
        nonlocal size
        for document in itertools.chain.from_iterable(Documents(unit, Reading()) for unit in plan([name])):
            size += len(document.encode("utf-8", "replace"))
            yield document

    end = np.array([tokenizer.end_of_document], tokenizer.dtype)
    pieces = [end, *(np.concatenate([tokens, end]) for tokens in tokenizer.encode_stream(documents()))]
    tokens = np.concatenate(pieces)
    require(len(tokens) > 2, f"{name} holds no text")
    return Text(tokens, np.cumsum([len(piece) for piece in pieces])[:-1], size, name)


def open_model(path: Path, source: Source, mesh: MeshConfig, say: Say = quiet) -> Opened:
    """Prepare a model to score texts of the vocabulary of `source`, on a mesh of any shape; a packed one on one device.

    Raises ConfigError if the vocabulary is not the model's, or devices are missing.
    """
    if is_packed(path):
        require(mesh.devices == 1, f"{path} is packed: it is evaluated on one device")
        served = load_packed(path, concrete("auto"))
        with_padding(served.config, source.vocab_size)
        return Opened(path, None, served.config, make_mesh(mesh), _served_nats, lambda step: served, None)
    run = run_config(path)
    run = dataclasses.replace(run, model=with_padding(run.model, source.vocab_size))
    devices = make_mesh(mesh)
    if idle := idle_devices(mesh):
        say(idle)
    # The mesh of the evaluation takes the place of the run's: parameters are restored onto any mesh.
    key = dataclasses.replace(program_key(run, source.end_of_document), mesh=mesh)
    program = make_program(key)
    load = lambda step: load_params(path, program.abstract_state.params, step)
    return Opened(path, run, run.model, devices, program.nats, load, key.separator)


@jax.jit
def _served_nats(served: ServedModel, tokens_BT: jax.Array) -> jax.Array:
    return served.nats(tokens_BT[:, :-1], tokens_BT[:, 1:])


def sums_of(model: Opened, params: Any, source: Source, sequence: int = 0) -> Sums:
    """Score a text in windows of `sequence` tokens (0: those of the run, else 2048)."""
    sequence = sequence or window(model)
    parts = model.mesh.shape["sequence"]
    divisible = sequence % parts == 0
    require(divisible, f"a sequence of {sequence} is not divisible by mesh.sequence={parts}: choose others")
    return document_sums(model.nats, model.mesh, params, source.text, sequence, model.separator)


def window(model: Opened) -> int:
    """Return the tokens of a window that a model is evaluated in where none are named."""
    return 2048 if model.run is None else model.run.data.sequence


def steps_of(path: Path) -> list[int | None]:
    """Return the steps of the checkpoints that a run holds; for another model [None]."""
    if is_packed(path) or not is_run(path):
        return [None]
    return list(saved_steps(path / "checkpoints"))


def row(
    model: Opened, step: int | None, source: Source, sums: Sums, sequence: int = 0, positions: bool = False
) -> dict[str, Any]:
    """Return the row of a model, or of one checkpoint, on a text, with the columns of a runs table.

    It has the columns of the run's own row where the run has ended; D, U, FLOPs are those of the checkpoint, and a
    checkpoint before the end is `NAME@STEP` with `ended` false. `perplexity` is exp(loss); the standard errors are by
    document. positions: with the losses by the number of tokens seen, as `by_position`.
    """
    found = scores(sums, source.text)
    error = found["loss_se"]
    relative = None if error is None else error / found["loss"]
    measured = {
        "corpus": source.name,
        "val_set": source.text.name,
        "val_tokens": found["tokens"],
        "val_documents": found["documents"],
        "val_sequence": sequence or window(model),
        "loss": found["loss"],
        "loss_se": error,
        "perplexity": math.exp(found["loss"]),
        "perplexity_se": None if error is None else math.exp(found["loss"]) * error,
        "bpb": found["bpb"],
        "bpb_se": None if relative is None else found["bpb"] * relative,
        "tokenizer": source.vocab_hash,
        "vocab": source.vocab_size,
        "loss_unit": "nats",
    }
    about = {"model": str(model.path), **_about(model, step)}
    return about | measured | ({"by_position": by_reach(sums)} if positions else {})


def _about(model: Opened, step: int | None) -> dict[str, Any]:
    """What is known of a model besides its scores."""
    size = flops.parameters(model.config)
    sizes = {"family": model.config.family, "N": size.N, "N_nonemb": size.N_nonemb, "N_total": size.total}
    if model.run is None or not is_run(model.path):
        return {"run_id": model.path.resolve().name, **sizes}
    run = model.run
    step = saved_steps(model.path / "checkpoints")[-1] if step is None else step
    counts = read_meta(model.path / "checkpoints", step)["progress"]["counts"]
    spent = flops.train_flops(model.config, step * run.data.tokens_per_step, counts["pairs"])
    ended = step == run.steps
    own = read_json(model.path / RESULT) if (model.path / RESULT).exists() else {}
    return own | {
        "run_id": run.name if ended else f"{run.name}@{step}",
        **sizes,
        "step": step,
        "D": counts["targets"],
        "U": counts["unique"],
        "D_rule": "targets",
        "flops": spent.products,
        "ended": ended,
        "cluster": run.branch.run if run.branch else run.name,
        "seq_len": run.data.sequence,
        "embedding_counted": False,
    }
