"""The live table of a sweep: one line a run, and when all of it will be done."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmfree_jax.config import RunConfig
from mmfree_jax.output import line_printer
from mmfree_jax.sweep.experiment import run_flops
from mmfree_jax.sweep.status import RunStatus, status
from mmfree_jax.threads import repeated

REFRESH_SECONDS = 1.0
PLAIN_SECONDS = 15.0  # between progress lines where there is no terminal to redraw
STYLE = {"done": "green", "running": "bold cyan", "failed": "bold red", "stopped": "yellow", "waiting": "dim"}


@dataclasses.dataclass
class View:
    """Shows the progress of a sweep: a table on a terminal, a line now and then elsewhere. Use it as a context
    manager."""

    runs: Sequence[tuple[RunConfig, Path]]  # with their folders
    console: Console

    def __post_init__(self) -> None:
        self.say = line_printer(self.console)
        self.began = self.read_at = self.shown_at = time.monotonic()
        self.statuses = {run.name: status(folder, run) for run, folder in self.runs}
        self.flops_total = sum(run_flops(run) for run, _ in self.runs)
        self.flops_before = self._flops_done()
        # Time and FLOPs done of the first two observations of progress and of the last.
        self.progress: list[tuple[float, float]] = []
        self.live: Live | None = None

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self.live = Live(self.render(), console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self.render(), refresh=True)
            self.live.stop()

    def update(self) -> None:
        """Read the folders again and show what has changed. Does nothing within REFRESH_SECONDS of the last call."""
        now = time.monotonic()
        if now - self.read_at < REFRESH_SECONDS:
            return
        before, self.read_at = self.statuses, now
        # A finished run does not change any more, so its folder is not read again.
        read = lambda run, folder: before[run.name] if before[run.name].state == "done" else status(folder, run)
        self.statuses = {run.name: read(run, folder) for run, folder in self.runs}
        self.measure(now)
        if self.live:
            self.live.update(self.render(), refresh=True)
            return
        for old, new in zip(before.values(), self.statuses.values(), strict=True):
            if new.state != old.state and new.state in ("done", "failed"):
                self.say(f"{new.state:>7}  {describe(new)}")
        if now - self.shown_at >= PLAIN_SECONDS:
            self.say(self.summary())
            self.shown_at = now

    def _flops_done(self) -> float:
        done = 0.0
        for s in self.statuses.values():
            first = s.config.first_step
            done += run_flops(s.config) * max(0.0, s.step - first) / (s.config.steps - first)
        return done

    def measure(self, now: float) -> None:
        """Record the time and the FLOPs done, if these have grown."""
        # Work is measured in FLOPs, since a step of a large model takes as long as hundreds of a small one.
        done = self._flops_done()
        if done > (self.progress[-1][1] if self.progress else self.flops_before):
            self.progress = [*self.progress[:2], (now, done)]

    def eta_seconds(self) -> float | None:
        """Return the seconds until the last run ends, at the rate since the first observed progress.

        None before the third observation: the time before the first is mostly compilation.
        """
        if len(self.progress) < 3:
            return None
        # The rate since the first observation, less what has passed since the folders were read.
        (began, before), (now, done) = self.progress[0], self.progress[-1]
        return max(0.0, (self.flops_total - done) * (now - began) / (done - before) - (self.read_at - now))

    def summary(self) -> str:
        """Describe in a line how many runs are in which state, the share of the work done, and the time left."""
        states = [s.state for s in self.statuses.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in STYLE if state in states)
        share = self._flops_done() / self.flops_total
        eta = self.eta_seconds()
        left = "" if share >= 1 else f" · {clock(eta)} left" if eta is not None else " · time left not known yet"
        return f"{counts} · {share:.0%} of the FLOPs · {clock(time.monotonic() - self.began)} gone{left}"

    def render(self) -> Table:
        """Return the table. If it is higher than the terminal, finished runs are left out first, then waiting ones."""
        room, everything = max(6, self.console.height - 6), list(self.statuses.values())
        order = ("done", "waiting", "stopped", "running", "failed")
        by_importance = sorted(range(len(everything)), key=lambda i: (-order.index(everything[i].state), -i))
        shown = [everything[i] for i in sorted(by_importance[:room])]
        table = Table(title=self.summary(), title_justify="left", expand=False, pad_edge=False)
        for name in ("run", "state", "step", "loss", "tok/s"):
            table.add_column(name, justify="left" if name in ("run", "state") else "right", no_wrap=True)
        for s in shown:
            # Of a finished run the held-out loss, else that of the last row of training.
            loss = "" if s.loss is None else f"{s.loss:.4f}"
            rate = f"{s.tokens_per_s:,.0f}" if s.tokens_per_s and s.state == "running" else ""
            table.add_row(Text(s.config.name), s.state, f"{s.step}/{s.config.steps}", loss, rate, style=STYLE[s.state])
        if len(shown) < len(self.statuses):
            table.caption = f"{len(self.statuses) - len(shown)} more do not fit this terminal"
        return table


@contextlib.contextmanager
def follow(config: RunConfig, folder: Path, console: Console) -> Iterator[None]:
    """Show the progress of a run that this process trains, from a thread."""
    # From a thread, because the training loop must not wait for a terminal, and a compilation may take minutes.
    with View([(config, folder)], console) as view, repeated(view.update, REFRESH_SECONDS):
        yield


def describe(s: RunStatus) -> str:
    """Describe a run in a line."""
    parts = [f"{s.config.name}  step {s.step}/{s.config.steps}"]
    parts += [] if s.loss is None else [f" loss {s.loss:.4f}"]
    parts += [f"  {s.tokens_per_s:,.0f} tokens/s"] if s.state == "running" and s.tokens_per_s else []
    parts += [] if s.eta_seconds is None else [f", {clock(s.eta_seconds)} left"]
    parts += [f"  {s.holder}"] if s.holder else []
    return "".join(parts) + (f"  {s.error}" if s.error else "")


def clock(seconds: float) -> str:
    """Return a duration as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
