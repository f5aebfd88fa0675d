"""The table of runs: one row per end-of-schedule point, read from CSV, JSONL or a sweep directory and validated."""

from __future__ import annotations

import csv
import difflib
import importlib.util
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import narwhals
import numpy as np

from scaling.tables.arithmetic import evaluated, formula
from scaling.tables.equal import Equal
from scaling.tables.readers import ScalingError, read_rows
from scaling.tables.remote import local

REQUIRED = ("run_id", "family", "N", "D", "loss")
POSITIVE = ("N", "D", "loss", "N_nonemb", "U", "flops", "bpb", "batch_tokens", "seq_len", "vocab", "joules", "seconds")
NUMERIC = (*POSITIVE, "loss_se", "lr", "warmup_tokens", "width", "depth", "sparsity", "annealing")
TEXT = (
    "run_id",
    "family",
    "val_set",
    "tokenizer",
    "flops_rule",
    "D_rule",  # what D counts: targets that carried a loss, or positions, padding included
    "loss_unit",  # nats (per token) or bits per byte
    "schedule",
    "cluster",
    "precision",
    "reason",
    "optimizer",
    "parametrisation",
    "init",  # "random", or the weights started from
    "documents",  # joined or separate
    "mixture",
    "train_set",
    "settings",  # whatever else is not as usual
    "device",
    "code",
    "jax",
    "jaxlib",
    "flax",
    "optax",
)
BOOLEAN = ("ended", "excluded", "embedding_counted")  # the last: whether N holds the input embedding
UNSTATED = "units of loss"
IN_BITS = "nats per token do not compare, bits per byte would (--column loss=bpb)"
BITS, NATS, NATS_PER_TOKEN = "bits per byte", "nats", "nats per token"
CONVENTIONS = (
    "tokenizer",
    "val_set",
    "loss_unit",
    "flops_rule",
    "embedding_counted",
)  # one value each, or no comparison
# One value each in a family, or it pools what was trained differently. `init` aside: sizes have weights of their own.
RECIPE = ("optimizer", "parametrisation", "documents", "activation_bits", "gradient_bits", "settings")
# Likewise, but what differs may be little, or meant.
SURROUNDINGS = ("mixture", "train_set", "precision", "device", "code", "jax", "jaxlib", "flax", "optax")
TARGETS, POSITIONS = "targets", "positions"  # rules of D
SCRATCH = "random"  # `init` of a run from random weights
KNOWN = (*NUMERIC, *TEXT, *BOOLEAN, "seed", "data_seed", "activation_bits", "gradient_bits")
FLOPS_PER_PARAMETER_TOKEN = 6.0  # forward 2, backward 4 (Kaplan et al. 2020, section 2.1)
LARGEST = 1e60  # beyond any run; keeps products of two columns finite
MISSING_WORDS = frozenset({"", "na", "n/a", "nan", "none", "null"})
NUMBER = re.compile(r"^([+-]?(?:\d{1,3}(?:[,_]\d{3})+|\d+)(?:\.\d+)?)\s?([kKmMbBgGtT]?)$")
MULTIPLES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}  # as people write sizes and tokens
UNITS = ("nats", "nats per token", "bits per byte", "bits per token", "accuracy", "error")
TRUE_WORDS, FALSE_WORDS = frozenset({"true", "1", "1.0", "yes"}), frozenset({"false", "0", "0.0", "no"})
COMPARISONS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, eq=False)
class Runs(Equal):
    """A validated table of runs.

    `columns` maps a name to an array of one entry per row: float64 for numbers (NaN where missing), object (str) for
    text. Always there: run_id, family, cluster (text); N, D, loss, flops (float64; parameters, tokens, see `loss_unit`,
    floating-point operations). `notes` says what was derived rather than read; `set_aside` keeps the rows that the
    `excluded` column removed.
    """

    columns: dict[str, np.ndarray]
    source: str = "memory"
    sha256: str = ""
    notes: tuple[str, ...] = ()
    set_aside: tuple[dict[str, Any], ...] = field(default=())

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: Mapping[str, str] | None = None,
        where: Iterable[str] | Mapping[str, Any] = (),
        constants: Mapping[str, str] | None = None,
        allow_midrun: bool = False,
    ) -> Runs:
        """Reads a CSV, JSONL or Parquet file, a sweep directory (its `runs.csv`, or else `runs/*/result.json`), or a
        folder of Weights & Biases or TensorBoard runs; or the URL of one, such as s3://BUCKET/SWEEP.

        `columns` maps our name to the table's ("N" -> "params"; a loss read from "bpb" is in bits per byte);
        `constants` adds a column of one value; `where` keeps the rows for which every condition holds ("family=llama",
        "flops>=1e19", or a mapping name -> value).
        Raises ScalingError on anything that would make a fit meaningless.
        """
        here = local(path)
        rows, digest = read_rows(here)
        rows = rename_columns(rows, columns or {})
        unit = {"loss_unit": BITS} if (columns or {}).get("loss") == "bpb" else {}
        rows = [row | unit | dict(constants or {}) for row in rows]
        present = dict.fromkeys(name for row in rows for name in row)
        kept = [row for row in rows if all(holds(row, condition, present) for condition in parse_where(where))]
        runs = cls.from_rows(kept, allow_midrun)
        if len(kept) < len(rows):
            conditions = " and ".join("".join(condition) for condition in parse_where(where))
            runs = replace(runs, notes=(*runs.notes, f"{len(kept)} of {len(rows)} rows kept: {conditions}"))
        return replace(runs, source=here.name, sha256=digest)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], allow_midrun: bool = False) -> Runs:
        """Builds and validates a table from row mappings; raises ScalingError."""
        if not rows:
            raise ScalingError("the table has no rows (or the --where conditions removed them all)")
        names = list(dict.fromkeys(name for row in rows for name in row))
        raw = {name: [row.get(name) for row in rows] for name in names}
        notes = derive_columns(raw)
        check_present(raw)
        table = {name: parse_column(name, values) for name, values in raw.items()}
        excluded = table.get("excluded", np.zeros(len(rows))) == 1.0
        aside = tuple(
            {
                "run_id": str(raw["run_id"][i]),
                "reason": str(raw.get("reason", [""] * len(rows))[i] or "no reason given"),
            }
            for i in np.flatnonzero(excluded)
        )
        if excluded.all():
            raise ScalingError("every row is marked as excluded")
        runs = cls({name: values[~excluded] for name, values in table.items()}, notes=tuple(notes), set_aside=aside)
        check_values(runs)
        fault = midrun_fault(runs)
        if fault and not allow_midrun:
            raise ScalingError(f"{fault}: fit end-of-schedule losses (or pass --allow-midrun)")
        if fault:
            runs = replace(runs, notes=(*runs.notes, f"points inside a schedule accepted, which mislead fits: {fault}"))
        return runs.with_defaults()

    @classmethod
    def any(cls, source: Any) -> Runs:
        """A table from whatever holds one: a Runs, a path, row mappings, or a DataFrame that narwhals knows."""
        if isinstance(source, Runs):
            return source
        if isinstance(source, (str, Path)):
            return cls.read(source)
        if isinstance(source, (list, tuple)):
            return cls.from_rows(source)
        try:
            frame = narwhals.from_native(source, eager_only=True)
        except TypeError as error:
            raise ScalingError(
                f"a {type(source).__name__} is no table of runs: give a path, rows or a DataFrame"
            ) from error
        return cls.from_rows(frame.rows(named=True))

    @classmethod
    def of(cls, family: str = "all", **columns: Any) -> Runs:
        """Builds a table from arrays or scalars: Runs.of(N=[...], D=[...], loss=[...]) with run_id = row number."""
        length = max(np.size(value) for value in columns.values())
        spread = {name: np.broadcast_to(np.asarray(value), (length,)).tolist() for name, value in columns.items()}
        names = {"run_id": [f"{family}-{i + 1}" for i in range(length)], "family": [family] * length} | spread
        return cls.from_rows([dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)])

    def with_defaults(self) -> Runs:
        """Fills in cluster (= run_id) and flops (= 6 N D), noting it, and D_rule in rows of a table that has it."""
        table, notes = dict(self.columns), list(self.notes)
        given = table.get("cluster", np.full(len(self), "", dtype=object))
        table["cluster"] = np.where(given == "", table["run_id"], given)
        flops = table.get("flops", np.full(len(self), np.nan))
        absent = np.isnan(flops)
        if absent.any():
            how_many = "every row" if absent.all() else f"{absent.sum()} of {len(self)} rows"
            notes.append(f"flops derived as 6*N*D for {how_many}")
            flops = np.where(absent, FLOPS_PER_PARAMETER_TOKEN * table["N"] * table["D"], flops)
        rule = {"D_rule": self._rule_of_D()} if "D_rule" in table else {}
        return replace(self, columns=table | {"flops": flops} | rule, notes=tuple(notes))

    def _rule_of_D(self) -> np.ndarray:
        """D_rule, where it is blank that of tables without the column: positions. With joined documents these are the
        targets."""
        rule, documents = self.columns["D_rule"], self.columns.get("documents", np.full(len(self), "", dtype=object))
        return np.where(rule != "", rule, np.where(documents == "joined", TARGETS, POSITIONS)).astype(object)

    def __repr__(self) -> str:
        return f"<Runs: {len(self)} of {', '.join(self.families[:4])}, from {self.source}>"

    def __len__(self) -> int:
        return len(self.columns["run_id"])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise ScalingError(f"the table has no column {name!r}{nearest(name, self.columns)}")
        return self.columns[name]

    @property
    def families(self) -> list[str]:
        """Family names in order of first appearance."""
        return list(dict.fromkeys(self.columns["family"].tolist()))

    @property
    def loss_unit(self) -> str:
        """What the losses are in, as the table states it; UNSTATED where it does not."""
        kinds = self.kinds("loss_unit")
        return kinds[0] if len(kinds) == 1 else UNSTATED

    @property
    def loss_label(self) -> str:
        """The same for an axis: nats are per token."""
        return NATS_PER_TOKEN if self.loss_unit == NATS else self.loss_unit

    def select(self, rows: np.ndarray) -> Runs:
        """The rows picked by a boolean mask or an index array."""
        return replace(self, columns={name: values[rows] for name, values in self.columns.items()})

    def family(self, name: str) -> Runs:
        """The rows of one family; raises ScalingError naming the nearest one when there are none."""
        rows = self.columns["family"] == name
        if not rows.any():
            raise ScalingError(f"no rows of family {name!r}{nearest(name, self.families)}")
        return self.select(rows)

    def kinds(self, name: str) -> list[str]:
        """Different values of a column, blanks aside; none where the table lacks it."""
        values = np.unique(self.columns[name].astype(str)) if name in self.columns else np.empty(0, dtype=str)
        return [v for v in values.tolist() if v not in ("", "nan")]

    def records(self) -> Iterator[dict[str, Any]]:
        """Rows as plain dictionaries (NaN becomes an empty string), in table order."""
        for i in range(len(self)):
            row = {name: values[i] for name, values in self.columns.items()}
            yield {k: "" if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}

    def to_frame(self) -> Any:
        """The table as a DataFrame of whichever library is installed: pandas, Polars or PyArrow."""
        return frame_of({name: values.tolist() for name, values in self.columns.items()})

    def write_csv(self, path: Path) -> None:
        """Writes the table, defaults included, in full precision."""
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(self.columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: repr(float(v)) if isinstance(v, float) else v for k, v in row.items()} for row in self.records()
            )


