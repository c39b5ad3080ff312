"""The report: its numbers, its escaping, that it loads nothing from elsewhere, and what it does without files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lm_saes.errors import DataError
from lm_saes.report.report import write_report

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
METRICS = [
    {
        "step": step,
        "time": 1.7e9 + step,
        "losses/overall_loss": 100.0 / step,
        "losses/mse_loss": 99.0 / step,
        "losses/lp_loss": 0.0,
        "metrics/explained_variance": 1 - 1 / (step + 1),
        "metrics/l0": 40.0,
        "sparsity/dead": 3.0,
        "details/current_learning_rate": 4e-4,
        "details/n_training_tokens": 1000.0 * step,
        "details/tokens_per_second": 500.0,
    }
    for step in (1, 2, 3)
]
EVALUATION = {
    "metrics/explained_variance": 0.7654,
    "metrics/l0": 31.52,
    "sparsity/silent": 0.25,
    "details/n_evaluated_tokens": 2048.0,
    "metrics/downstream_loss_original": 3.111,
    "metrics/downstream_loss_reconstructed": 3.222,
    "metrics/downstream_loss_ablated": 9.333,
    "metrics/downstream_loss_recovered": 0.9821,
    "metrics/downstream_loss_ratio": None,
    "metrics/downstream_kl": 0.0419,
}
LATENTS = {
    "frequency": [0.5, 0.1, 0.011, 0.012, 0.0] + [0.0011] * 55,
    "latents": [
        {
            "latent": 0,
            "frequency": 0.5,
            "max_activation": 8.0,
            "snippets": [
                {"tokens": ["a", " b\n", " peak", HOSTILE], "activations": [0.0, 2.0, 8.0, 0.0], "peak": 2},
                {"tokens": ["", "é"], "activations": [4.0, 0.0], "peak": 0},
            ],
        }
    ],
}
SETTINGS = {
    "sae_name": f"name {HOSTILE}",
    "sae": {"sae_type": "sae", "hook_point_in": "h.in", "hook_point_out": "h.in", "d_model": 15,
            "expansion_factor": 4.0, "act_fn": "topk", "top_k": 32},
    "trainer": {"lr": 0.0004, "betas": [0.9, 0.999], "initial_k": None},
    "activation_factory": {"sources": [{"type": "dataset", "name": HOSTILE}]},
}  # fmt: skip
TRAINING = ["losses", "explained-variance", "l0", "dead", "learning-rate", "throughput"]
PROVENANCE = {"lm_saes": "0.1.0", "torch": "2.13.0", "model": {"name": "tiny"}, "metrics": {"metrics/l0": 1.0}}


def write_run(path: Path, **files: Any) -> Path:
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, evaluation=EVALUATION, latents=LATENTS, settings=SETTINGS, provenance=PROVENANCE)


class Page(HTMLParser):
    """What a browser would make of the report: elements, visible text, figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.figures: dict[str, Any] = {}
        self.feed(path.read_text("utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script" and dict(self.elements[-1][1]).get("id") == "figures":
            self.figures = json.loads(data)
        elif inside not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def test_the_headline_numbers_are_there(run: Path):
    page = Page(write_report(run))
    for wanted in (
        "Explained variance 0.765 on 2,048 held-out tokens; training 0.750",
        "L0 31.5 on 2,048 held-out tokens; training 40.0",
        "Dead latents 5.0% 3 of 60; 25.0% silent on held-out text",
        "Loss recovered 98.2% KL 0.042 nats",
        "Training tokens 3k 3 steps",
        "Training time 6.0 s 500 tokens/s on average",
        "topk sparse autoencoder, k = 32 15 → 60 latents h.in",
    ):
        assert wanted in page.text


def test_the_charts_hold_the_curves(run: Path):
    figures = Page(write_report(run)).figures
    assert set(figures) == {*TRAINING, "frequency", "downstream"}
    curves = {name: {t["name"]: (t["x"], t["y"]) for t in figures[name]["data"]} for name in TRAINING}
    assert curves["losses"] == {
        "reconstruction": ([1, 2, 3], [99.0, 49.5, 33.0]),
        "overall": ([1, 2, 3], [100.0, 50.0, 100 / 3]),
    }
    assert curves["explained-variance"]["held-out: 0.765"] == ([1, 3], [0.7654, 0.7654])
    assert curves["dead"] == {"dead": ([1, 2, 3], [5.0, 5.0, 5.0])}
    assert figures["downstream"]["data"][0]["x"] == [9.333, 3.222, 3.111]
    # 0.0011 is in the bin from 10^-3.0, 0.011 and 0.012 in that from 10^-2.0, 0.1 from 10^-1.0, 0.5 from 10^-0.4.
    bars = figures["frequency"]["data"][0]
    assert {round(x, 2): y for x, y in zip(bars["x"], bars["y"], strict=True) if y} == {
        -2.95: 55,
        -1.95: 2,
        -0.95: 1,
        -0.35: 1,
    }


def test_long_curves_are_thinned_but_keep_their_end(tmp_path: Path):
    rows = [{"step": step, "metrics/l0": float(step)} for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = Page(write_report(tmp_path)).figures["l0"]["data"]
    assert 1000 < len(line["x"]) <= 1501
    assert line["x"] == line["y"]
    assert (line["x"][0], line["x"][-1]) == (1, 5000)


def test_snippets_are_highlighted_by_activation(run: Path):
    page = Page(write_report(run))
    marks = [(m.get("class"), m.get("style"), m.get("title")) for m in page.all("mark")]
    assert marks == [(None, "--a:0.25", "2.0"), ("peak", None, "8.0"), ("peak", None, "4.0")]
    assert "b⏎" in page.text and "é" in page.text
    assert page.all("tr", **{"class": "latent"})[0]["data-latent"] == "0"


def test_settings_and_versions_are_shown(run: Path):
    page = Page(write_report(run))
    for wanted in ("trainer.lr 0.0004", "trainer.betas 0.9, 0.999", "trainer.initial_k not set", "torch 2.13.0",
                   "model.name tiny", "metrics/downstream_loss_ratio not set"):  # fmt: skip
        assert wanted in page.text


def test_hostile_text_is_only_ever_text(run: Path):
    page = Page(write_report(run))
    assert page.text.count(HOSTILE) == 5  # tab title, heading, snippet, two settings
    assert page.all("img") == []
    assert len(page.all("script")) == 3
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_loaded_from_elsewhere(run: Path):
    page = Page(write_report(run))
    loading = [(tag, a[name]) for tag, a in page.elements for name in ("src", "href", "srcset", "data") if name in a]
    assert loading == [("link", "data:,")]
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (policy["content"] or "").startswith("default-src 'none'")
    styles = re.findall(r"<style>.*?</style>", (run / "report.html").read_text("utf-8"), re.S)
    assert styles and not any("url(" in style or "@import" in style for style in styles)


def test_only_the_metrics_have_to_exist(tmp_path: Path):
    page = Page(write_report(write_run(tmp_path)))
    assert "Explained variance 0.750 last training report" in page.text
    assert "Dead latents 3 latents, at the last report" in page.text
    assert page.all("tr", **{"class": "latent"}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


@pytest.mark.parametrize("missing", ["evaluation", "latents", "settings", "provenance"])
def test_any_other_file_may_be_absent(run: Path, missing: str):
    (run / f"{missing}.json").unlink()
    assert "Training tokens 3k" in Page(write_report(run)).text


def test_held_out_measurements_during_training_are_a_curve(run: Path):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "eval/explained_variance": step / 10}) + "\n" for step in (4, 5))
    curves = {t["name"]: (t["x"], t["y"]) for t in Page(write_report(run)).figures["explained-variance"]["data"]}
    assert curves["held-out"] == ([4, 5], [0.4, 0.5])
    assert set(curves) == {"training", "held-out"}


def test_nothing_reported_yet(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert Page(write_report(tmp_path)).figures == {}


def test_a_resumed_or_killed_run(tmp_path: Path):
    again = METRICS[1] | {"metrics/l0": 39.0}
    lines = [json.dumps(row) for row in [*reversed(METRICS), again, METRICS[0] | {"metrics/l0": None}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "metr')
    (line,) = Page(write_report(tmp_path)).figures["l0"]["data"]
    assert (line["x"], line["y"]) == ([2, 3], [39.0, 40.0])


def test_what_cannot_be_read_is_named(run: Path):
    (run / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json is not JSON"):
        write_report(run)
    (run / "evaluation.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        write_report(run)
    (run / "metrics.jsonl").write_text('{"no": "step"}\n')
    with pytest.raises(DataError, match="line 1"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="does not exist"):
        write_report(run)
    assert not (run / "report.html").exists()
