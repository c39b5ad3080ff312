"""The report's charts as plotly figures in plain JSON values. Colours suit a light and a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_saes.report.saved_run import SavedRun

BLUE, ORANGE, TEAL, ROSE, GREY = "#4477d8", "#e08a2e", "#27a08a", "#c4568f", "#8b94a5"
MAX_POINTS = 1500
"""A longer curve is thinned to about this many points, evenly."""

LOSSES = [
    ("losses/mse_loss", "reconstruction", BLUE),
    ("losses/sparsity_loss", "sparsity", ORANGE),
    ("losses/lp_loss", "pre-activation", TEAL),
    ("losses/aux_loss", "auxiliary", ROSE),
    ("losses/overall_loss", "overall", GREY),
]


@dataclass(frozen=True)
class Chart:
    """A figure under an element id, with the words around it."""

    id: str
    title: str
    note: str
    figure: dict[str, Any]


def curve_charts(run: SavedRun) -> list[Chart]:
    """Training curves over the steps; a chart without a single point is left out."""
    charts = [_losses(run), _explained_variance(run), _l0(run), _dead(run), _learning_rate(run), _throughput(run)]
    return [chart for chart in charts if chart is not None]


def _losses(run: SavedRun) -> Chart | None:
    return _chart(
        "losses",
        "Loss terms",
        "each already times its coefficient; both axes logarithmic",
        [
            _line(run, name, label, colour, dash="dot" if label == "overall" else "solid")
            for name, label, colour in LOSSES
            if any(run.series(name)[1])
        ],
        yaxis={"type": "log"},
        xaxis={"type": "log"},
    )


def _explained_variance(run: SavedRun) -> Chart | None:
    name = "metrics/explained_variance"
    curves = [
        _line(run, name, "training", BLUE),
        _line(run, "eval/explained_variance", "held-out", TEAL, dash="dash"),
    ]
    held_out = run.evaluated(name)
    if held_out is not None and curves[0] and not curves[1]:
        curves.append(_level(run, held_out, f"held-out: {held_out:.3f}"))
    return _chart(
        "explained-variance",
        "Explained variance",
        "about the mean; step axis logarithmic",
        curves,
        xaxis={"type": "log"},
        yaxis={"range": [max(-0.05, min([0.0, *run.series(name)[1]])), 1.02]},
    )


def _l0(run: SavedRun) -> Chart | None:
    return _chart(
        "l0",
        "L0: active latents per token",
        "with the k in force, where there is one",
        [_line(run, "metrics/l0", "L0", BLUE), _line(run, "sparsity/k", "k", GREY, dash="dot")],
        yaxis={"rangemode": "tozero"},
    )


def _dead(run: SavedRun) -> Chart | None:
    width = run.n_latents
    return _chart(
        "dead",
        "Dead latents",
        "no activation for dead_threshold tokens" + (", percent" if width else ""),
        [_line(run, "sparsity/dead", "dead", ROSE, scale=100 / width if width else 1.0)],
        yaxis={"rangemode": "tozero", "ticksuffix": "%" if width else ""},
    )


def _learning_rate(run: SavedRun) -> Chart | None:
    return _chart(
        "learning-rate",
        "Learning rate",
        "of the default parameter group",
        [_line(run, "details/current_learning_rate", "learning rate", TEAL)],
        yaxis={"rangemode": "tozero", "exponentformat": "e"},
    )


def _throughput(run: SavedRun) -> Chart | None:
    return _chart(
        "throughput",
        "Throughput",
        "training tokens per second",
        [_line(run, "details/tokens_per_second", "tokens/s", ORANGE)],
        yaxis={"rangemode": "tozero"},
    )


def frequency_chart(run: SavedRun) -> Chart | None:
    """How many latents fire how often, in bins of a tenth of a decade; the silent ones are told in the note."""
    logs = [math.log10(value) for value in run.frequency if value > 0]
    if not logs:
        return None
    low = math.floor(min(logs) * 10)
    counts = [0] * (math.floor(max(logs) * 10) - low + 1)
    for value in logs:
        counts[math.floor(value * 10) - low] += 1
    edges = [(low + i) / 10 for i in range(len(counts))]
    import plotly.graph_objects as go

    bars = go.Bar(
        x=[edge + 0.05 for edge in edges],
        y=counts,
        width=0.1,
        marker={"color": BLUE},
        customdata=[[f"{100 * 10**edge:.2g}%", f"{100 * 10 ** (edge + 0.1):.2g}%"] for edge in edges],
        hovertemplate="%{y} latents active on %{customdata[0]} to %{customdata[1]} of tokens<extra></extra>",
    )
    decades = range(math.floor(low / 10), 1)
    ticks = {"tickvals": list(decades), "ticktext": [f"{100 * 10.0**decade:g}%" for decade in decades]}
    silent = len(run.frequency) - len(logs)
    return _chart(
        "frequency",
        "How often latents fire",
        f"{len(logs):,} latents over the share of held-out tokens they are active on; {silent:,} never fired",
        [bars],
        xaxis={"title": {"text": "share of tokens (logarithmic)"}, **ticks},
        yaxis={"title": {"text": "latents"}},
        layout={"bargap": 0},
    )


def downstream_chart(run: SavedRun) -> Chart | None:
    """The language model's loss with the activation original, reconstructed and zeroed."""
    parts = ["ablated", "reconstructed", "original"]
    losses = [run.evaluated(f"metrics/downstream_loss_{part}") for part in parts]
    if any(loss is None for loss in losses):
        return None
    import plotly.graph_objects as go

    bars = go.Bar(
        x=losses,
        y=["set to zero", "reconstructed", "original"],
        orientation="h",
        width=0.55,
        marker={"color": [GREY, BLUE, TEAL]},
        text=[f"{loss:.3f}" for loss in losses],
        textfont={"color": "#ffffff"},
        hovertemplate="%{y}: %{x:.4f} nats<extra></extra>",
    )
    return _chart(
        "downstream",
        "What the language model loses",
        "next-token cross-entropy with the activation …",
        [bars],
        xaxis={"title": {"text": "nats per token"}, "rangemode": "tozero"},
        yaxis={"showgrid": False},
    )


