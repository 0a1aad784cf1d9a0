"""Operations of a plan as the launches of one step: for each level the products, then what follows them.

Everything is evaluated where and when a position is sampled, or for all positions of a row before the first of them is.
An operation's level is one more than those of what its products read of the same step; all else of a level follows its
products, element by element. An instruction works out one operation, with a gate in front of it and an activation
behind it where the plan has those; instructions that pass a vector on in registers make a chain, and a stage is the
chains that need not wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastvq.sampling.engines.front_work import Work
from fastvq.sampling.plan.form import Op

Source = Literal["sum", "values", "lookup"]


@dataclass
class Instruction:
    """How the vector of one operation is worked out.

    Attributes:
        op: that operation.
        source, read: what is read, and of which operation: the ``sum`` of its products, its stored ``values``, or its
            ``lookup``.
        gate: the variant of the gate that this goes through, or empty.
        operand: the operation that is added, or None.
        from_last: it is what the instruction before has left in registers.
        activation: an operation that is worked out of the result as well, or None.
        leaves: the operation whose vector is left in registers.
    """

    op: int
    source: Source
    read: int
    stage: int
    gate: str = ""
    operand: int | None = None
    from_last: bool = False
    activation: int | None = None
    leaves: int = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = self.op


Chain = list[Instruction]


@dataclass
class Level:
    """The affine operations of one launch, and the stages that follow."""

    products: list[Op]
    stages: list[list[Chain]]


class FrontProgram:
    """The launches of a step, in order.

    Attributes:
        values: operations whose vectors of the current step are read element by element in another chain, or by others.
        features: operations that products read, statics among them.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        made = [work.ops[index] for index in sorted(work.made)]
        self.values: set[int] = set(work.wanted)
        self.features = {term.source for op in made for term in op.terms}
        self._level = _levels(work)
        self._readers: dict[int, list[Op]] = {op.index: [] for op in work.ops}
        for op in made:
            for source in op.sources:
                self._readers[source].append(op)
        self.levels = [self._one_level(level) for level in range(max(self._level) + 1)]

    def _one_level(self, level: int) -> Level:
        ops = [op for op in self._work.ops if self._level[op.index] == level]
        # Where the vector of an operation of this level is worked out, and the last instructions of chains.
        self._made: dict[int, Instruction] = {}
        self._chains: list[Chain] = []
        for op in ops:
            if op.kind == "affine":
                if self._is_stored(op) or any(
                    self._level[r.index] != level or r.kind != "gate" for r in self._read(op)
                ):
                    self._begin(Instruction(op.index, "sum", op.index, 0))
            elif op.kind == "lookup":
                self._begin(Instruction(op.index, "lookup", op.index, 0))
            elif op.kind == "activation":
                self._activate(op)
            elif op.kind == "gate":
                if self._adds(op) is None:
                    source, read, stage = self._source(op.sources[0], level)
                    self._begin(Instruction(op.index, source, read, stage, op.variant))
            else:
                self._add(op, level)
        stages: list[list[Chain]] = [[] for _ in range(1 + max((c[0].stage for c in self._chains), default=-1))]
        for chain in self._chains:
            stages[chain[0].stage].append(chain)
        return Level([op for op in ops if op.kind == "affine"], [stage for stage in stages if stage])

    def _read(self, op: Op) -> list[Op]:
        return self._readers[op.index]

    def _is_stored(self, op: Op) -> bool:
        return op.index in self.features or op.index in self._work.wanted

    def _adds(self, gate: Op) -> Op | None:
        """The addition of the same level that alone reads a gate, and works it out itself."""
        readers = self._read(gate)
        if len(readers) != 1 or self._is_stored(gate):
            return None
        (reader,) = readers
        same = self._level[reader.index] == self._level[gate.index]
        return reader if same and reader.kind == "add" and reader.sources[1] == gate.index else None

    def _begin(self, instruction: Instruction) -> None:
        self._chains.append([instruction])
        self._made[instruction.op] = instruction

    def _source(self, index: int, level: int) -> tuple[Source, int, int]:
        """How an operation is read, and from which stage on."""
        if self._work.ops[index].kind == "affine" and self._level[index] == level:
            return "sum", index, 0
        self.values.add(index)
        return "values", index, self._made[index].stage + 1 if index in self._made else 0

    def _activate(self, op: Op) -> None:
        (read,) = op.sources
        made = self._made.get(read)
        if made is not None and made.op == read and made.activation is None:
            made.activation = op.index
            self._made[op.index] = made
            return
        source, read, stage = self._source(read, self._level[op.index])
        # The vector itself is there already: only the activation is new.
        self._begin(Instruction(read, source, read, stage, activation=op.index))
        self._made[op.index] = self._chains[-1][0]
        if made is not None:
            self._made[read] = made

    def _add(self, op: Op, level: int) -> None:
        first, second = op.sources
        other = self._work.ops[second]
        gate = other.variant if other.kind == "gate" and self._adds(other) is op else ""
        source, read, stage = self._source(other.sources[0] if gate else second, level)
        made = self._made.get(first)
        if made is not None and made.stage >= stage:
            chain = next(chain for chain in self._chains if made in chain)
            if chain[-1] is made:
                made.leaves = first
                chain.append(Instruction(op.index, source, read, made.stage, gate, first, from_last=True))
                self._made[op.index] = chain[-1]
                return
        self.values.add(first)
        if made is not None:
            stage = max(stage, made.stage + 1)
        self._begin(Instruction(op.index, source, read, stage, gate, first))


def _levels(work: Work) -> list[int]:
    """Of all operations: -1 for those that are not worked out."""
    levels: list[int] = []
    for op in work.ops:
        if op.index not in work.made:
            levels.append(-1)
            continue
        waits = [term.source for term in op.terms if work.waits(term)]
        here = [levels[source] for source in op.sources] + [levels[source] + 1 for source in waits]
        levels.append(max(here, default=0))
    return levels
