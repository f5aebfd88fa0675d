"""The chooser: the first of the tokens with the largest logit."""

from amaranth.hdl import Array, Module, Signal, signed
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware.arithmetic import WORD
from mmfree_jax.hardware.instructions import CoreShape


class Chooser(Component):
    """Each lane keeps the best of its logits, and at the end the lanes are compared, one a cycle.

    Logits whose index is not below `limit` are those of padding.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape = shape
        super().__init__({
            "start": In(1), "limit": In(32), "finish": In(1), "ready": Out(1, init=1),
            "logits": In(WORD * shape.lanes), "logits_valid": In(1), "index": In(16), "token": Out(32),
        })  # fmt: skip

    def elaborate(self, platform):
        m, lanes = Module(), self.core_shape.lanes
        lane = Signal(range(max(lanes, 2)))
        lowest = -(2 ** (WORD - 1))
        best = [Signal(signed(WORD), name=f"best{n}") for n in range(lanes)]
        token = [Signal(32, name=f"token{n}") for n in range(lanes)]
        for n in range(lanes):
            logit, index = self.logits.word_select(n, WORD).as_signed(), self.index * lanes + n
            with m.If(self.start):
                m.d.sync += best[n].eq(lowest)
            with m.Elif(self.logits_valid & (index < self.limit) & (logit > best[n])):
                m.d.sync += [best[n].eq(logit), token[n].eq(index)]

        largest = Signal(signed(WORD))
        with m.FSM():
            with m.State("COLLECT"), m.If(self.finish):
                m.d.sync += [largest.eq(lowest), lane.eq(0)]
                m.next = "COMPARE"
            with m.State("COMPARE"):
                candidate, index = Array(best)[lane], Array(token)[lane]
                first = (candidate == largest) & (index < self.token)
                with m.If((candidate > largest) | first):
                    m.d.sync += [largest.eq(candidate), self.token.eq(index)]
                m.d.sync += lane.eq(lane + 1)
                with m.If(lane == lanes - 1):
                    m.d.sync += self.ready.eq(1)
                    m.next = "COLLECT"
        with m.If(self.start):
            m.d.sync += self.ready.eq(0)
        return m