def _line(run: SavedRun, name: str, label: str, colour: str, scale: float = 1.0, dash: str = "solid") -> Any:
    steps, values = run.series(name)
    if not steps:
        return None
    import plotly.graph_objects as go

    return go.Scatter(
        x=_thinned(steps),
        y=[value * scale for value in _thinned(values)],
        name=label,
        mode="lines" if len(steps) > 1 else "markers",
        line={"color": colour, "width": 1.8, "dash": dash},
        hovertemplate="%{y:.4~g}",
    )


def _level(run: SavedRun, value: float, label: str) -> Any:
    import plotly.graph_objects as go

    steps = [row["step"] for row in run.rows]
    line = {"color": TEAL, "width": 1.8, "dash": "dash"}
    return go.Scatter(x=[steps[0], steps[-1]], y=[value, value], name=label, mode="lines", line=line, hoverinfo="skip")


def _thinned(values: Sequence[Any]) -> list[Any]:
    """Every so-many-th value, and always the last."""
    stride = -(-len(values) // MAX_POINTS)
    return [*values[:-1:stride], values[-1]]


def _chart(
    id: str,
    title: str,
    note: str,
    traces: list[Any],
    xaxis: dict[str, Any] | None = None,
    yaxis: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
) -> Chart | None:
    traces = [trace for trace in traces if trace is not None]
    if not traces:
        return None
    import plotly.graph_objects as go

    if traces[0].type == "scatter":
        xaxis = {"title": {"text": "step"}, **(xaxis or {})}
    figure = go.Figure(
        data=traces,
        layout={"template": "none", "xaxis": xaxis, "yaxis": yaxis, "showlegend": len(traces) > 1, **(layout or {})},
    )
    return Chart(id, title, note, figure.to_plotly_json())
