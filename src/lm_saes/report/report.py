"""Writes `report.html`: one self-contained page about a run, which opens offline."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_saes.report.figures import curve_charts, downstream_chart, frequency_chart
from lm_saes.report.saved_run import SavedRun
from lm_saes.storage.files import write_text

_TOLD_ELSEWHERE = frozenset({"metrics", "training_metrics", "trainer"})
"""Of the provenance, what the report's other tables have."""


@dataclass(frozen=True)
class Card:
    """A headline number."""

    label: str
    value: str
    note: str


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir` from the files there, and return its path.

    Only `metrics.jsonl` has to exist; what the other files (`evaluation.json`, `latents.json`, `config.json`,
    `settings.json`, `provenance.json`) would tell is left out where they are absent.

    Raises:
        DataError: `metrics.jsonl` is absent, or a file is not what it should be.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    run = SavedRun.read(Path(run_dir))
    curves = curve_charts(run)
    evaluation = [chart for chart in (frequency_chart(run), downstream_chart(run)) if chart is not None]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("template.html").render(
        title=run.settings.get("sae_name") or run.path.resolve().name,
        subtitle=_subtitle(run),
        cards=[asdict(card) for card in _cards(run)],
        curves=curves,
        evaluation_charts=evaluation,
        figures={chart.id: chart.figure for chart in curves + evaluation},
        latents=[_shown(latent) for latent in run.latents],
        tables=_tables(run),
        plotly=Markup(get_plotlyjs()),
    )
    target = run.path / "report.html"
    write_text(target, html)
    return target


def _subtitle(run: SavedRun) -> list[str]:
    """What was trained on what, in a few short phrases."""
    cfg = run.dictionary
    hook_in, hook_out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    phrases = [
        _kind(cfg),
        f"{cfg['d_model']:,} → {run.n_latents:,} latents" if "d_model" in cfg and run.n_latents else "",
        (hook_in if hook_in == hook_out else f"{hook_in} → {hook_out}") if hook_in else "",
        (run.settings.get("model") or {}).get("model_name") or run.settings.get("model_name") or "",
    ]
    return [phrase for phrase in phrases if phrase]


def _kind(cfg: dict[str, Any]) -> str:
    """`topk sparse autoencoder, k = 32`; nothing where the config does not tell."""
    kind, act_fn = cfg.get("sae_type"), cfg.get("act_fn")
    if not kind or not act_fn:
        return ""
    if cfg.get("hook_point_in") != cfg.get("hook_point_out"):
        kind = "transcoder"
    k = f", k = {cfg['top_k']}" if "topk" in act_fn and "top_k" in cfg else ""
    return f"{act_fn} {'sparse autoencoder' if kind == 'sae' else kind}{k}"


def _cards(run: SavedRun) -> list[Card]:
    """The headline numbers: held out where an evaluation exists, else the last training report's."""
    n_evaluated = run.evaluated("details/n_evaluated_tokens")
    on_held_out = f"on {n_evaluated:,.0f} held-out tokens" if n_evaluated else "held out"
    cards = [
        _measured(run, "Explained variance", "metrics/explained_variance", 3, on_held_out),
        _measured(run, "L0", "metrics/l0", 1, on_held_out),
        _dead_or_silent(run, on_held_out),
        _recovered(run),
        *_effort(run),
    ]
    return [card for card in cards if card is not None]


def _measured(run: SavedRun, label: str, name: str, digits: int, on_held_out: str) -> Card | None:
    """A metric that training and evaluation both have."""
    held_out, trained = run.evaluated(name), run.last(name)
    if held_out is not None:
        training = f"; training {trained:.{digits}f}" if trained is not None else ""
        return Card(label, f"{held_out:.{digits}f}", on_held_out + training)
    return None if trained is None else Card(label, f"{trained:.{digits}f}", "last training report")


def _dead_or_silent(run: SavedRun, on_held_out: str) -> Card | None:
    """Latents dead in training; without such a report those silent on held-out text."""
    dead, silent = run.last("sparsity/dead"), run.evaluated("sparsity/silent")
    if dead is None:
        return None if silent is None else Card("Silent latents", f"{silent:.1%}", f"never active {on_held_out}")
    unseen = f"; {silent:.1%} silent on held-out text" if silent is not None else ""
    if run.n_latents:
        return Card("Dead latents", f"{dead / run.n_latents:.1%}", f"{dead:,.0f} of {run.n_latents:,}{unseen}")
    return Card("Dead latents", f"{dead:,.0f}", f"latents, at the last report{unseen}")


def _recovered(run: SavedRun) -> Card | None:
    """How much of the language model's loss the reconstruction keeps."""
    recovered, kl = run.evaluated("metrics/downstream_loss_recovered"), run.evaluated("metrics/downstream_kl")
    if recovered is None:
        return None
    return Card("Loss recovered", f"{recovered:.1%}", f"KL {kl:.3f} nats" if kl is not None else "downstream")


def _effort(run: SavedRun) -> list[Card]:
    """What the training took."""
    tokens, seconds = run.last("details/n_training_tokens"), _training_seconds(run)
    cards = []
    if tokens is not None:
        cards.append(Card("Training tokens", _compact(tokens), f"{run.last('step'):,.0f} steps"))
    if tokens and seconds:
        cards.append(Card("Training time", _duration(seconds), f"{_compact(tokens / seconds)} tokens/s on average"))
    return cards


def _training_seconds(run: SavedRun) -> float:
    """Time spent training, from the tokens and the rate of each report: pauses of a resumed run do not count."""
    seconds, before = 0.0, 0.0
    for row in run.rows:
        tokens, rate = row.get("details/n_training_tokens"), row.get("details/tokens_per_second")
        if tokens and rate:
            seconds, before = seconds + (tokens - before) / rate, tokens
    return seconds


def _compact(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def _shown(latent: dict[str, Any]) -> dict[str, Any]:
    """A latent as the template shows it: every snippet as runs of text (text, activation, share of the strongest)."""
    strongest = latent["max_activation"] or 1.0
    lines = []
    for snippet in latent["snippets"]:
        pieces = [
            (_visible(token), activation, round(max(0.0, activation) / strongest, 2))
            for token, activation in zip(snippet["tokens"], snippet["activations"], strict=True)
        ]
        i = snippet["peak"]
        peak = {"text": pieces[i][0] or "◌", "activation": pieces[i][1]}
        lines.append({"left": _runs(pieces[:i]), "peak": peak, "right": _runs(pieces[i + 1 :])})
    return {**latent, "every": 1 / latent["frequency"] if latent["frequency"] else 0.0, "lines": lines}


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\r", "").replace("\t", "⇥")


def _runs(pieces: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Neighbouring tokens without an activation joined into one piece, which keeps the page small."""
    runs: list[tuple[str, float, float]] = []
    for text, activation, share in pieces:
        if activation <= 0 and runs and runs[-1][1] <= 0:
            text = runs.pop()[0] + text
        runs.append((text, activation, share))
    return runs


def _tables(run: SavedRun) -> list[dict[str, Any]]:
    """The collapsible tables: titles and (name, value) rows."""
    final = {name: value for row in run.rows for name, value in row.items() if name not in ("step", "time")}
    parts = [
        ("Held-out metrics", _flat(run.evaluation)),
        ("Training metrics, last reported", _flat(final)),
        ("Settings", _flat(run.settings or run.config)),
        ("Versions and provenance", _flat({k: v for k, v in run.provenance.items() if k not in _TOLD_ELSEWHERE})),
    ]
    return [{"title": title, "rows": rows} for title, rows in parts if rows]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested values as (a.b.c, text) rows."""
    items: dict[Any, Any] = {}
    if isinstance(value, dict):
        items = value
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = dict(enumerate(value))
    if items:
        return [row for key, item in items.items() for row in _flat(item, f"{path}.{key}" if path else str(key))]
    return [(path, _text(value))] if path else []


def _text(value: Any) -> str:
    """A value as a table shows it."""
    match value:
        case float():
            return f"{value:.6g}"
        case list():
            return ", ".join(map(str, value)) or "empty"
        case None:
            return "not set"
        case _:
            return str(value)
