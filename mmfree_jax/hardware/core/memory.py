"""The memory unit: reads ahead what a token needs, cuts it into beats for the lanes, and writes vectors back."""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware.arithmetic import WORD
from mmfree_jax.hardware.cycles import WRITER_BEATS
from mmfree_jax.hardware.instructions import CoreShape

ADDRESS = 32  # bits of a memory's address, in words
TOKEN = 16  # bits of a token
LOAD_WORDS = 3  # of 32 bits, of a load: address, words, stride


class Reader(Component):
    """Requests the words of all loads, one after another, and holds what has come until it is taken, in order.

    A load of no words is the end of the list. As many words are on their way or waiting as the queue holds.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape, bits = shape, shape.memory_bits
        super().__init__({
            "start": In(1), "token": In(TOKEN),
            "program_write": In(1), "program_address": In(16), "program_data": In(32),
            "read_valid": Out(1), "read_ready": In(1), "read_address": Out(ADDRESS),
            "data_valid": In(1), "data": In(bits),
            "word": Out(bits), "word_valid": Out(1), "beats_take": In(1), "weights_take": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m, shape = Module(), self.core_shape
        loads = Memory(shape=unsigned(32 * LOAD_WORDS), depth=shape.loads + 1, init=[])
        queue = SyncFIFOBuffered(width=shape.memory_bits, depth=shape.queue)
        m.submodules += [loads, queue]
        port, write = loads.read_port(), loads.write_port(granularity=32)
        m.d.comb += [
            write.addr.eq(self.program_address[2:15]),
            write.data.eq(Cat(*[self.program_data] * LOAD_WORDS)),
            write.en.eq((self.program_write & self.program_address[15]) << self.program_address[:2]),
        ]
        index, address, words = Signal(range(shape.loads + 1)), Signal(ADDRESS), Signal(32)
        offset, requested, take, step, token = Signal(ADDRESS), Signal(), Signal(), Signal(TOKEN), Signal(TOKEN)
        due = Signal(range(shape.queue + 1))  # words that have been requested and not taken
        base, count, stride = (port.data.word_select(n, 32) for n in range(LOAD_WORDS))
        m.d.comb += port.addr.eq(index)
        with m.FSM():
            with m.State("IDLE"), m.If(self.start):
                m.d.sync += [index.eq(0), token.eq(self.token)]
                m.next = "FETCH"
            with m.State("FETCH"):
                m.next = "LOAD"
            with m.State("LOAD"):
                m.d.sync += [address.eq(base), words.eq(count), step.eq(stride), index.eq(index + 1)]
                m.next = "OFFSET"
            with m.State("OFFSET"):
                m.d.sync += offset.eq(step * token)
                m.next = "ADD"
            with m.State("ADD"):
                m.d.sync += address.eq(address + offset)
                m.next = "READ"
                with m.If(words == 0):
                    m.next = "IDLE"
            with m.State("READ"):
                m.d.comb += self.read_valid.eq(due != shape.queue)
                with m.If(requested):
                    m.d.sync += [address.eq(address + 1), words.eq(words - 1)]
                    with m.If(words == 1):
                        m.next = "LOAD"  # the next load has been fetched meanwhile

        m.d.sync += due.eq(due + requested - take)
        m.d.comb += [
            requested.eq(self.read_valid & self.read_ready),
            take.eq(self.beats_take | self.weights_take),
            self.read_address.eq(address),
            queue.w_data.eq(self.data),
            queue.w_en.eq(self.data_valid),
            self.word.eq(queue.r_data),
            self.word_valid.eq(queue.r_rdy),
            queue.r_en.eq(take),
        ]
        return m


class Gearbox(Component):
    """Joins words into beats for the lanes: 16 bits a lane in the upper half of `beat`, or 32 with `wide`."""

    def __init__(self, shape: CoreShape):
        self.core_shape = shape
        super().__init__({
            "start": In(1), "beats": In(16), "wide": In(1),
            "word": In(shape.memory_bits), "word_valid": In(1), "word_ready": Out(1),
            "beat": Out(WORD * shape.lanes), "beat_valid": Out(1), "beat_ready": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m, words = Module(), self.core_shape.words
        rest, have, need = Signal(16), Signal(range(2 * words + 1)), Signal(range(2 * words + 1))
        taken = Signal()
        m.d.comb += [
            need.eq(words << self.wide),
            self.beat_valid.eq((have == need) & (rest != 0)),
            taken.eq(self.beat_valid & self.beat_ready),
        ]
        # Of the last beat nothing comes after: the words behind it are for others.
        more = (rest != 0) & ((have != need) | (taken & (rest != 1)))
        m.d.comb += self.word_ready.eq(more & self.word_valid)
        with m.If(self.word_ready):
            m.d.sync += self.beat.eq(Cat(self.beat, self.word)[self.core_shape.memory_bits :])
        with m.If(self.start):
            m.d.sync += [rest.eq(self.beats), have.eq(0)]
        with m.Else():
            m.d.sync += [have.eq(Mux(taken, 0, have) + self.word_ready), rest.eq(rest - taken)]
        return m


class Writer(Component):
    """Writes beats of 32-bit integers to consecutive words.

    The vector unit reserves the place of a beat when it begins it (`room`), since a beat on its way cannot wait.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape = shape
        super().__init__({
            "start": In(1), "address": In(ADDRESS), "idle": Out(1), "room": Out(1), "reserve": In(1),
            "beat": In(WORD * shape.lanes), "beat_valid": In(1),
            "write_valid": Out(1), "write_ready": In(1), "write_address": Out(ADDRESS),
            "write_data": Out(shape.memory_bits),
        })  # fmt: skip

    def elaborate(self, platform):
        m, shape = Module(), self.core_shape
        m.submodules.queue = queue = SyncFIFOBuffered(width=WORD * shape.lanes, depth=WRITER_BEATS)
        reserved, place, done = Signal(range(WRITER_BEATS + 1)), Signal(range(2 * shape.words)), Signal()
        word = Signal()
        m.d.comb += [
            self.room.eq(reserved != WRITER_BEATS),
            self.idle.eq(reserved == 0),
            queue.w_data.eq(self.beat),
            queue.w_en.eq(self.beat_valid),
            self.write_valid.eq(queue.r_rdy),
            self.write_data.eq(queue.r_data.word_select(place, shape.memory_bits)),
            word.eq(self.write_valid & self.write_ready),
            done.eq(word & (place == 2 * shape.words - 1)),
            queue.r_en.eq(done),
        ]
        m.d.sync += reserved.eq(reserved + self.reserve - done)
        with m.If(self.start):
            m.d.sync += self.write_address.eq(self.address)
        with m.Elif(word):
            m.d.sync += [self.write_address.eq(self.write_address + 1), place.eq(Mux(done, 0, place + 1))]
        return m
