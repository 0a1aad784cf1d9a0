"""What a run says on stderr while it trains: a bar, or lines where nobody watches."""

from __future__ import annotations

import datetime
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Protocol, Self

# True: a bar in a terminal, lines anywhere else; "plain": lines; False: nothing.
Show = bool | Literal["plain"]
# Steps over which the rate is measured.
_RECENT = 50


class Words(Protocol):
    """What a stage has to say of its numbers.

    Attributes:
        unit: what a training item is called, in the plural.
    """

    unit: str

    def brief(self, metrics: Mapping[str, float]) -> str:
        """The metrics of a step, or means over some, in the few words of a progress bar."""

    def summary(self, values: Mapping[str, float]) -> str:
        """Validation metrics as a sentence."""

    def concern(self, values: Mapping[str, float]) -> str | None:
        """What is wrong and what to do about it.

        Args:
            values: validation metrics; without validation data those of training; none before the first ones.
        """


class Progress:
    """Tells how a run goes: how far it is, how fast, and what validation finds.

    A concern is said when it is first seen and, if it still stands, at the end.

    Args:
        done, steps: how many steps there are already, and how many there are to be.
        batch_size: items per step.
        clock: seconds.
    """

    def __init__(
        self,
        words: Words,
        done: int,
        steps: int,
        batch_size: int,
        *,
        show: Show,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        from tqdm import tqdm

        self._words, self._done, self._steps, self._batch_size, self._clock = words, done, steps, batch_size, clock
        self._shown = bool(show)
        bar = show is True and sys.stderr.isatty()
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar: Any = tqdm(total=steps, initial=done, disable=not bar, file=sys.stderr, bar_format=layout)
        self._plain = self._shown and not bar
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._began = self._step_began = clock()
        self._warned = False

    def __enter__(self) -> Self:
        self._worry({})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin_step(self) -> None:
        """The time from here to :meth:`step` is that of a step; validation and what is written are not in it."""
        self._step_began = self._clock()

    def step(self, metrics: Mapping[str, float]) -> None:
        self._seconds.append(self._clock() - self._step_began)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self._rate()}, {self._words.brief(metrics)}", refresh=False)
            self._bar.update()

    def line(self, step: int, means: Mapping[str, float]) -> None:
        """A line for logs: means since the last one."""
        if self._plain:
            self._say(f"step {step}/{self._steps}: {self._words.brief(means)}, {self._rate()}, {self._left(step)} left")

    def validated(self, step: int, values: Mapping[str, float], *, best: bool) -> None:
        self._say(f"validation at step {step}: {self._words.summary(values)}{' (best so far)' if best else ''}")
        self.judge(step, values)

    def judge(self, step: int, values: Mapping[str, float]) -> None:
        """Look for what is wrong."""
        if step == self._steps or not self._warned:
            self._worry(values)

    def _worry(self, values: Mapping[str, float]) -> None:
        concern = self._words.concern(values) if self._shown else None
        if concern is not None:
            self._say(f"fastvq: warning: {concern}")
            self._warned = True

    def _say(self, text: str) -> None:
        if self._shown:
            self._bar.write(text, file=sys.stderr)

    def _rate(self) -> str:
        """Items per second over the last steps."""
        rate = self._batch_size * len(self._seconds) / max(sum(self._seconds), 1e-9)
        return f"{rate:.3g} {self._words.unit}/s" if rate < 1000 else f"{rate:.0f} {self._words.unit}/s"

    def _left(self, step: int) -> str:
        """Time to the end if it goes on as since the start, with validation and what is written."""
        seconds = (self._clock() - self._began) / max(1, step - self._done) * (self._steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))
