"""All peers of a case, timed in turns; their tests report what was found."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence

import torch

from bench.cases import Case
from bench.clock import device_seconds
from bench.harness import Entry, Peer, Recorder, Result, measure, return_freed_memory
from bench.registry import PEERS, PROBLEMS, Contender, LeftOutError, contender, peers_of

_DEVICE_RUNS = 5


def _on_device(peer: Peer) -> float:
    peer.prepare()
    return device_seconds(peer.run, torch.device(peer.device))


class Group:
    """A case in this session: what its peers share, made once, and what they were found to do.

    On a machine that drifts, the ratio of two peers timed one after the other is worth less: on a shared one that of
    plain PyTorch to fastvq (N 4096, K 512, D 64; 24 times 25 runs of each) lay between 1.6 and 4.1 in blocks, median
    2.3, and between 1.7 and 3.2 in turns, median 1.95. So the first test of a case times all peers that are selected,
    and each test hands its own rounds to pytest-benchmark.
    """

    def __init__(self, case: Case, recorder: Recorder, *, small: bool = False) -> None:
        self.case, self.recorder, self.small = case, recorder, small
        self.clear()
        size = case.small() if small else case
        self.problem = PROBLEMS[case.operation](size, tuned=not recorder.quick, ceilings=recorder.ceilings)
        if not recorder.quick:
            self.problem.measure_ceilings()
        self.result = Result(case.operation, case.name, size.batch, [], self.problem.work, facts=self.problem.facts)
        recorder.results.append(self.result)

    def run(self, names: Sequence[str]) -> None:
        """Time and check these peers, unless they have been."""
        done = {entry.peer for entry in self.result.entries} | set(self.result.left_out)
        contenders: dict[str, Contender] = {}
        forms: dict[str, list[Peer]] = {}
        for name in names:
            if name in done:
                continue
            try:
                one, found = self._warm(name)
            except LeftOutError as error:
                self.result.left_out[name] = str(error)
                self.recorder.log(f"  {name}: left out: {error}")
                self.clear()
                continue
            if not self.small:
                return_freed_memory()
            if isinstance(found, Entry):
                self._add(found)
            else:
                contenders[name], forms[name] = one, found
        runs = [form for found in forms.values() for form in found]
        seconds, outputs = measure(runs, quick=self.recorder.quick)
        for name, one in contenders.items():
            chosen = min(forms[name], key=lambda form: statistics.median(seconds[form.name]))
            output = outputs.pop(chosen.name)
            check = self.problem.check(one, output) if one.exact and one.whole else None
            facts = {"threads": chosen.threads, **one.facts}
            if len(forms[name]) > 1:
                facts["seconds_by_form"] = {form.name: seconds[form.name] for form in forms[name]}
            entry = Entry(name, seconds[chosen.name], check, one.exact, one.whole, facts=facts, remarks=one.remarks)
            one.finish(entry, chosen)
            if chosen.device != "cpu" and not self.recorder.quick:
                entry.facts["device_seconds"] = [_on_device(chosen) for _ in range(_DEVICE_RUNS)]
            self._add(entry)
        order = peers_of(self.case)
        self.result.entries.sort(key=lambda entry: order.index(entry.peer))
        self.problem.finish(self.result, self.recorder.results)
        if not self.recorder.quick:
            self.result.memory += self.problem.memory(list(contenders.values()))

    def _warm(self, name: str) -> tuple[Contender, list[Peer] | Entry]:
        try:
            one = contender(self.problem, name)
            return one, one.warm()
        except LeftOutError:
            raise
        except Exception as error:
            if not PEERS[self.case.operation][name].optional:
                raise
            lines = str(error).strip().splitlines()
            raise LeftOutError(f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]) from error

    def clear(self) -> None:
        """Give memory that nobody uses back: what a case leaves in cycles and compiled functions can be gigabytes."""
        if not self.small:
            gc.collect()
            return_freed_memory()

    def _add(self, entry: Entry) -> None:
        self.result.entries.append(entry)
        if entry.extrapolated:
            how = entry.extrapolated
        elif entry.check is None:
            how = "not compared"
        else:
            how = ("" if entry.check.passed else "CHECK FAILED: ") + entry.check.summary
        self.recorder.log(f"  {entry.peer}: {entry.median:.3g} s x {len(entry.seconds)}; {how}")


def run_case(case: Case, recorder: Recorder, names: Sequence[str] | None = None) -> Result:
    """All peers of a case, or the named ones, outside of tests."""
    group = Group(case, recorder)
    group.run(peers_of(case) if names is None else names)
    return group.result
