"""Collectives, matrix products and kernels of a compiled program, read from its HLO text (`compiled.as_text()`).

An instruction in a loop counts once for every iteration: XLA writes the trip count of every `lax.scan`, or it is read
from the loop's condition.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
TAIL = "reduce-scatter tail"  # a permute that ends a reduce-scatter

# What the expressions match, by an example of each line:
#   _COMPUTATION  %body.3 (p: (f32[8])) -> (f32[8]) {              a named list of instructions; ENTRY is the main one
#   _COLLECTIVE   %ag = s8[256,512]{1,0} all-gather-start(…)       kind, result type, and whether it is asynchronous
#   _CALL         while(…), condition=%c, body=%b                  an instruction runs one computation, …
#   _CALLS        conditional(…), branch_computations={%t, %f}     … or any of several
#   _TRIPS        backend_config={"known_trip_count":{"n":"24"}}   iterations of a while loop
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALL = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
# A matrix product is a dot, and on TPUs a convolution; its operands are named, and defined elsewhere.
_DEFINITION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = \(?([a-z]+\d*\w*)\[", re.MULTILINE)
_PRODUCT = re.compile(r"= ([a-z]+\d*\w*)\[\S+ (?:convolution|dot)\(%([\w.\-]+), %([\w.\-]+)\)")
_KERNEL = re.compile(r"%(\w+?)(?:\.[\w.]+)? = [^\n]* custom-call\([^\n]*custom_call_target=\"tpu_custom_call\"")
_HOST = re.compile(r" (?:infeed|outfeed|send|recv)(?:-start|-done)?\(|\{[^{}]*S\(5\)[^{}]*\}")  # S(5): its memory
# TPUs scatter a sum in a computation of this name: an all-reduce of which each device keeps its part. The parts are
# whole granules of the ring; where they are not those of the array, a permute moves their ends to the next device.
_SCATTERED = "all-reduce-scatter"
_CHAIN = re.compile(r'channel_id=(\d+),.*chain_id="')
# Device groups have four notations: pairs of a permute; lists; a reshaped range ([2,4]<=[8]: two rows of four), perhaps
# transposed; and axes of a named mesh.
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',?\s*)+)\}"
)


@dataclass(frozen=True)
class Collective:
    """One collective instruction. Arrays are complete: after an all-gather, or before a reduce-scatter."""

    kind: str  # of KINDS, or TAIL
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # HLO dtype ("s8", "bf16") and shape on one device
    groups: tuple[tuple[int, ...], ...]  # numbers of the devices that communicate; for a permute: its pairs
    executions: int  # per run of the program
    origin: str  # the operation of the traced program that caused it

    @property
    def payload(self) -> float:
        """Bytes of `arrays` in one execution."""
        return sum((math.prod(shape) * item_bytes(dtype) for dtype, shape in self.arrays), 0.0)

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all executions, by a ring.

        (n - 1) / n of the payload among n devices, twice that for an all-reduce, all of it for a permute.
        """
        n = max((len(group) for group in self.groups), default=1)
        times = {"all-reduce": 2.0}.get(self.kind, 1.0)
        share = 1.0 if self.kind in ("collective-permute", TAIL) else (n - 1) / n
        return times * share * self.payload * self.executions

    def axes(self, sizes: dict[str, int]) -> tuple[str, ...]:
        """Return the axes along which it communicates, of a mesh of these sizes with devices in order."""
        shape = tuple(sizes.values())
        members = [np.stack(np.unravel_index(list(group), shape)) for group in self.groups]
        crossed = np.any([m.max(axis=1) > m.min(axis=1) for m in members], axis=0)
        return tuple(name for name, crosses in zip(sizes, crossed, strict=True) if crosses)


def item_bytes(dtype: str) -> float:
    """Return the bytes of one element of an HLO type such as s8, bf16, f8e4m3fn, pred."""
    if dtype == "pred":
        return 1
    return int(re.match(r"[a-z]+(\d+)", dtype)[1]) / 8  # type: ignore[index]


def collectives(text: str) -> list[Collective]:
    """Return all collectives of a compiled module, from the view of one device.

    Raises ValueError for a collective in a loop whose trip count XLA does not know, and for device groups in an unknown
    notation.
    """
    bodies = _computations(text)
    runs = _executions(bodies)
    found, chains = [], set()
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.match(line)
            if match is None or runs[name] == 0:
                continue
            # On TPUs a collective that goes on beside other work stands in each part of that work.
            chain = _CHAIN.search(line)
            if chain is not None and chain[1] in chains:
                continue
            chains |= {chain[1]} if chain else set()
            if math.isnan(runs[name]):
                raise ValueError(f"{match[1]} is in a loop of unknown length")
            groups = _groups(line)
            arrays = _complete(match[3], match[2], bool(match[4]), len(groups[0]))
            origin = _ORIGIN.search(line)
            kind = _kind(match[3], name, line, lines)
            found.append(Collective(kind, arrays, groups, int(runs[name]), origin[1] if origin else ""))
    return found


def products(text: str) -> Counter[tuple[str, str, str]]:
    """Count the matrix products of a compiled module by the types of both operands and of the result."""
    types = {name: dtype for name, dtype in _DEFINITION.findall(text)}
    return Counter((types[a], types[b], result) for result, a, b in _PRODUCT.findall(text))


