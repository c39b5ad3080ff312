"""What a person sees during a run: on a terminal, and where there is none."""

import io
import re
from collections.abc import Mapping

import pytest
from rich.console import Console

from lm_saes.training.loggers import ConsoleLogger
from lm_saes.training.loggers.console import clock, number, short

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def metrics(step: int) -> dict[str, float]:
    return {
        "losses/overall_loss": 100 / step,
        "losses/mse_loss": 99 / step,
        "metrics/l0": 32.0,
        "metrics/explained_variance": 0.8125,
        "details/n_training_tokens": 2048 * step,
        "details/current_learning_rate": 4e-4,
        "details/tokens_per_second": 34567.8,
    }


def run_console(terminal: bool, steps: int = 50, summary: Mapping[str, float] | None = None, first: int = 0) -> str:
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, force_terminal=terminal, width=100, highlight=False))
    logger.start(steps, first)
    for step in range(first + 1, steps + 1):
        logger.advance(step)
        logger.report(step, metrics(step))
    logger.close({"losses/overall_loss": 2.0} if summary is None else summary)
    return out.getvalue()


def test_plain_output_is_aligned_lines_without_control_characters() -> None:
    out = run_console(terminal=False)
    assert not CONTROL.search(out)
    lines = out.splitlines()
    heading = lines[1]
    assert heading.split() == ["step", "tokens", "loss", "l_rec", "L0", "EV", "lr", "tok/s", "elapsed", "left"]
    assert lines[2].split()[:8] == ["1", "2,048", "100", "99", "32", "0.812", "4.00e-4", "34,568"]
    assert all(len(line) == len(heading) for line in lines[2:22])


def test_the_heading_comes_again_every_twenty_rows() -> None:
    lines = run_console(terminal=False).splitlines()
    headings = [number for number, line in enumerate(lines) if line.startswith("step")]
    assert headings == [1, 23, 45]  # 20 rows, an empty line and the heading


def test_a_terminal_shows_a_bar_with_the_last_report_and_leaves_the_rows() -> None:
    out = run_console(terminal=True)
    assert "\x1b[" in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "50/50" in text and "100%" in text and "left" in text
    assert "loss 2   L0 32   EV 0.812   tok/s 34,568" in text
    assert "elapsed" not in text
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = run_console(terminal=True)
    assert not CONTROL.search(out) and "elapsed" in out


def test_the_end_shows_everything_in_groups_and_layers_as_ranges() -> None:
    layers = {f"metrics/l0_layer{layer}": 10.0 * layer for layer in range(1, 4)}
    out = run_console(terminal=False, summary={"sparsity/dead": 12.0, "best_norm": 0.5, **layers})
    end = out[out.index("50 of 50 steps in 0:00:0") :]
    for expected in ("losses", "metrics", "details", "sparsity", "summary", "best_norm", "0.5000"):
        assert expected in end
    assert re.search(r"l0 by layer +10 \.\. 30", end)
    assert re.search(r"n_training_tokens +102,400", end), "what only the reports said is shown too"


def test_a_failed_run_ends_without_a_table() -> None:
    assert " of " not in run_console(terminal=False, summary={})
    assert run_console(terminal=True, summary={}).endswith("\x1b[?25h\r\x1b[1A\x1b[2K\x1b[1A\x1b[2K")


def test_a_metric_that_comes_later_gets_its_column_with_a_new_heading() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, width=100))
    logger.start(100, 0)
    logger.report(10, metrics(10))
    logger.report(20, {**metrics(20), "sparsity/dead": 7})
    logger.report(30, metrics(30))
    lines = [line.split() for line in out.getvalue().splitlines() if line and not line.startswith("l_rec")]
    assert [line[0] for line in lines] == ["step", "10", "step", "20", "30"]
    assert "dead" not in lines[0] and "dead" in lines[2]
    assert lines[3][lines[2].index("dead")] == "7"
    assert len(lines[4]) == len(lines[3]) - 1


def test_downstream_metrics_have_a_line_of_their_own() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, width=100))
    logger.start(100, 0)
    logger.report(10, {"metrics/downstream_loss_recovered": 0.9123, "metrics/downstream_kl": 0.031})
    assert out.getvalue() == "      downstream: loss_recovered 0.9123  kl 0.0310\n"


def test_a_resumed_run_says_so_and_estimates_from_its_own_steps() -> None:
    out = run_console(terminal=False, steps=50, first=40)
    assert out.startswith("resuming after step 40 of 50\n")
    assert "\n  41 " in out and "\n  40 " not in out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12345.6, "12,346"),
        (32.0, "32"),
        (123.44, "123.4"),
        (12.3456, "12.35"),
        (1.5, "1.500"),
        (0.8125, "0.8125"),
        (0.0123, "0.0123"),
        (0.000123, "1.23e-4"),
        (-0.000123, "-1.23e-4"),
        (1.5e12 + 0.5, "1.50e12"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert number(value) == text


def test_counts_and_times_are_short() -> None:
    assert [short(value) for value in (0, 9999, 12345, 3e8, 1.234e9)] == ["0", "9,999", "12.3k", "300.0M", "1.23B"]
    assert [clock(seconds) for seconds in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]
