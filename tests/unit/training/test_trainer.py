"""The trainer from outside: early ends, streams, refusals, dead statistics, loggers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes import Initializer, InitializerConfig, SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.errors import ConfigError, DataError
from lm_saes.metrics import Metric
from lm_saes.training.checkpoint import saved_steps

New = Callable[..., Any]
HOOK = "blocks.0.hook_resid_post"

# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_that_ends_early(run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture) -> None:
    fitted = run(new_sae("topk"), batches(4), n_checkpoints=0)
    assert fitted.ended_early is True
    assert list(saved_steps(fitted.path)) == [4]
    assert (fitted.path / "sae_weights.safetensors").exists()
    assert any(r.levelno == logging.WARNING and "ended at step 4 of 6" in r.getMessage() for r in caplog.records)
    sae = SparseAutoEncoder.from_pretrained(fitted.path, fold_activation_scale=False)
    assert Trainer.from_checkpoint(sae, fitted.path).fit(sae, batches(6)[4:]) is False


def test_a_whole_run(run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture) -> None:
    """Not more batches are taken than are trained on."""
    taken = iter(batches(9))
    fitted = run(new_sae("topk"), taken)
    assert fitted.ended_early is False and fitted.trainer.cur_step == 6
    assert int(next(taken)["tokens"][0]) == 6 * 16
    assert "ended" not in caplog.text
    assert not fitted.sae.training  # ready for use
    saved = SparseAutoEncoder.from_pretrained(fitted.path, fold_activation_scale=False)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), fitted.sae.parameters(), strict=True))


class Stream:
    """An iterator of one's own."""

    def __init__(self, batches: list[Any]) -> None:
        self._left = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._left)


@pytest.mark.parametrize("one_shot", [lambda b: (x for x in b), Stream, iter, lambda b: map(dict, b)])
def test_batches_that_the_initializer_looked_at_are_trained_on(
    run: New, new_sae: New, batches: New, one_shot: Callable[[list[Any]], Any]
) -> None:
    """The initializer measures norms on 8 batches of a one-shot stream, which the trainer then gets from the first."""
    seen: list[int] = []
    stream = one_shot(batches(10))
    torch.manual_seed(0)
    cfg = new_sae("topk").cfg
    sae = Initializer(InitializerConfig()).initialize_sae_from_config(cfg, stream)
    record = sae.record

    def spy(batch: Any) -> Any:
        seen.append(int(batch["tokens"][0]) // 16)
        return record(batch)

    sae.record = spy  # type: ignore[method-assign]
    fitted = run(sae, stream, steps=10)
    assert seen == list(range(10)) and fitted.ended_early is False


WRONG: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda b: {"tokens": b["tokens"]}, f"'{HOOK}' is missing"),
    (lambda b: b | {HOOK: b[HOOK][:, :5]}, rf"'{HOOK}' has shape \[16, 5\]; wanted \[16, 8\]"),
    (lambda b: b | {HOOK: b[HOOK][:9]}, rf"'{HOOK}' has shape \[9, 8\]; wanted \[16, 8\]"),
    (lambda b: b | {HOOK: b[HOOK].index_fill(0, torch.tensor([3]), torch.nan)}, f"'{HOOK}' .* non-finite"),
    (lambda b: b | {HOOK: b[HOOK].index_fill(1, torch.tensor([3]), torch.inf)}, f"'{HOOK}' .* non-finite"),
    (lambda b: b | {"mask": torch.ones(7)}, r"'mask' is shape \[7\]; give it the shape of 'tokens', \[16\]"),
    (lambda b: b | {"mask": torch.zeros(16)}, "masks every token"),
    (lambda b: {name: t[:0] for name, t in b.items()}, "is empty"),
]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(("spoil", "message"), WRONG)
def test_a_wrong_batch_is_refused_whenever_it_comes(
    run: New, new_sae: New, batches: New, spoil: Callable[..., Any], message: str, at: int
) -> None:
    stream = batches(6)
    stream[at] = spoil(stream[at])
    with pytest.raises(DataError, match=message) as caught:
        run(new_sae("topk"), stream)
    assert "\n" not in str(caught.value)


def test_a_mask_of_ones_and_zeros_is_a_mask(run: New, new_sae: New, batches: New) -> None:
    stream = batches(6, masked=True)
    numbers = [batch | {"mask": batch["mask"].to(torch.int64)} for batch in stream]
    a, b = run(new_sae("topk"), stream, name="a"), run(new_sae("topk"), numbers, name="b")
    assert a.trainer.cur_tokens == b.trainer.cur_tokens
    assert all(torch.equal(x, y) for x, y in zip(a.sae.parameters(), b.sae.parameters(), strict=True))


def test_contexts_are_the_same_as_their_tokens(run: New, new_sae: New, batches: New) -> None:
    flat = run(new_sae("topk"), batches(6, masked=True), name="1d")
    deep = run(new_sae("topk"), batches(6, masked=True, contexts=4), name="2d")
    assert all(torch.equal(x, y) for x, y in zip(flat.sae.parameters(), deep.sae.parameters(), strict=True))


