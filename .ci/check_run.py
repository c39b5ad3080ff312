"""Fail unless the run directory named on the command line is what a finished training run leaves behind."""

import json
import math
import sys
from pathlib import Path

FILES = ["config.json", "sae_weights.safetensors", "settings.json", "metrics.jsonl", "evaluation.json", "report.html"]
METRICS = ["losses/overall_loss", "losses/mse_loss", "metrics/l0", "metrics/explained_variance"]

run = Path(sys.argv[1])
missing = [name for name in FILES if not (run / name).is_file() or (run / name).stat().st_size == 0]
if missing:
    sys.exit(f"{run}: missing or empty: {', '.join(missing)}")

lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
reports = [line for line in lines if all(name in line for name in METRICS)]
if not reports:
    seen = sorted({name for line in lines for name in line})
    sys.exit(f"{run}/metrics.jsonl: no line has all of {METRICS}; seen: {seen}")
not_finite = [name for name in METRICS if not math.isfinite(reports[-1][name])]
if not_finite:
    sys.exit(f"{run}/metrics.jsonl: not finite: {', '.join(not_finite)}")

report = (run / "report.html").read_text()
if "explained" not in report or any(f'src="{scheme}' in report for scheme in ("http:", "https:", "//")):
    sys.exit(f"{run}/report.html: lacks its metrics, or loads something from outside")
print(f"{run}: {len(lines)} reports, last: { ({name: round(reports[-1][name], 4) for name in METRICS}) }")
