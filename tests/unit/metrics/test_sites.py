"""Metrics of each layer of a cross-layer transcoder and each head of a crosscoder, by closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes import CLTConfig, CrossCoder, CrossCoderConfig, CrossLayerTranscoder

New = Callable[..., Any]
HOOK = "blocks.0.hook_resid_post"
D, F = 8, 16
INS, OUTS, HOOKS = ["in0", "in1"], ["out0", "out1"], ["a.hook", "b.hook"]
SHAPE: dict[str, Any] = {"d_model": D, "expansion_factor": F / D, "norm_activation": "inference"}


def sited(stream: list[Any], hooks: list[str]) -> list[Any]:
    """The batches of one hook point as batches of several, each with its own scale and offset."""
    return [
        {**{k: v for k, v in b.items() if k != HOOK}, **{h: (i + 1) * b[HOOK] + 3 * i for i, h in enumerate(hooks)}}
        for b in stream
    ]


def clt() -> CrossLayerTranscoder:
    """All zero: nothing is written, nothing is active."""
    return CrossLayerTranscoder(CLTConfig(hook_points_in=INS, hook_points_out=OUTS, **SHAPE))


def crosscoder() -> CrossCoder:
    return CrossCoder(CrossCoderConfig(hook_points=HOOKS, **SHAPE))


def frozen(run: New, dictionary: Any, stream: list[Any], **settings: Any) -> dict[str, float]:
    """The one report of a run that moves no weight."""
    steps = len(stream)
    settings = {"steps": steps, "tokens": stream[0]["tokens"].numel(), "log_frequency": steps, **settings}
    return run(dictionary, stream, lr=0.0, **settings).log.rows[steps]


def valid(stream: list[Any], hook: str) -> Tensor:
    rows = [b[hook].reshape(-1, D)[b["mask"].reshape(-1) if "mask" in b else slice(None)] for b in stream]
    return torch.cat(rows).double()


@pytest.mark.parametrize("contexts", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_explained_variance_and_error_by_formula(
    run: New, batches: New, kind: str, masked: bool, contexts: int
) -> None:
    """Of a constant reconstruction, over batches with different numbers of valid tokens: sums, not means of means."""
    stream = sited(batches(3, masked=masked, contexts=contexts), INS + OUTS if kind == "clt" else HOOKS)
    dictionary = clt() if kind == "clt" else crosscoder()
    with torch.no_grad():
        assert dictionary.b_D is not None
        for site, bias in enumerate(dictionary.b_D):
            bias.fill_(0.7 + site)
    row = frozen(run, dictionary, stream)
    found = []
    for site, hook in enumerate(OUTS if kind == "clt" else HOOKS):
        y = valid(stream, hook)
        error = (0.7 + site - y).square().sum(1)
        explained = float(1 - error.sum() / (y - y.mean(0)).square().sum())
        found.append(explained)
        if kind == "clt":
            assert row[f"metrics/explained_variance_layer{site}"] == pytest.approx(explained, rel=1e-4)
            assert row[f"metrics/l0_layer{site}"] == 0
        else:
            assert row[f"crosscoder_metrics/{hook}/explained_variance"] == pytest.approx(explained, rel=1e-4)
            assert row[f"crosscoder_metrics/{hook}/l_rec"] == pytest.approx(float(error.mean()), rel=1e-5)
            assert row[f"crosscoder_metrics/{hook}/l0"] == 0
    assert found[0] != pytest.approx(found[1], rel=0.01)
    assert row["metrics/explained_variance"] == pytest.approx(sum(found) / 2, rel=1e-4)


def test_layers_by_hand(run: New, batches: New) -> None:
    """Layer 0: 5 latents are always active. Layer 1: 2 always, 1 on the first of two steps' tokens only."""
    stream = sited(batches(2, masked=True), INS + OUTS)
    for batch, value in zip(stream, (2.0, -2.0), strict=True):
        batch["in1"] = torch.full_like(batch["in1"], value)
    dictionary = clt()
    with torch.no_grad():
        dictionary.b_E.fill_(-100.0)
        dictionary.b_E[0, :5] = dictionary.b_E[1, :2] = 1.0
        dictionary.W_E[1, 0, 7], dictionary.b_E[1, 7] = 1.0, 0.0
        for decoder in dictionary.decoders:
            decoder.fill_(1.0)  # selection is gated: without norms nothing is positive
    n = [int(b["mask"].sum()) for b in stream]
    row = frozen(run, dictionary, stream, feature_sampling_window=2, dead_threshold=n[1] + 1)
    share = n[0] / sum(n)
    assert row["metrics/l0_layer0"] == 5
    assert row["metrics/l0_layer1"] == pytest.approx(2 + share)
    assert row["metrics/l0"] == pytest.approx(7 + share)  # summed over layers
    for limit in ("above_1e-1", "above_1e-2"):
        assert [row[f"sparsity/{limit}{end}"] for end in ("_layer0", "_layer1", "")] == [5, 3, 8]
    for limit in ("below_1e-5", "below_1e-6", "below_1e-7"):
        assert [row[f"sparsity/{limit}{end}"] for end in ("_layer0", "_layer1", "")] == [11, 13, 24]
    assert [row[f"sparsity/dead{end}"] for end in ("_layer0", "_layer1", "")] == [11, 13, 24]  # latent 7 is not yet


def test_heads_by_hand(run: New, batches: New) -> None:
    """Thresholds on h norm_j: 4 latents pass in both heads, 3 more in the second alone."""
    stream = sited(batches(2, masked=True), HOOKS)
    cfg = CrossCoderConfig(hook_points=HOOKS, act_fn="jumprelu", **SHAPE)
    dictionary = CrossCoder(cfg)
    with torch.no_grad():
        dictionary.b_E[0] = 2.0  # h = 2 everywhere; theta = 1
        dictionary.W_D[:, :4, 0] = 1.0
        dictionary.W_D[1, 4:7, 1] = 3.0
    row = frozen(run, dictionary, stream, feature_sampling_window=2, dead_threshold=1)
    assert [row[f"crosscoder_metrics/{hook}/l0"] for hook in HOOKS] == [4, 7]
    assert row["metrics/l0"] == 5.5  # averaged over heads
    assert row["sparsity/dead"] == row["sparsity/below_1e-5"] == F - 7  # a latent lives if any head fires
    assert row["sparsity/above_1e-1"] == 7
    assert not [name for name in row if "layer" in name]


def test_an_autoencoder_has_no_sites(run: New, new_sae: New, batches: New) -> None:
    row = frozen(run, new_sae("relu"), batches(2), feature_sampling_window=2)
    assert not [name for name in row if "layer" in name or name.startswith("crosscoder")]
    assert "sparsity/above_1e-1" in row


def test_windows_end_at_reports(run: New, batches: New) -> None:
    stream = sited(batches(4), HOOKS)
    rows = run(crosscoder(), stream, lr=0.0, steps=4, log_frequency=2).log.rows
    for end, part in ((2, stream[:2]), (4, stream[2:])):
        want = valid(part, HOOKS[1]).square().sum(1).mean()
        assert rows[end]["crosscoder_metrics/b.hook/l_rec"] == pytest.approx(float(want), rel=1e-5)