def test_masked_tokens_teach_nothing(run: New, new_sae: New, batches: New) -> None:
    stream = batches(6, masked=True)
    other = [b | {HOOK: torch.where(b["mask"][:, None], b[HOOK], torch.tensor(7.0))} for b in stream]
    for act_fn in ("topk", "batchtopk", "jumprelu"):
        a, b = run(new_sae(act_fn), stream, name="a" + act_fn), run(new_sae(act_fn), other, name="b" + act_fn)
        assert all(torch.equal(x, y) for x, y in zip(a.sae.parameters(), b.sae.parameters(), strict=True))
        assert torch.equal(a.trainer.tokens_since_last_activation, b.trainer.tokens_since_last_activation)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_stream_without_batches(run: New, new_sae: New) -> None:
    with pytest.raises(ConfigError, match="activation_stream: yields no batch"):
        run(new_sae("topk"), [])


def test_another_dictionary_in_the_same_trainer(run: New, new_sae: New, batches: New) -> None:
    fitted = run(new_sae("topk"), batches(2))
    with pytest.raises(ConfigError, match="another dictionary; make a new Trainer"):
        fitted.trainer.fit(new_sae("topk"), batches(2))
    assert fitted.trainer.fit(fitted.sae, batches(4)) is False  # with the same one it goes on
    assert fitted.trainer.cur_step == 6


def test_a_fresh_trainer_knows_nothing_yet(new_sae: New) -> None:
    trainer = Trainer(TrainerConfig())
    assert trainer.optimizer is trainer.scheduler is trainer.is_dead is trainer.tokens_since_last_activation is None
    assert (trainer.cur_step, trainer.cur_tokens, trainer.total_training_steps, trainer.metrics) == (0, 0, 0, [])
    with pytest.raises(ConfigError, match="call fit first"):
        trainer.update_dead_statistics(torch.zeros(1, 32), None, ("batch", "sae"))


def test_attributes_of_a_run(run: New, new_sae: New, batches: New) -> None:
    trainer = run(new_sae("topk"), batches(6)).trainer
    assert (trainer.cur_step, trainer.cur_tokens, trainer.total_training_steps) == (6, 96, 6)
    assert isinstance(trainer.optimizer, torch.optim.Optimizer) and trainer.scheduler(0) == 1.0
    assert trainer.tokens_since_last_activation.shape == trainer.is_dead.shape == (32,)
    assert trainer.is_dead.dtype == torch.bool
    assert trainer.metrics and all(isinstance(metric, Metric) for metric in trainer.metrics)


# --- dead latents ----------------------------------------------------------------------------------------------------

ACTS = torch.zeros(4, 3)
ACTS[0, 0] = ACTS[2, 1] = 1.0
MASK = torch.tensor([1, 1, 0, 1])


@pytest.mark.parametrize(
    ("acts", "mask", "specs", "expected"),
    [
        (ACTS, None, ("batch", "sae"), [0, 0, 104]),
        (ACTS, MASK, ("batch", "sae"), [0, 103, 103]),  # latent 1 fired only where it does not count
        (ACTS, MASK.bool(), ("batch", "sae"), [0, 103, 103]),
        (ACTS.view(2, 2, 3), None, ("batch", "context", "sae"), [0, 0, 104]),
        (ACTS.view(2, 2, 3), MASK.view(2, 2), ("batch", "context", "sae"), [0, 103, 103]),
        # a crosscoder's latent lives if any head fires
        (torch.stack([ACTS, ACTS.roll(1, 1)], 1), MASK, ("batch", "heads", "sae"), [0, 0, 103]),
        # each layer of a cross-layer transcoder for itself
        (torch.stack([ACTS, ACTS * 0], 1), MASK, ("batch", "layers", "sae"), [[0, 103, 103], [103, 103, 103]]),
        (
            torch.stack([ACTS, ACTS * 0], 1).view(2, 2, 2, 3),
            MASK.view(2, 2),
            ("batch", "context", "layers", "sae"),
            [[0, 103, 103], [103, 103, 103]],
        ),
    ],
)
def test_update_dead_statistics(
    run: New, new_sae: New, batches: New, acts: torch.Tensor, mask: Any, specs: Any, expected: list[Any]
) -> None:
    trainer = run(new_sae("topk"), batches(1), steps=1, dead_threshold=103).trainer
    trainer.tokens_since_last_activation.resize_(torch.tensor(expected).shape).fill_(100)
    dead = trainer.update_dead_statistics(acts, mask, specs)
    assert trainer.tokens_since_last_activation.tolist() == expected
    assert dead.tolist() == trainer.is_dead.tolist() == (torch.tensor(expected) >= 103).tolist()


