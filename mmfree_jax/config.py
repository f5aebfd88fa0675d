"""The config of a run: frozen dataclasses, validated on construction, with a JSON round trip and a fingerprint.

Nothing here imports JAX, so that configs are read, checked and printed at once.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The architecture is a part of the config: what it exports, this module does too.
from mmfree_jax.architecture import FAMILIES as FAMILIES
from mmfree_jax.architecture import ConfigError, ModelConfig, Remat, check_choices, require, type_hints
from mmfree_jax.architecture import Parametrisation as Parametrisation

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["constant", "wsd", "cosine", "cosine-halving", "two-stage"]
Moments = Literal["float32", "bfloat16", "int8"]
Precision = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "off"]
Gather = Literal["int8", "packed"]
Reduction = Literal["compute", "float32"]

PLACES = ("corpus", "vocab", "mixture")  # fields of DataConfig that say where the data are, not what they are


@dataclass(frozen=True)
class DataConfig:
    """The data: a corpus ("embedded", "s", "m", "l", or the folder of a token set), cut into windows.

    `mixture` names further corpora to train on; the held-out loss is always that of `corpus`. `weights` are the shares
    of the windows, that of `corpus` first; equal by default.
    `sequence` is in tokens; `batch` is the number of sequences in one optimizer step, over all devices and all
    accumulation steps. `seed` shuffles the windows, so two runs with equal DataConfig see equal data in equal order.
    The initial weights have a seed of their own, that of the run. `contents` are the fingerprints of corpus and
    mixture. A run fills them in when it begins. From then on they identify the data; corpus, mixture and vocab only say
    where the data were found (`PLACES`).
    """

    corpus: str = "embedded"
    vocab: int = 2048  # of the tokenizer of a corpus that is named, not a folder
    sequence: int = 256
    batch: int = 16
    seed: int = 0
    separate_documents: bool = False  # state and attention do not cross from one document to the next
    mixture: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    contents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            len(self.contents) in (0, 1 + len(self.mixture)),
            f"data.contents={self.contents}: one fingerprint for data.corpus and each of data.mixture, or none",
        )
        require(
            len(self.weights) in (0, 1 + len(self.mixture)) and all(weight > 0 for weight in self.weights),
            f"data.weights={self.weights}: give one positive number for data.corpus and each of data.mixture, or none",
        )
        require(bool(self.corpus), "data.corpus is empty: name a corpus or the folder of a token set")
        require(self.sequence >= 2, f"data.sequence={self.sequence}: needs at least 2 tokens")
        require(self.batch >= 1, f"data.batch={self.batch}: needs at least 1 sequence")
        require(self.vocab >= 257, f"data.vocab={self.vocab}: 256 bytes and the end of a document need at least 257")

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step: all tokens of its windows, padding included."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule. Durations are in optimizer steps.

    adamw: Loshchilov & Hutter 2019. muon: orthogonalised momentum for the blocks' matrices (Jordan 2024; updates of
    AdamW's size, Moonlight, arXiv 2502.16982, equation 4), AdamW for everything else.
    wsd: warm-up, constant, linear decay to `final_lr` x peak over the last `decay_steps` (Hu et al. 2024; Hägele et
    al. 2024). cosine: to `final_lr` x peak. cosine-halving: the same, halved from mid-run on (Zhu et al. 2024).
    two-stage: linear to `final_lr` x peak, from mid-run on times 2/3 and without weight decay (BitNet b1.58).
    `lr` is never part of the compiled program, so runs that differ in it share one.
    """

    optimizer: Optimizer = "adamw"
    lr: float = 3e-3
    embedding_lr: float = 1.0  # this and the next three are factors on lr
    head_lr: float = 1.0
    gain_lr: float = 1.0
    bounds_lr: float = 1.0  # of the forget gate's lower bounds
    schedule: Schedule = "wsd"
    warmup_steps: int = 50
    decay_steps: int = 0
    final_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of muon's matrices, which have no second moment
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices, embeddings and head; never on gains, lower bounds or other vectors
    clip: float = 1.0  # of the global gradient norm; 0: none
    z_loss: float = 0.0  # factor on logsumexp^2 per token in the training loss (PaLM: 1e-4); never in a held-out loss
    accumulate: int = 1  # micro-batches an optimizer step
    moments: Moments = "float32"  # how those of matrices, embedding and head are stored; int8: 1.06 bytes each

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("lr", "embedding_lr", "head_lr", "gain_lr", "bounds_lr"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"optim.{name}={value}: must be a positive number")
        for name in ("beta1", "beta2", "momentum"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)}: must lie in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps}: must be positive")
        require(0 <= self.final_lr <= 1, f"optim.final_lr={self.final_lr}: is a fraction of the peak, in [0, 1]")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "clip", "z_loss"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)}: must not be negative")
        require(self.accumulate >= 1, f"optim.accumulate={self.accumulate}: must be at least 1")
        require(
            self.decay_steps == 0 or self.schedule == "wsd",
            f"optim.decay_steps={self.decay_steps} would do nothing with schedule={self.schedule}: set it to 0",
        )
        decays = self.schedule in ("cosine", "cosine-halving", "two-stage") or self.decay_steps > 0
        require(
            decays or self.final_lr == 0,
            f"optim.final_lr={self.final_lr} would do nothing with schedule={self.schedule} and optim.decay_steps=0: "
            "set it to 0, or the length of a decay",
        )
        require(
            self.optimizer == "muon" or self.momentum == OptimConfig.momentum,
            f"optim.momentum={self.momentum} would do nothing with optimizer={self.optimizer}: beta1 is its momentum",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product must be the number of devices that the run uses."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            require(size >= 1, f"mesh.{name}={size}: must be at least 1")

    @property
    def devices(self) -> int:
        """Number of devices that the mesh needs."""
        return self.data * self.fsdp * self.tensor * self.sequence

    @property
    def batch_shards(self) -> int:
        """Number of shards of the batch."""
        return self.data * self.fsdp


@dataclass(frozen=True)
class Branch:
    """Start from a checkpoint of another run: its run id (a sibling folder) and the step."""

    run: str
    step: int

    def __post_init__(self) -> None:
        require(bool(self.run), "branch.run is empty: name the run to branch from")
        require(self.step >= 1, f"branch.step={self.step}: must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines one training run. Two runs that have begun with equal fingerprints compute the same.

    When a run begins, it fills in what depends on its environment: the `precision` that "auto" stands for, and what its
    corpus holds (`data.contents`, `model.tokenizer_vocab`). A resumed run keeps these choices.
    `seed` draws the initial weights, `data.seed` the order of the data. Repeated runs should differ in both
    (`sweep.grids.repeats`), so that their spread includes the effect of the order.
    `steps` counts from the beginning, also for a run that branches off another: a decay branch is the WSD run of the
    same length whose first `branch.step` steps were computed by its trunk. Checkpoints of the steps in `milestones` are
    never deleted. `checkpoint_every`, `log_every`, `eval_every` (held-out loss) and `diagnose_every` (norms and
    activations of each layer, `training.diagnostics`) are in steps; 0 means only at the end (for diagnose_every:
    never). The last two do not change what is trained.
    """

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 1000
    seed: int = 0
    branch: Branch | None = None
    init: str = ""  # folder of a model whose weights to start from, with a new optimizer state, instead of random ones
    milestones: tuple[int, ...] = ()
    precision: Precision = "auto"  # of activations: bfloat16 on accelerators, float32 on CPU; weights are float32
    remat: Remat = "none"  # what the backward pass recomputes (`models.language_model.RESIDUAL_NAMES`)
    kernels: Kernels = "auto"  # use our own kernels if they pass their checks; off: only the compiler's
    gather: Gather = "int8"  # form in which ternary codes are all-gathered over fsdp shards; packed: four in a byte
    reduction: Reduction = "compute"  # type in which gradients of matrices are summed over devices (`sharding`)
    unroll: int = 0  # layers in an iteration of the scan over layers; 0: all on GPUs, where a loop costs 1/6, else 1
    evaluate: bool = True  # at the end, on the entire held-out split
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    diagnose_every: int = 0
    eval_every: int = 0
    skip_nonfinite: int = 0  # steps in a row that are left out for a loss or gradient that is not finite; 0: none
    spike_sigmas: float = 0.0  # robust standard deviations above the recent losses that are a spike; 0: no detection
    on_spike: Literal["log", "rewind"] = "log"  # rewind: to the checkpoint before it, past its batches
    stall_minutes: float = 30.0  # a run that makes no step for so long leaves its stacks and ends with 75; 0: never

    def __post_init__(self) -> None:
        check_choices(self)
        plain = bool(self.name) and "/" not in self.name and self.name[0] not in ".-"  # it is a command's argument too
        require(plain, f"name={self.name!r}: must be a plain file name")
        require(self.steps >= 1, f"steps={self.steps}: must be at least 1")
        require(self.unroll >= 0, f"unroll={self.unroll}: must not be negative")
        require(self.keep_checkpoints >= 1, f"keep_checkpoints={self.keep_checkpoints}: must be at least 1")
        for name in (
            "log_every",
            "checkpoint_every",
            "diagnose_every",
            "eval_every",
            "skip_nonfinite",
            "stall_minutes",
        ):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must not be negative")
        require(
            self.spike_sigmas >= 0 and (self.spike_sigmas > 0 or self.on_spike == "log"),
            f"spike_sigmas={self.spike_sigmas}: must not be negative, and on_spike={self.on_spike!r} needs it positive",
        )
        require(
            self.remat != "codes" or self.model.linear == "ternary",
            "remat='codes' keeps the integer codes of ternary layers, and this model has none: use products or full",
        )
        require(
            self.gather == "int8" or (self.mesh.fsdp > 1 and self.model.linear == "ternary"),
            f"gather={self.gather!r} would do nothing: it needs mesh.fsdp above 1 and ternary layers",
        )
        require(
            self.reduction == "compute" or (self.mesh.devices > 1 and self.precision != "float32"),
            f"reduction={self.reduction!r} would do nothing: it needs a mesh of several devices and activations that "
            "are not float32 already",
        )
        self._check_rates()
        self._check_lengths()
        self._check_batch()

    def _check_rates(self) -> None:
        model, optim = self.model, self.optim
        require(
            optim.bounds_lr == 1 or (model.mixer == "mlgru" and model.lower_bounds),
            f"optim.bounds_lr={optim.bounds_lr} would do nothing: the model has no lower bounds",
        )
        require(
            optim.head_lr == 1 or not model.tie_embeddings,
            f"optim.head_lr={optim.head_lr} would do nothing: with model.tie_embeddings the head is the embedding, "
            "whose rate is optim.embedding_lr",
        )

    def _check_lengths(self) -> None:
        optim = self.optim
        require(not (self.init and self.branch), "init and branch exclude each other: a branch continues its trunk")
        require(
            optim.warmup_steps + optim.decay_steps <= self.steps,
            f"optim.warmup_steps={optim.warmup_steps} + optim.decay_steps={optim.decay_steps} exceed "
            f"steps={self.steps}: raise steps or shorten them",
        )
        for step in self.milestones:
            require(0 < step <= self.steps, f"milestones: {step} is outside 1..{self.steps}")
        if self.branch is not None:
            last = self.steps - optim.decay_steps
            require(
                self.branch.step < self.steps, f"branch.step={self.branch.step} leaves nothing of steps={self.steps}"
            )
            require(
                self.branch.step <= last,
                f"branch.step={self.branch.step} lies inside the decay, which begins at step {last}",
            )

    def _check_batch(self) -> None:
        rows, shards = self.data.batch, self.mesh.batch_shards * self.optim.accumulate
        require(
            rows % shards == 0,
            f"data.batch={rows} is not divisible by mesh.data x mesh.fsdp x optim.accumulate = {shards}: "
            f"use {max(1, rows // shards) * shards}",
        )
        size = self.mesh.sequence
        require(
            self.data.sequence % size == 0,
            f"data.sequence={self.data.sequence} is not divisible by mesh.sequence={size}",
        )
        require(
            self.unroll == 0 or self.model.depth % self.unroll == 0,
            f"unroll={self.unroll} does not divide model.depth={self.model.depth}",
        )

    @property
    def positions(self) -> int:
        """Tokens in the windows of all steps, those of a branch's trunk and padding included.

        The D of a scaling law are the targets that carried a loss: the same number if documents are joined, fewer if
        they are separate. A run counts them (`data.reading.documents`).
        """
        return self.steps * self.data.tokens_per_step

    @property
    def first_step(self) -> int:
        """Steps that are done when the run begins: those of its trunk."""
        return self.branch.step if self.branch else 0

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change if anything that the run computes or writes changes.

        The place of the data does not count once their contents are filled in.
        """
        # Where the data lie on this machine says nothing about what is computed; what they contain does.
        data = self.data
        if data.contents:
            anywhere = DataConfig()
            data = dataclasses.replace(
                data, corpus=anywhere.corpus, vocab=anywhere.vocab, mixture=("",) * len(data.mixture)
            )
        return hashlib.sha256(to_json(dataclasses.replace(self, data=data)).encode()).hexdigest()[:16]


def to_json(config: Any) -> str:
    """Return the canonical JSON text of a config: sorted keys, tuples as lists."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=1)


def from_json(cls: type, text: str, source: str = "") -> Any:
    """Build a config from its JSON text, the inverse of `to_json`.

    Raises ConfigError, naming the `source` of the text, for unknown keys (with the nearest one), wrong types and wrong
    values.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source or 'text'} is not JSON: {error}") from None
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}" if source else str(error)) from None


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Build the dataclass `cls` from plain values, recursively, checking names and types."""
    require(isinstance(values, dict), f"{where or cls.__name__}: expected an object, found {values!r}")
    hints = type_hints(cls)
    for key in values:
        if key not in hints:  # a suggestion takes a thousand times as long as the look
            raise ConfigError(f"{where}{key}: no such key{suggestion(key, hints)}")
    for one in dataclasses.fields(cls):
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        require(not needed or one.name in values, f"{where}{one.name} is missing")
    return cls(**{key: _coerce(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return None if value is None else _coerce(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where + ".")
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, found {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_coerce(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if typing.get_origin(hint) is Literal:
        return value  # the dataclass checks its own choices
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def with_changes(config: Any, changes: Mapping[str, Any], path: str = "") -> Any:
    """Return `config` with fields changed; a name such as "optim.lr" is that of a field of a field.

    All are changed at once: values that belong together need not be valid one by one. `path` is the name of `config`
    itself, for messages. Raises ConfigError for a field that does not exist, a value of another type than the old one,
    and values that are not valid.
    """
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        field, _, rest = name.partition(".")
        inner.setdefault(field, {})[rest] = value
    fields, new = [f.name for f in dataclasses.fields(config)], {}
    for field, values in inner.items():
        dotted = f"{path}{field}" + "".join(f".{rest}" for rest in list(values)[:1] if rest)
        require(field in fields, f"{dotted}: no such field{suggestion(field, fields)}")
        old, nested = getattr(config, field), "" not in values
        require(nested == dataclasses.is_dataclass(old), f"{dotted}: names a group of fields, or goes past a field")
        if nested:
            new[field] = with_changes(old, values, f"{path}{field}.")
            continue
        value = values[""]
        kinds = (int, float) if isinstance(old, float) else type(old)
        fits = old is None or (isinstance(value, kinds) and isinstance(value, bool) == isinstance(old, bool))
        require(fits, f"{dotted}={value!r}: must be of type {type(old).__name__}")
        new[field] = value
    return dataclasses.replace(config, **new)


def suggestion(key: str, known: Any) -> str:
    """Return a hint for a message about an unknown key: the nearest known one, or all."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"