def rename_columns(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows with the columns that `columns` maps ours to, by name or by arithmetic ("params*1e6"); the table's own names
    stay usable, and a column that already had one of ours is replaced."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    made: dict[str, list[Any]] = {}
    for ours, theirs in columns.items():
        if theirs in present:
            made[ours] = [row.get(theirs) for row in rows]
            continue
        tree, names = formula(theirs)
        for name in names.values():
            if name not in present:
                raise ScalingError(
                    f"--column {ours}={theirs}: the table has no column {name!r}{nearest(name, present)}"
                )
        made[ours] = [computed(tree, names, row, ours, k) for k, row in enumerate(rows)]
    return [row | {ours: values[k] for ours, values in made.items()} for k, row in enumerate(rows)]


def computed(tree: Any, names: Mapping[str, str], row: Mapping[str, Any], ours: str, place: int) -> float:
    """One row's value of an expression; raises ScalingError on text where a number is wanted."""
    values = {short: as_number(row.get(column)) for short, column in names.items()}
    text = next((column for short, column in names.items() if values[short] is None), None)
    if text is not None:
        raise ScalingError(f"column {text!r} holds text in row {place + 1}: {str(row.get(text))[:40]!r} (for {ours})")
    return evaluated(tree, {short: value for short, value in values.items() if value is not None})


def parse_where(where: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Conditions as (column, comparison, value)."""
    if isinstance(where, Mapping):
        return [(name, "=", str(value)) for name, value in where.items()]
    parsed = []
    for text in [where] if isinstance(where, str) else where:
        sign = next((s for s in COMPARISONS if s in text), None)
        if sign is None:
            raise ScalingError(f"--where {text!r} is not COLUMN=VALUE (also !=, <, <=, >, >=)")
        name, _, value = text.partition(sign)
        parsed.append((name.strip(), sign, value.strip()))
    return parsed


def holds(row: Mapping[str, Any], condition: tuple[str, str, str], present: Iterable[str]) -> bool:
    """Whether a row meets a condition, as numbers where both sides are numbers; what the row leaves out of the columns
    `present` in the table is blank. Raises ScalingError on a column that is not."""
    name, sign, value = condition
    if name not in present:
        raise ScalingError(f"--where: the table has no column {name!r}{nearest(name, present)}")
    cell = row.get(name, "")
    have, want = as_number(cell), as_number(value)
    if str(value).strip() == "" and sign in ("=", "==", "!="):  # COLUMN= keeps the rows that leave it blank
        blank = have is not None and have != have
        return blank == (sign != "!=")
    if have is not None and want is not None:
        return bool(COMPARISONS[sign](have, want))
    if sign not in {"=", "==", "!="}:
        return False
    return bool(COMPARISONS[sign](str(cell).lower(), value.lower()))


def as_number(value: Any) -> float | None:
    """The value as a float, NaN where it is blank, None where it is text; "2.8B" and "1,300,000" are numbers."""
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING_WORDS):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        pass
    found = NUMBER.match(str(value).strip())
    if found is None:
        return None
    return float(found[1].replace(",", "").replace("_", "")) * MULTIPLES[found[2].upper()]


def nearest(name: str, names: Iterable[str]) -> str:
    """', did you mean ...' for a message, or the names there are when none is close."""
    names = [str(n) for n in names]
    close = difflib.get_close_matches(name, names, 1, 0.4) or [n for n in names if n.lower() == name.lower()]
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names[:12])}"


def derive_columns(raw: dict[str, list[Any]]) -> list[str]:
    """Adds run_id (row number) and D (flops / 6 N) where the table lacks them; returns the notes that say so."""
    notes = []
    count = len(next(iter(raw.values())))
    if "run_id" not in raw:
        raw["run_id"] = [f"row-{i + 1}" for i in range(count)]
        notes.append("run_id absent: rows are numbered")
        if "cluster" not in raw:  # rows of one size may be checkpoints of one run: they are not taken for independent
            known = [raw[name] for name in ("family", "N", "lr", "seed", "precision") if name in raw]
            raw["cluster"] = (
                ["|".join(map(str, values)) for values in zip(*known, strict=True)] if known else raw["run_id"]
            )
            notes[-1] += "; those of one family and size count as one trunk, as checkpoints of a run would"
    if "D" not in raw and "flops" in raw and "N" in raw:
        flops, n = parse_column("flops", raw["flops"]), parse_column("N", raw["N"])
        raw["D"] = (flops / (FLOPS_PER_PARAMETER_TOKEN * n)).tolist()
        notes.append("D absent: derived as flops / (6 N)")
    return notes


def check_present(raw: Mapping[str, list[Any]]) -> None:
    for name in REQUIRED:
        if name not in raw:
            remedy = "--set family=NAME" if name == "family" else f"--column {name}=THEIR_NAME"
            raise ScalingError(f"the table has no column {name!r}{nearest(name, raw)} (use {remedy})")


def parse_column(name: str, values: Sequence[Any]) -> np.ndarray:
    """float64 for numbers and booleans, object (str) for text; an unknown column is numeric if all of it parses."""
    if name in BOOLEAN:
        return np.array([parse_boolean(name, v, i) for i, v in enumerate(values)])
    if name in TEXT:
        words = ["" if v is None else str(v).strip() for v in values]
        return np.array(["" if word.lower() in MISSING_WORDS else word for word in words], dtype=object)
    # A column that nobody knows is a number if all of its entries are: a setting such as "weight_decay" then can be
    # used in --where and arithmetic.
    numbers = [as_number(v) for v in values]
    bad = next((i for i, v in enumerate(numbers) if v is None), None)
    if bad is None:
        return np.array(numbers, dtype=np.float64)
    if name in NUMERIC:
        raise ScalingError(f"column {name!r} holds text in row {bad + 1}: {str(values[bad])[:40]!r}")
    return np.array(["" if v is None else str(v) for v in values], dtype=object)


def parse_boolean(name: str, value: Any, row: int) -> float:
    word = str(value).strip().lower()
    if word in TRUE_WORDS:
        return 1.0
    if word in FALSE_WORDS:
        return 0.0
    if word in MISSING_WORDS:
        return float("nan")
    raise ScalingError(f"column {name!r} row {row + 1} is neither true nor false: {str(value)[:40]!r}")


def check_values(runs: Runs) -> None:
    """Refuses values that no run can have; the message names the first rows at fault."""
    for name in REQUIRED[:2]:
        if (runs[name] == "").any():
            raise ScalingError(f"column {name!r} is blank in row {int(np.argmax(runs[name] == '')) + 1}")
    unknown = [unit for unit in runs.kinds("loss_unit") if unit not in UNITS]
    if unknown:
        raise ScalingError(f"loss_unit {unknown[0]!r} is unknown; choose from {', '.join(UNITS)}")
    for name in POSITIVE:
        if name not in runs.columns:
            continue
        values = runs[name]
        missing = np.isnan(values) if name in REQUIRED else np.zeros(len(runs), bool)
        faulty = missing | (values <= 0) | (values > LARGEST)
        if faulty.any():
            shown = ", ".join(
                f"{i}: {v:g}" for i, v in list(zip(runs["run_id"][faulty], values[faulty], strict=True))[:3]
            )
            raise ScalingError(f"column {name!r} must be positive and below 1e60; {faulty.sum()} are not ({shown})")


def midrun_fault(runs: Runs) -> str:
    """What shows that some points were read off before a schedule ended, and so do not compare with runs that ended
    there; "" if nothing does."""
    if "ended" in runs.columns and (runs["ended"] == 0).any():
        unfinished = runs["run_id"][runs["ended"] == 0]
        return f"{len(unfinished)} run(s) have ended=false, first {unfinished[0]!r}"
    # A run's name may come back in another family; twice in one family it is two points of one curve.
    own = np.array([f"{f}|{r}" for f, r in zip(runs["family"], runs["run_id"], strict=True)])
    names, counts = np.unique(own, return_counts=True)
    if (counts > 1).any():
        worst = int(np.argmax(counts))
        return (
            f"run_id {str(names[worst]).split('|', 1)[1]!r} appears {counts[worst]} times, as points inside one run do"
        )
    return ""


def check_comparable(runs: Runs) -> None:
    """Losses in nats compare only over one tokenizer, vocabulary and validation set, sizes and costs by one count: of
    what is recorded for one family it must be known for the other too. Raises ScalingError."""
    advice = {} if runs.kinds("loss_unit") == [BITS] else dict.fromkeys(("tokenizer", "vocab"), IN_BITS)
    advice["val_set"] = "evaluate both on one text"
    advice |= dict.fromkeys(
        ("loss_unit", "flops_rule", "embedding_counted", "D_rule"), "count and measure both alike first"
    )
    for name, mend in advice.items():
        # Known for one family and blank for the other is as bad as different: nobody can tell that they agree.
        kinds = runs.kinds(name)
        if len(kinds) > 1:
            raise ScalingError(f"the two families differ in {name} ({', '.join(kinds)}): {mend}")
        blank = [f for f in runs.families if kinds and not runs.family(f).kinds(name)]
        if blank:
            known = f"{name} is {kinds[0]} for some rows and blank for {blank[0]!r}"
            raise ScalingError(f"{known}: fill it in, or state it for all with --set {name}=VALUE")


def frame_of(columns: Mapping[str, list[Any]]) -> Any:
    """Columns as a DataFrame of the first of pandas, Polars and PyArrow that is installed; raises ScalingError."""
    for backend in ("pandas", "polars", "pyarrow"):
        if importlib.util.find_spec(backend):
            return narwhals.from_dict(dict(columns), backend=backend).to_native()
    raise ScalingError("a DataFrame needs pandas, Polars or PyArrow: pip install pandas")
