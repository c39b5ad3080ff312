"""Sparse Adam with gradients of touched latents alone is sparse Adam with whole gradients, and forms none of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lm_saes import (
    CLTConfig,
    CrossCoderConfig,
    Initializer,
    InitializerConfig,
    SAEConfig,
    Trainer,
    TrainerConfig,
    machine,
)
from lm_saes.axes.axis import Axis
from lm_saes.data.batch import Batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.lorsa import LorsaConfig
from lm_saes.dictionaries.molt import MOLTConfig
from lm_saes.latents.gradients.rows import RowGradients, carry_row_gradients, chosen_rows, collecting
from lm_saes.losses.settings import LossSettings
from lm_saes.training import optim
from lm_saes.training.checkpoint import saved_steps
from lm_saes.training.dead_latents import DeadLatents
from lm_saes.training.micro_batches import backward, valid_tokens

New = Callable[..., Any]
HOOK, D, F = "blocks.0.hook_resid_post", 8, 96
SITES = ("a", "b", "c")
QUIET = LossSettings(None, 0.0, 0.0, 0.0, 4)
AUXK = {"auxk_coefficient": 0.1, "k_aux": 4, "dead_threshold": 20}
NARROW = {"jumprelu_threshold_window": 0.2}
PENALTIES = {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.1, "l1_coefficient_warmup_steps": 0}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "topk": ("sae", "topk", {}, {}),
    "topk, clipped": ("sae", "topk", {}, {"clip_grad_norm": 0.2}),
    "topk, auxk": ("sae", "topk", {}, AUXK),
    "topk, auxk, micro-batches, clipped": (
        "sae", "topk", {}, {**AUXK, "gradient_accumulation_steps": 3, "clip_grad_norm": 0.2},
    ),
    "topk, not gated": ("sae", "topk", {"sparsity_include_decoder_norm": False}, {}),
    "topk, glu": ("sae", "topk", {"use_glu_encoder": True}, {"gradient_accumulation_steps": 2}),
    "batchtopk": ("sae", "batchtopk", {}, {"clip_grad_norm": 0.2, "gradient_accumulation_steps": 2}),
    "relu, l1": ("sae", "relu", {}, {**PENALTIES, "sparsity_loss_type": "power"}),
    "jumprelu": ("sae", "jumprelu", {}, {**PENALTIES, "gradient_accumulation_steps": 2}),
    "jumprelu, lp": (
        "sae", "jumprelu", NARROW, {**PENALTIES, "lp_coefficient": 0.1, "clip_grad_norm": 0.2},
    ),
    "crosscoder": ("crosscoder", "topk", {}, {**AUXK, "clip_grad_norm": 0.2}),
    "crosscoder, jumprelu": ("crosscoder", "jumprelu", {}, {**PENALTIES, "gradient_accumulation_steps": 2}),
    "clt": ("clt", "topk", {}, {**AUXK, "clip_grad_norm": 0.2, "gradient_accumulation_steps": 2}),
    "clt, jumprelu": ("clt", "jumprelu", {}, {**PENALTIES, "lp_coefficient": 0.1}),
    "molt": ("molt", "topk", {}, {"clip_grad_norm": 0.2}),
    "lorsa": ("lorsa", "topk", {}, {"gradient_accumulation_steps": 2}),
}  # fmt: skip


def new(kind: str, act_fn: str, seed: int = 0, **settings: Any) -> AbstractSparseAutoEncoder:
    shape: dict[str, Any] = {"d_model": D, "expansion_factor": F / D, "act_fn": act_fn, "dtype": torch.float64}
    shape |= ({"top_k": 2} if "topk" in act_fn else {}) | settings
    one = {"hook_point_in": "a", "hook_point_out": "b", **shape}
    heads = {"n_qk_heads": 4, "d_qk_head": 4, "rotary_dim": 4, "n_ctx": 8}
    makers: dict[str, Callable[[], Any]] = {
        "sae": lambda: SAEConfig(**one),
        "crosscoder": lambda: CrossCoderConfig(hook_points=list(SITES), **shape),
        "clt": lambda: CLTConfig(hook_points_in=list(SITES), hook_points_out=list("xyz"), **shape),
        "molt": lambda: MOLTConfig(rank_counts={1: 64, 2: 32}, **{**one, "expansion_factor": 12}),
        "lorsa": lambda: LorsaConfig(**heads, **one),
    }
    cfg = makers[kind]()
    torch.manual_seed(seed)
    bound: dict[str, Any] = {"decoder_uniform_bound": 0.3} if kind in ("sae", "crosscoder") else {}
    start = InitializerConfig(init_log_jumprelu_threshold_value=-0.5 if act_fn == "jumprelu" else None, **bound)
    return Initializer(start).initialize_sae_from_config(
        cfg, activation_norm=dict.fromkeys(cfg.associated_hook_points, 4.0)
    )


def sited(batches: list[Any]) -> list[Any]:
    """Every hook point reads the same directions through a rotation of its own."""
    draw = torch.Generator().manual_seed(5)
    turns = {hook: torch.linalg.qr(torch.randn(D, D, generator=draw)).Q for hook in (*SITES, *"xyz")}
    return [{**b, **{hook: b[HOOK] @ turn for hook, turn in turns.items()}} for b in batches]


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the sparse path, however many latents are active."""
    monkeypatch.setattr(machine, "SPARSE_BELOW", 1.0)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many rows, out of how many, backward passes have handed over."""
    seen: list[tuple[int, int]] = []
    add = RowGradients.add

    def spy(self: RowGradients, n_rows: int, ids_U: Tensor, values_UD: Tensor) -> None:
        seen.append((len(ids_U), n_rows))
        add(self, n_rows, ids_U, values_UD)

    monkeypatch.setattr(RowGradients, "add", spy)
    return seen


def without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "carry_row_gradients", lambda parameters, suffice: None)


def state_of(fitted: Any) -> dict[str, Tensor]:
    """Weights, moments and steps."""
    groups = fitted.trainer.optimizer.param_groups
    moments = {f"{g['name']}.{k}": t for g in groups for k, t in fitted.trainer.optimizer.state[g["params"][0]].items()}
    return {**{name: p.detach() for name, p in fitted.sae.named_parameters()}, **moments}


# -- the same as whole gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_whole_gradients(
    run: New, batches: New, sparse: None, added: list[Any], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, act_fn, shape, settings = CASES[case]
    n = settings.get("gradient_accumulation_steps", 1)
    stream = sited(batches(5 * n, masked=True, contexts=4))
    settings = {"steps": 5, "tokens": 16 * n, "optimizer_class": "sparseadam", **settings}
    rows = run(new(kind, act_fn, **shape), stream, name="rows", **settings)
    n_added = len(added)
    assert n_added >= 5 * n
    assert any(some < of_all for some, of_all in added)
    without_rows(monkeypatch)
    whole = run(new(kind, act_fn, **shape), stream, name="whole", **settings)
    assert len(added) == n_added
    got, want = state_of(rows), state_of(whole)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for step, row in whole.log.rows.items():
        pace = {"details/tokens_per_second": rows.log.rows[step]["details/tokens_per_second"]}
        assert rows.log.rows[step] == pytest.approx(row | pace, rel=1e-6)


@pytest.mark.parametrize("kind", ["sae", "crosscoder", "clt", "molt", "lorsa"])
def test_adam_takes_the_rows_of_latents_that_auxk_revives(
    run: New, batches: New, added: list[Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stream = sited(batches(10, masked=True, contexts=4))
    settings = {"steps": 5, "tokens": 32, "gradient_accumulation_steps": 2, "clip_grad_norm": 0.2, **AUXK}
    rows = run(new(kind, "topk"), stream, name="rows", **settings)
    n_added = len(added)
    n_matrices = {"sae": 2, "crosscoder": 2, "clt": 6, "molt": 1, "lorsa": 1}[kind]  # a CLT's layers take turns
    assert n_added and n_added % n_matrices == 0 and all(some < of_all for some, of_all in added)
    without_rows(monkeypatch)
    whole = run(new(kind, "topk"), stream, name="whole", **settings)
    assert len(added) == n_added and any(row["losses/aux_loss"] > 0 for row in whole.log.rows.values())
    for name, tensor in state_of(whole).items():
        torch.testing.assert_close(state_of(rows)[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_parameter_that_only_revived_latents_reach_gets_a_gradient() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 2))
    carry_row_gradients([p], False)
    with collecting([p]):
        chosen_rows(p, p, torch.tensor([1, 3])).backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        assert p.grad is None
    assert p.grad is not None and p.grad.tolist() == [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]


def test_in_mixed_precision_too(run: New, batches: New, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 5, "optimizer_class": "sparseadam", "amp_dtype": torch.bfloat16}
    rows = run(new("sae", "topk", dtype=torch.float32), sited(batches(5)), name="rows", **settings)
    without_rows(monkeypatch)
    whole = run(new("sae", "topk", dtype=torch.float32), sited(batches(5)), name="whole", **settings)
    for name, tensor in state_of(whole).items():
        torch.testing.assert_close(state_of(rows)[name], tensor)


def test_a_step_that_is_not_finite_leaves_no_rows(run: New, batches: New, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sited(batches(4))
    stream[1]["b"] = stream[1]["b"].double() * 1e200
    settings = {"steps": 4, "optimizer_class": "sparseadam", "on_non_finite": "skip"}
    rows = run(new("sae", "topk"), stream, name="rows", **settings)
    without_rows(monkeypatch)
    whole = run(new("sae", "topk"), stream, name="whole", **settings)
    assert rows.trainer.skipped_steps == whole.trainer.skipped_steps == 1
    for name, tensor in state_of(whole).items():
        torch.testing.assert_close(state_of(rows)[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_parameter_whose_rows_are_all_zero_is_skipped(run: New, batches: New, added: list[Any]) -> None:
    sae = new("sae", "topk")
    with torch.no_grad():
        sae.get_parameter("b_E").fill_(-100.0)  # k entries are kept, each with value 0
    before = sae.get_parameter("W_D").detach().clone()
    fitted = run(sae, sited(batches(3)), steps=3, optimizer_class="sparseadam")
    assert added
    assert torch.equal(sae.get_parameter("W_D").detach(), before)
    assert [name for name in state_of(fitted) if "." in name] == ["b_D.step", "b_D.exp_avg", "b_D.exp_avg_sq"]


def test_resuming_changes_nothing(run: New, batches: New, sparse: None, added: list[Any]) -> None:
    stream = sited(batches(12, masked=True))
    settings = {
        "steps": 6, "tokens": 32, "optimizer_class": "sparseadam", "gradient_accumulation_steps": 2,
        "clip_grad_norm": 0.2, "n_checkpoints": 2, **AUXK,
    }  # fmt: skip
    whole = run(new("crosscoder", "topk"), stream, name="whole", **settings)
    first = run(new("crosscoder", "topk"), stream[:6], name="parts", **settings)
    sae = AbstractSparseAutoEncoder.from_pretrained(first.path, fold_activation_scale=False)
    second = run(sae, stream[6:], name="parts", trainer=Trainer.from_checkpoint(sae, first.path))
    assert added and second.trainer.cur_step == 6
    one, two = last_checkpoint(whole.path), last_checkpoint(second.path)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def last_checkpoint(path: Path) -> dict[str, Tensor]:
    files = list(saved_steps(path).values())[-1].glob("*.safetensors")
    return {f"{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


# -- no whole gradient ---------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that was made, other than `known` ones written to or looked at in another way."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["sae", "crosscoder", "clt"])
@pytest.mark.parametrize("rows", [True, False])
def test_a_sparse_step_makes_nothing_of_a_whole_gradients_size(batches: New, kind: str, rows: bool) -> None:
    sae = new(kind, "topk", expansion_factor=128.0)  # 1024 latents of a site, at most 4 of them active
    cfg = TrainerConfig(optimizer_class="sparseadam", clip_grad_norm=0.1)
    optimizer = optim.build_optimizer(cfg, sae)
    if not rows:
        carry_row_gradients(sae.parameters(), False)
    weights = [p for p in sae.parameters() if p.ndim > 1 and p.shape[-1] in (1024, D) and p.numel() >= 1024 * D]
    assert len(weights) == {"sae": 2, "crosscoder": 2, "clt": 4}[kind]
    smallest, sizes = min(p.nbytes for p in weights), list[int]()
    for batch in sited(batches(2, tokens=2)):  # moments are made in the first step
        state = [t for of_one in optimizer.state.values() for t in of_one.values()]
        with Largest([*sae.parameters(), *state]) as largest:
            backpropagate(sae, [batch])
            norm = optim.gradient_norm(sae)
            optim.clip_gradients(sae, norm, 0.1)
            optimizer.step()
        sizes.append(largest.bytes)
        assert norm > 0.1
        assert [p.grad is None for p in weights] == [rows] * len(weights)
        if rows:
            assert all(0 < len(carried(p).ids_U) <= 12 for p in weights)
        optimizer.zero_grad()
        assert optim.gradient_norm(sae) == 0
    assert (sizes[-1] < smallest) == rows


def backpropagate(sae: AbstractSparseAutoEncoder, batches: list[Batch]) -> None:
    backward(sae, batches, valid_tokens(batches, Axis()), QUIET, DeadLatents(sae.dead_shape, 1e9), None)


def carried(p: Tensor) -> RowGradients:
    rows = RowGradients.of(p)
    assert rows is not None
    return rows


# -- when parameters take rows -------------------------------------------------------------------------------------


def loss_of(sae: AbstractSparseAutoEncoder, batch: dict[str, Any]) -> Tensor:
    loss = sae.compute_loss(sae.normalize_activations(batch), return_aux_data=False)
    assert isinstance(loss, Tensor)
    return loss


def test_outside_of_a_training_step_gradients_are_whole(run: New, batches: New) -> None:
    sae, (batch, *others) = new("sae", "topk"), sited(batches(3))
    run(sae, others, steps=2, optimizer_class="sparseadam")
    loss_of(sae, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in sae.parameters())


def test_another_optimizer_gets_whole_gradients(batches: New) -> None:
    sae = new("sae", "topk")
    optim.build_optimizer(TrainerConfig(optimizer_class="sparseadam"), sae)
    optim.build_optimizer(TrainerConfig(), sae)
    backpropagate(sae, sited(batches(1)))
    assert all(p.grad is not None for p in sae.parameters())


def test_a_frozen_parameter_takes_none(batches: New) -> None:
    sae = new("sae", "topk")
    sae.get_parameter("W_D").requires_grad_(False)
    carry_row_gradients(sae.parameters(), True)
    backpropagate(sae, sited(batches(1)))
    assert [carried(sae.get_parameter(name)).n_rows for name in ("W_D", "W_E")] == [0, F]


def test_a_parameter_stored_in_another_order_takes_none(batches: New) -> None:
    sae = new("sae", "topk")
    W_E = sae.get_parameter("W_E")
    W_E.data = W_E.data.contiguous()  # not latent-major any more
    carry_row_gradients(sae.parameters(), True)
    backpropagate(sae, sited(batches(1)))
    assert W_E.grad is not None and carried(W_E).n_rows == 0


# -- by hand ---------------------------------------------------------------------------------------------------------


def int32(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def test_rows_add_up() -> None:
    rows = RowGradients(torch.float32)
    rows.add(9, int32(2, 5), torch.tensor([[1.0], [2.0]]))
    rows.add(9, int32(0, 5, 8), torch.tensor([[10.0], [20.0], [30.0]], dtype=torch.float64))
    assert rows.ids_U.tolist() == [0, 2, 5, 8]
    assert rows.values_UD.tolist() == [[10.0], [1.0], [22.0], [30.0]]
    assert (rows.ids_U.dtype, rows.values_UD.dtype) == (torch.int32, torch.float32)


def test_a_whole_gradient_takes_the_rows_in() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 2).T)  # [2, 3], latents last
    carry_row_gradients([p], True)
    with collecting([p]):
        p.grad = torch.ones(2, 3)  # stored in another order than the parameter
        carried(p).add(3, int32(1), torch.tensor([[5.0, 7.0]]))
    assert p.grad.tolist() == [[1.0, 6.0, 1.0], [1.0, 8.0, 1.0]]
    assert RowGradients.instead_of_grad(p) is None
