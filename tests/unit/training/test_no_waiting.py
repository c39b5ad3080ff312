"""A training step for which the host never waits for the device: proven by watching every operator, and equal numbers.

Without a GPU, CPU tensors stand in for a GPU's: `waits_cost` is answered with yes, and operators that would wait there
are errors. With one, CUDA itself raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lm_saes import (
    CLTConfig,
    CrossCoderConfig,
    Initializer,
    InitializerConfig,
    LorsaConfig,
    SAEConfig,
    Trainer,
    machine,
)
from lm_saes.axes.axis import Axis
from lm_saes.data.batch import Batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import TrainingError
from lm_saes.latents.codes import DenseCode, SparseCode
from lm_saes.losses.dead_latents import list_dead, strongest
from lm_saes.training.checkpoint import saved_steps
from lm_saes.training.dead_latents import DeadLatents

New = Callable[..., Any]
HOOK, D, LATENTS, STEPS, EVERY = "blocks.0.hook_resid_post", 8, 128, 20, 5
INS, OUTS, HOOKS = ["in0", "in1", "in2"], ["out0", "out1", "out2"], ["a", "b", "c"]
ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
AUXK = {"auxk_coefficient": 0.1, "k_aux": 4, "dead_threshold": 20}

# --- runs ------------------------------------------------------------------------------------------------------------


def new(kind: str, act_fn: str, **settings: Any) -> AbstractSparseAutoEncoder:
    """A small dictionary in float64 on the device."""
    shape: dict[str, Any] = {"d_model": D, "expansion_factor": LATENTS / D, "act_fn": act_fn, "device": DEVICE}
    shape |= {"dtype": torch.float64, **({"top_k": 4} if "topk" in act_fn else {}), **settings}
    hooks = {"hook_point_in": HOOK, "hook_point_out": HOOK}
    attention: dict[str, Any] = {"hook_point_out": "out", "n_qk_heads": 4, "d_qk_head": 4, "n_ctx": 4, "rotary_dim": 4}
    cfg = {
        "sae": lambda: SAEConfig(**hooks, **shape),
        "clt": lambda: CLTConfig(hook_points_in=INS, hook_points_out=OUTS, **shape),
        "crosscoder": lambda: CrossCoderConfig(hook_points=HOOKS, **shape),
        "lorsa": lambda: LorsaConfig(**hooks | attention, **shape),
    }[kind]()
    torch.manual_seed(0)
    bound: dict[str, Any] = {"decoder_uniform_bound": 0.3} if kind in ("sae", "crosscoder") else {}
    start = InitializerConfig(init_log_jumprelu_threshold_value=-1.0 if act_fn == "jumprelu" else None, **bound)
    norms = dict.fromkeys(cfg.associated_hook_points, 4.0)
    dictionary = Initializer(start).initialize_sae_from_config(cfg, activation_norm=norms)
    with torch.no_grad():
        for p in dictionary.parameters():  # a crosscoder's heads start equal, and the best of equals may be any
            p += 0.01 * torch.randn(p.shape, dtype=torch.float64).to(DEVICE)
    return dictionary


def given(batches: New, kind: str, n: int, masked: bool) -> list[Batch]:
    """Batches on the device, for every hook point of a kind."""
    plain = batches(n, masked=masked, contexts=4)
    hooks = {"clt": INS + OUTS, "crosscoder": HOOKS, "lorsa": [HOOK, "out"]}.get(kind, [HOOK])
    turns = [torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(i))).Q for i in range(9)]
    found: list[Batch] = []
    for batch in plain:
        x = batch.pop(HOOK)
        found.append({**batch, **{hook: (x @ turn).double() for hook, turn in zip(hooks, turns, strict=False)}})
    return [{name: t.to(DEVICE) for name, t in batch.items()} for batch in found]


def settings_of(way: dict[str, Any]) -> dict[str, Any]:
    return {
        "steps": STEPS, "tokens": 16 * way.get("gradient_accumulation_steps", 1), "log_frequency": EVERY,
        "n_checkpoints": 1, "feature_sampling_window": 7, "clip_grad_norm": 1.0, **way,
    }  # fmt: skip


WAYS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "topk": ("sae", "topk", False, AUXK),
    "topk, masked": ("sae", "topk", True, AUXK),
    "batchtopk": ("sae", "batchtopk", False, AUXK),
    "batchtopk, masked, micro-batches": ("sae", "batchtopk", True, {**AUXK, "gradient_accumulation_steps": 2}),
    "batchtopk, dense, masked": ("sae", "batchtopk", True, {"initial_k": 40, "k_warmup_steps": 0.9}),
    "relu": ("sae", "relu", True, {**AUXK, "sparsity_loss_type": "power", "l1_coefficient": 0.01}),
    "jumprelu": (
        "sae", "jumprelu", False,
        {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.01, "lp_coefficient": 0.01,
         "gradient_accumulation_steps": 2},
    ),
    "crosscoder, topk": ("crosscoder", "topk", True, AUXK),
    "crosscoder, layertopk": ("crosscoder", "layertopk", True, AUXK),
    "crosscoder, batchtopk": ("crosscoder", "batchtopk", True, {}),
    "crosscoder, batchlayertopk": ("crosscoder", "batchlayertopk", True, AUXK),
    "clt, topk": ("clt", "topk", True, AUXK),
    "clt, batchtopk": ("clt", "batchtopk", True, AUXK),
    "lorsa, topk": ("lorsa", "topk", True, AUXK),
    "lorsa, batchtopk": ("lorsa", "batchtopk", True, {}),
}  # fmt: skip
WAITING_STILL = {
    "clt, layertopk": ("clt", "layertopk", False, {}),
    "clt, batchlayertopk": ("clt", "batchlayertopk", True, AUXK),
}
"""Codes whose layers differ in size, which the decoders of a cross-layer transcoder have to know."""
every_way = pytest.mark.parametrize("way", WAYS)

# --- watching --------------------------------------------------------------------------------------------------------

ALWAYS_WAITS = frozenset({
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "bincount", "equal", "is_nonzero", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "lift_fresh",
})  # fmt: skip
"""`lift_fresh` is a tensor made of Python numbers: on a GPU a copy that waits."""


class WaitsAreErrors(TorchDispatchMode):
    """Raises at operators for which a host would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for given in args[1:2]
            if isinstance(given, list | tuple)
            for i in given
        )
        unknown_size = str(func) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if name in ALWAYS_WAITS or by_mask or unknown_size:
            raise RuntimeError(f"waits for the device: {func}")
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Between these lines whatever waits for the device is an error."""
    if ON_CUDA:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def refuse(self: Tensor, *_: Any, **__: Any) -> Any:
        raise RuntimeError("waits for the device: a tensor is read")

    with pytest.MonkeyPatch.context() as patch, WaitsAreErrors():
        for name in ("tolist", "numpy", "cpu"):  # read without an operator
            patch.setattr(Tensor, name, refuse)
        yield


def watched(
    batches: Iterable[Batch], stack: ExitStack, watch: Callable[[], AbstractContextManager[Any]], first: int, last: int
) -> Iterator[Batch]:
    """The batches; from step `first` on, to the end of step `last`, under watch."""
    for step, batch in enumerate(batches, 1):
        if step == first:
            stack.enter_context(watch())
        if step == last + 1:
            stack.close()
        yield batch


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows at a time or fewer, so that a batch is several blocks."""
    for name in ("PRODUCT_BLOCK_BYTES", "DEVICE_BLOCK_BYTES"):
        monkeypatch.setattr(machine, name, 4 * LATENTS * 6)


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it to have waiting cost time from then on, or, with False, nothing."""
    return lambda answer=True: monkeypatch.setattr(machine, "waits_cost", lambda device: answer)


def test_waiting_costs_time_on_a_gpu_alone() -> None:
    assert [machine.waits_cost(device) for device in ("cpu", torch.device("cpu"), "cuda", "cuda:1")] == [0, 0, 1, 1]


@every_way
def test_nothing_waits_between_reports(
    run: New, batches: New, costly: Callable[..., None], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, act_fn, masked, settings = WAYS[way]
    settings = settings_of({**settings, "log_frequency": 8, "amp_dtype": None})
    micro = settings.get("gradient_accumulation_steps", 1)
    small_blocks(monkeypatch)
    costly()
    with ExitStack() as stack:
        stream = watched(given(batches, kind, STEPS * micro, masked), stack, no_waiting, 8 * micro + 1, 15 * micro)
        fitted = run(new(kind, act_fn), stream, **settings)
    assert fitted.trainer.cur_step == STEPS and math.isfinite(fitted.log.rows[16]["losses/overall_loss"])


SINS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "mask as an index": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
    "number of Python's": lambda x: x.new_tensor(3.0),
    "tolist": lambda x: x.flatten().tolist(),
    "copy": lambda x: x.cpu(),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("sin", SINS)
def test_the_watch_sees_one_wait_in_a_step(run: New, batches: New, costly: Callable[..., None], sin: str) -> None:
    sae, seen = new("sae", "topk"), []
    record = sae.record

    def waits(batch: Any) -> Any:
        seen.append(len(seen) + 1)
        if len(seen) == 3:
            SINS[sin](batch[HOOK])
        return record(batch)

    sae.record = waits  # type: ignore[method-assign]
    costly()
    with ExitStack() as stack, pytest.raises(RuntimeError, match=r"waits for the device|synchroniz"):
        run(sae, watched(given(batches, "sae", 8, False), stack, no_waiting, 2, 5), **settings_of({"steps": 8}))
    assert len(seen) == 3


def test_the_watch_sees_a_wait_in_the_backward_pass(run: New, batches: New, costly: Callable[..., None]) -> None:
    sae = new("sae", "topk")
    dict(sae.named_parameters())["W_D"].register_hook(lambda g: g.sum().item() and None)
    costly()
    with ExitStack() as stack, pytest.raises(RuntimeError, match=r"waits for the device|synchroniz"):
        run(sae, watched(given(batches, "sae", 8, False), stack, no_waiting, 2, 5), **settings_of({"steps": 8}))


# --- the same numbers ------------------------------------------------------------------------------------------------


def both(
    run: New, batches: New, costly: Callable[..., None], make: Callable[[], AbstractSparseAutoEncoder], kind: str,
    masked: bool, spoil: Callable[[list[Batch]], None] = lambda _: None, **settings: Any,
) -> list[Any]:  # fmt: skip
    """The same run twice: with values read as they come, and as on a device that one had better not wait for."""
    runs = []
    for name, cost in (("reads", False), ("waits for nothing", True)):
        costly(cost)
        stream = given(batches, kind, STEPS * settings.get("gradient_accumulation_steps", 1), masked)
        spoil(stream)
        runs.append(run(make(), stream, name=name, **settings))
    return runs


def assert_same(one: Any, two: Any) -> None:
    """Weights, moments, dead counts, thresholds, windows, reports."""
    for (name, a), b in zip(one.sae.named_parameters(), two.sae.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for a, b in zip(one.sae.buffers(), two.sae.buffers(), strict=True):
        torch.testing.assert_close(b, a)
    first, second = one.trainer, two.trainer
    assert torch.equal(first.tokens_since_last_activation, second.tokens_since_last_activation)
    assert (first.cur_tokens, first.skipped_steps) == (second.cur_tokens, second.skipped_steps)
    for p, q in zip(one.sae.parameters(), two.sae.parameters(), strict=True):
        for name, a in first.optimizer.state[p].items():
            torch.testing.assert_close(second.optimizer.state[q][name], a, rtol=1e-9, atol=1e-12)
    pace = "details/tokens_per_second"
    assert one.log.rows.keys() == two.log.rows.keys()
    for step, row in one.log.rows.items():
        other = two.log.rows[step]
        assert {n: v for n, v in other.items() if n != pace} == pytest.approx(
            {n: v for n, v in row.items() if n != pace}, rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("several", [False, True], ids=["one block", "several blocks"])
@pytest.mark.parametrize("way", [*WAYS, *WAITING_STILL])
def test_numbers_are_those_of_a_run_that_waits(
    run: New, batches: New, costly: Callable[..., None], way: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, act_fn, masked, settings = (WAYS | WAITING_STILL)[way]
    monkeypatch.setattr(machine, "SPARE_DEAD_LATENTS", LATENTS)  # most latents die at once here
    if several:
        small_blocks(monkeypatch)
    one, two = both(run, batches, costly, lambda: new(kind, act_fn), kind, masked, **settings_of(settings))
    assert_same(one, two)
    if "auxk_coefficient" in settings:
        assert one.log.rows[STEPS]["losses/aux_loss"] > 0 and one.log.rows[STEPS]["sparsity/dead"] > 0


def test_a_sparse_jumprelu_run_goes_from_dense_to_sparse_at_a_report(
    run: New, batches: New, costly: Callable[..., None]
) -> None:
    """Thresholds so high that few latents are active; the first reports' steps are dense."""

    def make() -> AbstractSparseAutoEncoder:
        sae = new("sae", "jumprelu", jumprelu_threshold_window=0.05)
        sae.init_thresholds(0.6)
        return sae

    one, two = both(run, batches, costly, make, "sae", True, **settings_of({"sparsity_loss_type": "tanh"}))
    assert_same(one, two)
    assert one.log.rows[STEPS]["metrics/l0"] > 0
    assert isinstance(two.sae.train().record(given(batches, "sae", 1, True)[0]).code, SparseCode)
    assert isinstance(make().train().record(given(batches, "sae", 1, True)[0]).code, DenseCode)