def test_dead_latents_are_counted_over_valid_tokens(run: New, new_sae: New, batches: New) -> None:
    sae = new_sae("relu")
    with torch.no_grad():
        sae.b_E[:3] = -100.0
        sae.b_E[3:] = 100.0
    stream = batches(4, masked=True)
    trainer = run(sae, stream, steps=4, lr=0.0).trainer
    valid = sum(int(batch["mask"].sum()) for batch in stream)
    assert trainer.tokens_since_last_activation.tolist() == [valid] * 3 + [0] * 29
    assert trainer.cur_tokens == valid


def test_dead_latents_are_tracked_for_auxk_without_metrics(run: New, new_sae: New, batches: New) -> None:
    sae = new_sae("relu")
    with torch.no_grad():
        sae.b_E[:3] = -100.0
    settings = {"skip_metrics_calculation": True, "dead_threshold": 16, "lr": 0.0}
    assert run(sae, batches(2), steps=2, auxk_coefficient=0.1, **settings).trainer.is_dead[:3].all()


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_loggers_are_told_in_order(run: New, new_sae: New, batches: New) -> None:
    log = run(new_sae("topk"), batches(4), steps=4, log_frequency=3).log
    *before, end = log.calls
    assert before == [("start", 0), ("advance", 1), ("advance", 2), ("advance", 3), ("report", 3), ("advance", 4),
                      ("report", 4)]  # fmt: skip
    assert end == ("close", len(log.summary)) and log.summary.items() >= log.rows[4].items()


def test_an_evaluation_is_part_of_the_report_of_its_step(run: New, new_sae: New, batches: New) -> None:
    log = run(
        new_sae("topk"), batches(4), steps=4, log_frequency=2, eval_frequency=3, eval_fn=lambda sae: {"e/x": 1.0}
    ).log
    assert [step for kind, step in log.calls if kind == "report"] == [2, 3, 4]
    assert log.rows[3] == {"e/x": 1.0} and log.rows[4]["e/x"] == 1.0 and "losses/mse_loss" in log.rows[4]
    assert log.summary["e/x"] == 1.0


@pytest.mark.parametrize("act_fn", ["batchtopk", "jumprelu"])
def test_evaluating_changes_nothing_in_training(run: New, new_sae: New, batches: New, act_fn: str) -> None:
    """These two select differently in evaluation mode, or keep a running threshold."""
    alone = run(new_sae(act_fn), batches(6), name="alone")

    def evaluate(sae: Any) -> dict[str, float]:
        return {"e/x": float(sae.reconstruct(batches(1, seed=5)[0]).detach().sum())}

    watched = run(new_sae(act_fn), batches(6), name="watched", eval_frequency=2, eval_fn=evaluate)
    one, two = alone.sae.state_dict(), watched.sae.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert watched.log.series("losses/mse_loss") == alone.log.series("losses/mse_loss")


class Boom(Exception):
    pass


def boom(*_: Any) -> Any:
    raise Boom


@pytest.mark.parametrize("where", ["stream", "evaluation", "save", "final save"])
def test_loggers_are_closed_without_a_summary_when_a_run_fails(
    run: New, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    logs: list[Any] = []
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, *a, loggers, **k: [logs.append(loggers), fit(self, *a, loggers=loggers, **k)]
    )
    stream, settings, sae = batches(4), {}, new_sae("topk")
    if where == "stream":
        stream = (batch if i < 2 else boom() for i, batch in enumerate(stream))
    elif where == "evaluation":
        settings = {"eval_fn": boom, "eval_frequency": 2}
    elif where == "save":
        settings = {"n_checkpoints": 2, "check_point_save_mode": "linear"}
        monkeypatch.setattr(Trainer, "save_checkpoint", boom)
    else:
        monkeypatch.setattr(sae, "save_pretrained", boom)
    with pytest.raises(Boom):
        run(sae, stream, steps=4, **settings)
    assert logs[0].calls[0] == ("start", 0) and logs[0].calls[-1] == ("close", 0)
    assert [kind for kind, _ in logs[0].calls].count("close") == 1


class WandbRun:
    """What W&B's run offers, as far as it is used."""

    id = "run-7"

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((data, step))


def test_wandb_logger_gets_dicts_with_their_step(new_sae: New, batches: New, tmp_path: Path) -> None:
    cfg = TrainerConfig(
        total_training_tokens=64, log_frequency=2, amp_dtype=None, n_checkpoints=1, exp_result_path=str(tmp_path)
    )
    wandb, trainer = WandbRun(), Trainer(cfg)
    trainer.fit(new_sae("topk"), batches(4), wandb_logger=wandb)
    assert [step for _, step in wandb.logged] == [2, 4]
    assert all(type(data) is dict and "losses/overall_loss" in data for data, _ in wandb.logged)
    assert trainer.wandb_run_id == "run-7"
    sae = new_sae("topk")
    assert Trainer.from_checkpoint(sae, tmp_path).wandb_run_id == "run-7"
