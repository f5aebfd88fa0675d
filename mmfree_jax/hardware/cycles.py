"""The cycle model: how long a core takes for a token, without simulating it.

It follows the program instruction by instruction. What an instruction takes beside its beats are stages of pipelines,
read off the units; words from memory are counted as a level in the reader's queue, which fills at the memory's rate and
is never above what the queue holds. tests/hardware/test_core.py compares it with simulation.
"""

import dataclasses

from mmfree_jax.hardware.instructions import B, CoreShape, D, Norm, Op, Program, Vector, words_read

# The vector unit is built with these stages: from an address to a lane's inputs, through the lane, from there to the
# maximum of each lane.
READ_STAGES, LANE_STAGES, REDUCE_STAGES = 2, 10, 2
# From the start of NORM until 127 / maximum is there, and the scale of the product; more of them after another norm.
QUANTISER, SCALE, INNER = 31, 102, 12
SUMS = 4  # from a group's last word until its sums can be taken
WRITER_BEATS = 16  # that the writer holds
WRITER_LATENCY = READ_STAGES + LANE_STAGES + 3  # from a beat's issue until its first word leaves
REQUEST = 3  # cycles of a request in the reader and its queue
START = 5  # from a token's start until its first request


@dataclasses.dataclass(frozen=True)
class MemoryModel:
    """A memory that answers after `latency` cycles and gives `rate` words a cycle, at most 1."""

    latency: int = 20
    rate: float = 1.0


ANSWERS = MemoryModel()


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Cycles of a token: in all, and for products; and the least cycles in which their weights can be read."""

    total: float
    products: float
    bound: float


def token_cycles(program: Program, memory: MemoryModel = ANSWERS) -> Cycles:
    """Predict the cycles of a token, and of its products."""
    run = _Run(program.shape, memory)
    products = bound = 0.0
    for instruction in program.instructions:
        begin = run.time
        run.execute(instruction)
        if isinstance(instruction, Vector) and instruction.op == Op.TERNARY:
            products += run.time - begin
            bound += instruction.count * instruction.depth / program.shape.rows / memory.rate
    return Cycles(run.time, products, bound)


class _Run:
    """The time, and the words that wait in the queue."""

    def __init__(self, shape: CoreShape, memory: MemoryModel):
        self.shape, self.memory = shape, memory
        # No more than the queue's words are on their way or waiting. A full queue has to request anew, and what it
        # requests arrives later: of a long stream so many words are missing.
        delay = memory.latency + REQUEST
        self.rate = min(memory.rate, shape.queue / delay)
        self.capacity = shape.queue - self.rate * delay
        self.time, self.level = 1.0, 0.0
        self.first_word = START + REQUEST + memory.latency
        self.quantiser = self.scale = 0.0  # when they are ready
        self.writer = 0.0  # when the writer is idle
        self.tail = READ_STAGES + LANE_STAGES + REDUCE_STAGES + (shape.lanes - 1).bit_length()

    def execute(self, i) -> None:
        """Advance the time to the end of an instruction."""
        if isinstance(i, Norm):
            self.elapse(max(2, self.scale - self.time + 1))
            self.quantiser = self.time - 1 + QUANTISER
            self.scale = self.time - 1 + SCALE + (INNER if i.inner else 0)
        elif i.op == Op.END:
            self.elapse(max(2, self.writer - self.time + 1))
        elif i.op == Op.TERNARY:
            self.ternary(i)
        else:
            self.vector(i)

    def elapse(self, cycles: float, words: int = 0) -> None:
        """Let time pass, at least so many cycles, and as many as the memory needs for the words."""
        if words:
            # What waits is `level`, but a queue that is full has as many words more as then come late.
            waiting = self.shape.queue if self.level == self.capacity else self.level
            missing = (words - self.level) / self.rate if words > waiting else 0.0
            cycles = max(cycles, self.first_word - self.time + words / self.rate, missing)
            if self.time < self.first_word:
                self.level = 0.0
        self.level = min(self.capacity, max(0.0, self.level + self.rate * cycles - words))
        self.time += cycles

    def vector(self, i: Vector) -> None:
        beats, words = self.shape.beats(i.count), words_read(i, self.shape)
        wait = max(0.0, self.quantiser - self.time - 1) if i.b == B.RECIPROCAL else 0.0
        last = beats + (words - beats + 1 if words else 0)  # cycles until the last beat begins
        if i.d == D.MEMORY:
            size = 2 * self.shape.words
            if beats > WRITER_BEATS:
                last = max(last, WRITER_LATENCY + size * (beats - WRITER_BEATS) + 1)
            self.writer = self.time + 2 + max(last, size * (beats - 1)) + WRITER_LATENCY + size
        self.elapse(wait + 2, 0)
        self.elapse(last, words)
        self.elapse(self.tail + 1)

    def ternary(self, i: Vector) -> None:
        """A group's last word comes `last` cycles after the start; its sums leave while the next group is read."""
        shape, depth = self.shape, i.depth
        groups, leave = shape.groups(i.count), shape.rows // shape.lanes
        self.elapse(2)
        start = self.time - 1
        # The first sums wait for the scale, and the last word of a group until the sums before it have left.
        last = start + depth
        leaving = max(last + SUMS, max(start + 1, self.scale) + 1)
        if groups > 1:
            last = max(last + depth, leaving + leave) + (groups - 2) * max(depth, leave + SUMS)
            leaving = last + SUMS
        self.elapse(last - start, groups * depth)
        self.elapse(leaving - last + shape.beats(i.count) - (groups - 1) * leave - 1 + self.tail + 1)