# --- steps that are not finite ---------------------------------------------------------------------------------------


def poison(*steps: int) -> Callable[[list[Batch]], None]:
    """Activations of some steps that are finite, but whose squared error is not."""

    def spoil(stream: list[Batch]) -> None:
        for step in steps:
            stream[step - 1][HOOK] = stream[step - 1][HOOK] * 1e200

    return spoil


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("steps", [(1,), (3, 5, 12), (6, 7, 8, 9, 10), (20,)], ids=str)
def test_a_step_that_is_not_finite_leaves_no_trace(
    run: New, batches: New, costly: Callable[..., None], act_fn: str, steps: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Windows without a single step (6 to 10) are left out of reports."""
    monkeypatch.setattr(machine, "SPARE_DEAD_LATENTS", LATENTS)
    settings = settings_of({**AUXK, "on_non_finite": "skip"})
    one, two = both(run, batches, costly, lambda: new("sae", act_fn), "sae", True, poison(*steps), **settings)
    assert two.trainer.skipped_steps == len(steps)
    assert all(math.isfinite(value) for row in two.log.rows.values() for value in row.values())
    assert_same(one, two)


@pytest.mark.parametrize("of", ["weights", "thresholds"])
def test_a_gradient_that_is_not_finite_spoils_no_weight(
    run: New, batches: New, costly: Callable[..., None], of: str
) -> None:
    sae = new("sae", "jumprelu")
    before = [p.detach().clone() for p in sae.parameters()]
    parameters = dict(sae.named_parameters())
    spoilt = parameters["W_D" if of == "weights" else "activation_function.log_jumprelu_threshold"]
    spoilt.register_hook(lambda g: g * math.nan)
    costly()
    fitted = run(sae, given(batches, "sae", 3, False), **settings_of({"steps": 3, "on_non_finite": "skip"}))
    assert fitted.trainer.skipped_steps == 3 == fitted.log.rows[3]["details/skipped_steps"]
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))


@pytest.mark.parametrize(("steps", "said"), [((3,), "^step 3: "), ((2, 4), "^steps 2, 4: ")])
def test_the_next_report_ends_the_run_and_names_the_steps(
    run: New, batches: New, costly: Callable[..., None], steps: tuple[int, ...], said: str
) -> None:
    stream = given(batches, "sae", STEPS, False)
    poison(*steps)(stream)
    costly()
    with pytest.raises(TrainingError, match=said + r"loss, l_rec.* gradient.*read after step 5;.*on_non_finite='skip'"):
        run(new("sae", "topk"), stream, **settings_of({}))


def test_nothing_is_saved_before_faults_are_read(
    run: New, batches: New, costly: Callable[..., None], tmp_path: Path
) -> None:
    stream = given(batches, "sae", 9, False)
    poison(4)(stream)
    costly()
    with pytest.raises(TrainingError, match=r"^step 4: "):
        run(new("sae", "topk"), stream[:7], **settings_of({"log_frequency": 100}))
    assert not saved_steps(tmp_path / "run") and not (tmp_path / "run" / "sae_weights.safetensors").exists()


@pytest.mark.parametrize("where", ["activations", "mask"])
def test_values_of_batches_on_the_device_are_judged_with_the_step(
    run: New, batches: New, costly: Callable[..., None], where: str
) -> None:
    """A NaN in a masked token, or a mask of nothing: what `check_batch` refuses where it may look."""
    stream = given(batches, "sae", 5, True)
    if where == "mask":
        stream[2]["mask"] = torch.zeros_like(stream[2]["mask"])
    else:
        stream[2][HOOK][0, 1] = math.nan
    costly()
    fitted = run(new("sae", "topk"), stream, **settings_of({"steps": 5, "on_non_finite": "skip"}))
    assert fitted.trainer.skipped_steps == 1
    assert all(bool(p.isfinite().all()) for p in fitted.sae.parameters())


def test_optimizers_that_cannot_leave_out_a_step_are_told_at_once(
    run: New, batches: New, costly: Callable[..., None]
) -> None:
    stream = given(batches, "sae", STEPS, False)
    poison(3)(stream)
    costly()
    for settings in ({"optimizer_foreach": False}, {"optimizer_class": "sparseadam"}):
        with pytest.raises(TrainingError, match=r"^step 3: .* has mean"):
            run(new("sae", "topk"), stream, name=str(settings), **settings_of({**settings, "log_frequency": 100}))


# --- dead latents ----------------------------------------------------------------------------------------------------


def test_the_list_of_dead_latents_by_hand() -> None:
    is_dead = torch.tensor([[False, True, True, False], [False, False, False, True]])
    (first, second) = list_dead(is_dead, [3, 2])
    assert first.latents.tolist() == [1, 2, 0] and first.real is not None and first.real.tolist() == [True, True, False]
    assert second.latents.tolist() == [3, 0] and second.exact.tolist() == [3]
    assert list_dead(is_dead[0], [1])[0].latents.tolist() == [1]  # no room for the other
    assert [some.latents.tolist() for some in list_dead(is_dead)] == [[1, 2], [3]]
    scale_F = torch.tensor([5.0, 6.0, 7.0, 8.0])
    scale_X = first.scale(scale_F)
    assert scale_X is not None and scale_X.tolist() == [6.0, 7.0, 0.0] and first.scale(None) is first.real


def test_room_is_made_at_reports(costly: Callable[..., None]) -> None:
    costly()
    dead = DeadLatents((1000,), threshold=10)
    assert dead.room == [64]
    dead.update(torch.arange(1000) >= 400, 10)
    assert dead.room == [64]
    dead.make_room()
    assert dead.room == [500]
    dead.update(torch.zeros(1000, dtype=torch.bool), 10)
    dead.make_room()
    assert dead.room == [1000]


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_the_strongest_are_the_same_without_counting(costly: Callable[..., None], k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    h_ND, norm_D = torch.randn(9, 12, generator=draw), torch.rand(12, generator=draw)
    norm_D[3] = 0
    want = strongest(h_ND, norm_D, k, Axis())
    costly()
    assert torch.equal(strongest(h_ND, norm_D, k, Axis()), want)


def test_a_resumed_run_goes_on_the_same(run: New, batches: New, costly: Callable[..., None]) -> None:
    costly()
    stream = given(batches, "sae", STEPS, True)
    settings = settings_of(AUXK)
    whole = run(new("sae", "batchtopk"), stream, name="whole", **settings)
    first = run(new("sae", "batchtopk"), stream[:7], name="parts", **settings)
    sae = AbstractSparseAutoEncoder.from_pretrained(first.path, fold_activation_scale=False)
    trainer = Trainer.from_checkpoint(sae, first.path)
    second = run(sae, stream[7:], name="parts", trainer=trainer)
    second.log.rows = first.log.rows | second.log.rows
    assert_same(whole, second)
