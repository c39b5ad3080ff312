"""Cross-layer transcoders and crosscoders through the trainer: the loss falls, and a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm_saes import CLTConfig, CrossCoderConfig, Initializer, InitializerConfig, Trainer
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import ConfigError
from lm_saes.training.checkpoint import saved_steps

New = Callable[..., Any]
HOOK, D, STEPS = "blocks.0.hook_resid_post", 8, 20
INS, OUTS, HOOKS = (["in0", "in1", "in2"], ["out0", "out1", "out2"], ["a", "b", "c"])
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk with auxk": ("topk", {"auxk_coefficient": 0.1, "k_aux": 4, "dead_threshold": 20}),
    "batchtopk": ("batchtopk", {}),
    "batchlayertopk": ("batchlayertopk", {"gradient_accumulation_steps": 2}),
    "jumprelu with tanh-quad": (
        "jumprelu",
        {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.01, "lp_coefficient": 0.01},
    ),
}
every_way = pytest.mark.parametrize("way", WAYS)
both_kinds = pytest.mark.parametrize("kind", ["clt", "crosscoder"])


def new(kind: str, act_fn: str, seed: int = 0) -> AbstractSparseAutoEncoder:
    shape: dict[str, Any] = {"d_model": D, "expansion_factor": 4.0, "act_fn": act_fn}
    shape |= {"top_k": 4} if "topk" in act_fn else {}
    cfg = (
        CLTConfig(hook_points_in=INS, hook_points_out=OUTS, **shape)
        if kind == "clt"
        else CrossCoderConfig(hook_points=HOOKS, **shape)
    )
    torch.manual_seed(seed)
    bound: dict[str, Any] = {} if kind == "clt" else {"decoder_uniform_bound": 0.2}
    start = InitializerConfig(init_log_jumprelu_threshold_value=-1.0 if act_fn == "jumprelu" else None, **bound)
    norms = {hook: 4.0 + i for i, hook in enumerate(cfg.associated_hook_points)}
    return Initializer(start).initialize_sae_from_config(cfg, activation_norm=norms)


def sited(batches: list[Any], kind: str) -> list[Any]:
    """Every hook point reads the same directions through a rotation of its own."""
    hooks = INS + OUTS if kind == "clt" else HOOKS
    draw = torch.Generator().manual_seed(5)
    turns = [torch.linalg.qr(torch.randn(D, D, generator=draw)).Q * (1 + 0.25 * i) for i in range(len(hooks))]
    return [
        {**{k: v for k, v in b.items() if k != HOOK}, **{h: b[HOOK] @ t for h, t in zip(hooks, turns, strict=True)}}
        for b in batches
    ]


def everything(path: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint: weights, thresholds, moments, dead counts, windows, generators."""
    last = list(saved_steps(path).values())[-1]
    return {f"{f.name}/{name}": t for f in last.glob("*.safetensors") for name, t in load_file(f).items()}


@both_kinds
@every_way
def test_training_lowers_the_loss_and_resuming_changes_nothing(run: New, batches: New, kind: str, way: str) -> None:
    act_fn, settings = WAYS[way]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    settings = {
        "steps": STEPS, "tokens": 16 * accumulation, "n_checkpoints": 2, "log_frequency": 1,
        "feature_sampling_window": 5, **settings,
    }  # fmt: skip
    stream = sited(batches(STEPS * accumulation, masked=True, contexts=4), kind)
    whole = run(new(kind, act_fn), stream, name="whole", **settings)
    mse = whole.log.series("losses/mse_loss")
    assert sum(mse[s] for s in (18, 19, 20)) < 0.8 * sum(mse[s] for s in (1, 2, 3))
    last = whole.log.rows[STEPS]
    if "auxk_coefficient" in settings:
        assert last["sparsity/dead"] > 0 and last["losses/aux_loss"] > 0
    if act_fn == "jumprelu":
        assert last["losses/sparsity_loss"] > 0 and last["losses/lp_loss"] > 0
    if act_fn.startswith("batch"):
        threshold = everything(whole.path)["sae_weights.safetensors/activation_function.batch_topk_threshold"]
        assert (threshold > 0).all()

    first = run(new(kind, act_fn), stream[: 7 * accumulation], name="parts", **settings)
    assert first.ended_early and first.trainer.cur_step == 7
    torch.manual_seed(12345)  # whatever the new process has drawn before
    sae = AbstractSparseAutoEncoder.from_pretrained(first.path, fold_activation_scale=False)
    second = run(sae, stream[7 * accumulation :], name="parts", trainer=Trainer.from_checkpoint(sae, first.path))
    one, two = everything(whole.path), everything(second.path)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    pace = "details/tokens_per_second"
    both = first.log.rows | second.log.rows
    assert {s: {n: v for n, v in r.items() if n != pace} for s, r in both.items()} == {
        s: {n: v for n, v in r.items() if n != pace} for s, r in whole.log.rows.items()
    }
    used = AbstractSparseAutoEncoder.from_pretrained(second.path)
    with torch.no_grad():
        want = whole.sae.eval().reconstruct(stream[0])
        torch.testing.assert_close(used.reconstruct(stream[0]), want, rtol=1e-4, atol=1e-5)


@both_kinds
def test_k_may_start_at_all_latents_of_sites_that_compete(run: New, batches: New, kind: str) -> None:
    """32 latents of each of three sites; k falls from 96 to 4."""
    stream = sited(batches(3), kind)
    log = run(new(kind, "layertopk"), stream, steps=3, initial_k=96, k_warmup_steps=2).log
    assert list(log.series("sparsity/k").values()) == [96, 50, 4]
    with pytest.raises(ConfigError, match="initial_k=97: must lie between top_k=4 and the 96 latents available"):
        run(new(kind, "layertopk"), stream, steps=3, initial_k=97, name="more")
    with pytest.raises(ConfigError, match="initial_k=33: must lie between top_k=4 and the 32 latents available"):
        run(new(kind, "topk"), stream, steps=3, initial_k=33, name="other")