def kernels(text: str) -> Counter[str]:
    """Count the hand-written kernels for TPUs in a compiled module, by name."""
    return Counter(_KERNEL.findall(text))


def host_transfers(text: str) -> list[str]:
    """Return the lines of a compiled module that exchange data with the host, or keep them in its memory."""
    return [line.strip() for line in text.splitlines() if _HOST.search(line)]


def total(found: Iterable[Collective]) -> dict[tuple[str, str], tuple[int, float]]:
    """Return, by kind and dtype, the number of arrays and the bytes sent by one device, over all executions.

    Arrays instead of instructions, because compilers combine any number of arrays in one instruction.
    """
    # A combined instruction is one message, but each of its arrays has a type of its own.
    count: Counter[tuple[str, str]] = Counter()
    sent: defaultdict[tuple[str, str], float] = defaultdict(float)
    for one in found:
        for dtype, shape in one.arrays:
            count[one.kind, dtype] += one.executions
            sent[one.kind, dtype] += one.sent * math.prod(shape) * item_bytes(dtype) / max(one.payload, 1)
    return {key: (count[key], sent[key]) for key in sorted(count)}


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation by name; that of the entry is empty."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            lines = bodies.setdefault("" if header[1] else header[2], [])
        else:
            lines.append(line)
    return bodies


def _executions(bodies: dict[str, list[str]]) -> dict[str, float]:
    """Number of executions of each computation; NaN in a loop of unknown length."""
    callers: dict[str, list[tuple[str, float]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            for callee, times in _calls(line, bodies):
                callers[callee].append((name, times))
    runs: dict[str, float] = {"": 1}

    def count(name: str) -> float:
        if name not in runs:
            runs[name] = sum(count(caller) * times for caller, times in callers[name])
        return runs[name]

    return {name: count(name) for name in bodies}


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, float]]:
    """Computations that an instruction runs, and how often."""
    times = 1.0
    if " while(" in line:
        trips = _TRIPS.search(line)
        times = int(trips[1]) if trips else _compared(line, bodies)
    for match in _CALL.finditer(line):
        yield match[1], times
    for match in _CALLS.finditer(line):
        for name in match[1].split(","):
            yield name.strip().lstrip("%"), times


def _compared(line: str, bodies: dict[str, list[str]]) -> float:
    """Iterations of a loop as its condition has them: a scan counts from 0 while its counter is less than a constant.

    The compiler for TPUs writes no trip counts. NaN where the condition is another.
    """
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(bodies.get(condition[1], [])) if condition else ""
    compared = re.search(r"ROOT .* compare\([^()]*%([\w.\-]+)\), direction=LT", text)
    limit = re.search(rf"%{re.escape(compared[1])} = s32\S* constant\((\d+)\)", text) if compared else None
    return int(limit[1]) if limit else math.nan


def _kind(kind: str, computation: str, line: str, beside: list[str]) -> str:
    """The kind of a collective, given its computation and all lines of that; see `_SCATTERED`."""
    if computation.startswith(_SCATTERED):
        return "reduce-scatter"
    if kind != "collective-permute":
        return kind
    defining = lambda name: next((other for other in beside if re.match(rf"\s*%{re.escape(name)} = ", other)), "")
    sent = re.search(rf" {kind}\S*\(%?([\w.\-]+)", line)
    part = re.search(r" slice\(%([\w.\-]+)\)", defining(sent[1])) if sent else None
    return TAIL if part and f"calls=%{_SCATTERED}" in defining(part[1]) else kind


def _complete(kind: str, result: str, started: bool, members: int) -> tuple:
    """The arrays of a collective, from its result type. An asynchronous start returns its operands first."""
    arrays = [(dtype, _integers(sizes)) for dtype, sizes in _ARRAY.findall(result)]
    if kind == "collective-permute" and started:
        return tuple(arrays[:1])
    # An asynchronous all-gather returns (operands, results); an asynchronous all-reduce only results, unless it
    # combines several arrays, when its type is a tuple of tuples.
    both = started and (kind == "all-gather" or result.startswith("(("))
    operands, results = (arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]) if both else (None, arrays)
    if kind == "reduce-scatter":
        return tuple(operands or [(dtype, (members, *shape)) for dtype, shape in results])
    return tuple(results)


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Device groups in any of HLO's notations."""
    if pairs := _PAIRS.search(line):
        return tuple(_integers(pair) for pair in re.findall(r"\{([\d,]+)", "{" + pairs[1].lstrip("{") + "}"))
    if listed := _LISTED.search(line):
        return tuple(_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    # Devices are numbered along a shape, and its axes perhaps taken in another order.
    numbered = lambda shape: np.arange(math.prod(shape)).reshape(shape)
    arranged = lambda shape, order: numbered(shape).transpose(order) if order else numbered(shape)
    if iota := _IOTA.search(line):
        devices = arranged(_integers(iota[2]), _integers(iota[3] or ""))
        return tuple(map(tuple, devices.reshape(_integers(iota[1])).tolist()))
    if mesh := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        devices = arranged(_integers(mesh[2]) if mesh[2] else tuple(sizes.values()), _integers(mesh[3] or ""))
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
        last = np.moveaxis(devices.reshape(tuple(sizes.values())), axes, range(-len(axes), 0))
        return tuple(map(tuple, last.reshape(-1, math.prod(last.shape[-len(axes) :])).tolist()))
    raise ValueError(f"device groups are not understood: {line.strip()[:300]}")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
