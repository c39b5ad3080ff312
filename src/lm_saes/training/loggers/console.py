"""The terminal: a calm progress bar, one aligned row a report, a grouped table at the end."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lm_saes.training.loggers.base import LoggedRun, LoggerConfig

_ROWS_PER_HEADING = 20
_DOWNSTREAM = "metrics/downstream_"
_LEGEND = "l_rec reconstruction loss, L0 latents active per token, EV explained variance"


class ConsoleConfig(LoggerConfig):
    """The terminal."""

    name = "console"

    def make(self, run: LoggedRun) -> ConsoleLogger:
        return ConsoleLogger()


class ConsoleLogger:
    """Shows a run to a person.

    On a terminal a live bar (step, elapsed and remaining time, the last report's rate, loss, L0 and explained
    variance) stays below the rows; elsewhere (a file, a CI log) the rows alone are written, without control
    characters and with the elapsed and remaining time in each.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = self._console.is_interactive
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._last: dict[str, float] = {}
        self._shown: list[_Column] = []
        self._rows = 0
        self._total = self._first = self._step = 0
        self._began = time.monotonic()

    def start(self, total_steps: int, step: int) -> None:
        self._total, self._first, self._step = total_steps, step, step
        self._began = time.monotonic()
        if step > 0:
            self._print(f"resuming after step {step:,} of {total_steps:,}")
        if self._live:
            self._bar = _Bar(self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=step)
            self._bar.start()

    def advance(self, step: int) -> None:
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = max(self._step, step)
        self._last.update(metrics)
        self._print_row(step, metrics)
        downstream = {name: value for name, value in metrics.items() if name.startswith(_DOWNSTREAM)}
        if downstream:
            told = "  ".join(f"{name.removeprefix(_DOWNSTREAM)} {number(value)}" for name, value in downstream.items())
            self._print(f"{'':>{self._step_width}}  downstream: {told}", style="cyan")
        if self._bar is not None:
            self._bar.status = _status(self._last)

    def close(self, summary: Mapping[str, float]) -> None:
        """Stop the bar and, unless `summary` is empty, show it (with the last reports' values) in groups."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if summary:
            self._print("")
            self._print(f"{self._step:,} of {self._total:,} steps in {clock(self._elapsed)}", style="bold")
            self._print("")
            self._console.print(_overview({**self._last, **summary}, columns=2 if self._console.width >= 80 else 1))

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def _step_width(self) -> int:
        return max(len("step"), len(f"{self._total:,}"))

    def _print_row(self, step: int, metrics: Mapping[str, float]) -> None:
        known = [column for column in _COLUMNS if column.metric in self._last]
        if not any(column.metric in metrics for column in known):
            return
        if known != self._shown or self._rows % _ROWS_PER_HEADING == 0:
            self._print("" if self._shown else _LEGEND, "dim")
            self._shown, self._rows = known, 0
            names = [f"{column.heading:>{column.width}}" for column in known]
            self._print("  ".join([f"{'step':>{self._step_width}}", *names, *self._times("elapsed", "left")]), "dim")
        cells = [column.show(metrics[column.metric]) if column.metric in metrics else "" for column in known]
        cells = [f"{cell:>{column.width}}" for cell, column in zip(cells, known, strict=True)]
        left = self._elapsed / max(step - self._first, 1) * max(self._total - step, 0)
        self._print(
            "  ".join([f"{step:>{self._step_width},}", *cells, *self._times(clock(self._elapsed), clock(left))])
        )
        self._rows += 1

    def _times(self, elapsed: str, left: str) -> list[str]:
        return [] if self._live else [f"{elapsed:>8}", f"{left:>8}"]

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(Text(line.rstrip(), style=style or ""), soft_wrap=True)


class _Bar(Progress):
    """Two lines: the bar with its times, and the last report."""

    def __init__(self, console: Console) -> None:
        self.status = Text("the first report is still to come", style="dim")
        super().__init__(
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left", style="progress.remaining"),
            console=console,
            transient=True,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.status


class _Column(NamedTuple):
    heading: str
    metric: str
    width: int
    show: Callable[[float], str]


def number(value: float) -> str:
    """`12,345`, `123.4`, `0.8125`, `1.23e-4`: four significant digits at most, grouped thousands."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and size < 1e15:
        return f"{value:,.0f}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e9 else _scientific(value)
    if size >= 1e-3:
        return f"{value:.{3 - max(math.floor(math.log10(size)), -1)}f}"
    return _scientific(value)


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def short(value: float) -> str:
    """`9,999`, `12.3k`, `45.6M`, `1.23B`."""
    if value < 1e4:
        return f"{value:,.0f}"
    unit, size = next((unit, size) for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)) if value >= size)
    return f"{value / size:.{1 if value < 1e9 else 2}f}{unit}"


def clock(seconds: float) -> str:
    """`0:12:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


_LOSS = _Column("loss", "losses/overall_loss", 7, number)
_L0 = _Column("L0", "metrics/l0", 6, number)
_EXPLAINED = _Column("EV", "metrics/explained_variance", 6, "{:.3f}".format)
_RATE = _Column("tok/s", "details/tokens_per_second", 7, "{:,.0f}".format)
_COLUMNS = (
    _Column("tokens", "details/n_training_tokens", 7, short),
    _LOSS,
    _Column("l_rec", "losses/mse_loss", 7, number),
    _L0,
    _EXPLAINED,
    _Column("dead", "sparsity/dead", 6, number),
    _Column("lr", "details/current_learning_rate", 7, number),
    _RATE,
)


def _status(last: Mapping[str, float]) -> Text:
    known = [column for column in (_LOSS, _L0, _EXPLAINED, _RATE) if column.metric in last]
    return Text("   ".join(f"{column.heading} {column.show(last[column.metric])}" for column in known), style="dim")


def _overview(metrics: Mapping[str, float], columns: int) -> Table:
    """Every metric, grouped by the part of its name before the slash, in columns of about the same height."""
    stacks: list[list[Table]] = [[] for _ in range(columns)]
    for table in _groups(metrics):
        min(stacks, key=lambda stack: sum(group.row_count + 2 for group in stack)).append(table)
    overview = Table.grid(padding=(0, 4))
    overview.add_row(*(Group(*stack) for stack in stacks))
    return overview


def _groups(metrics: Mapping[str, float]) -> list[Table]:
    groups: dict[str, dict[str, list[float]]] = {}
    for name, value in metrics.items():
        group, _, rest = name.partition("/") if "/" in name else ("summary", "", name)
        layered = re.fullmatch(r"(.+)_layer\d+", rest)
        groups.setdefault(group, {}).setdefault(f"{layered[1]} by layer" if layered else rest, []).append(value)
    tables: list[Table] = []
    for group, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
        table.add_column(group, style="dim")
        table.add_column(justify="right")
        for label, values in rows.items():
            low, high = number(min(values)), number(max(values))
            table.add_row(label, low if low == high else f"{low} .. {high}")
        table.add_row()
        tables.append(table)
    return tables
