"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes import (
    ActivationFactory,
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryTarget,
    ActivationWriter,
    ActivationWriterConfig,
    BufferShuffleConfig,
    Initializer,
    InitializerConfig,
    SparseAutoEncoder,
    Trainer,
)
from lm_saes.data.peek import Stateful, peekable
from lm_saes.data.stream import ActivationStream
from lm_saes.errors import CheckpointError
from lm_saes.training.checkpoint import saved_steps

New = Callable[..., Any]
HOOK = "blocks.0.hook_resid_post"
STEPS = 12

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk with auxk and k going down": (
        "topk",
        {"auxk_coefficient": 0.1, "k_aux": 4, "dead_threshold": 20, "initial_k": 8, "k_warmup_steps": 7},
    ),
    "batchtopk": ("batchtopk", {"clip_grad_norm": 0.5, "gradient_accumulation_steps": 2}),
    "jumprelu with tanh-quad": (
        "jumprelu",
        {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.1, "lp_coefficient": 0.01, "jumprelu_lr_factor": 2.0},
    ),
    "relu with power": ("relu", {"sparsity_loss_type": "power", "l1_coefficient": 0.1, "p": 0.5}),
    "sparseadam": ("topk", {"optimizer_class": "sparseadam"}),
}
SCHEDULE = {"lr_scheduler_name": "constantwithwarmup", "lr_warm_up_steps": 3, "lr_cool_down_steps": 5}
REPORTS = {"steps": STEPS, "log_frequency": 4, "feature_sampling_window": 5}


class Killed(Exception):
    pass


def killed(stream: list[Any], after: int) -> Iterator[Any]:
    yield from stream[:after]
    raise Killed


def everything(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: weights, thresholds, moments, dead counts, windows, generator."""
    last = list(saved_steps(path).values())[-1]
    files = [file for file in last.glob("*.safetensors") if file.stem != "stream"]  # how far it ran ahead is chance
    return {f"{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


def rows(*fitted: Any) -> dict[int, dict[str, float]]:
    """The reports of a run's parts; the pace is the one thing that differs."""
    merged = {step: row for part in fitted for step, row in part.log.rows.items()}
    return {s: {n: v for n, v in row.items() if n != "details/tokens_per_second"} for s, row in merged.items()}


def assert_same(a: Path, b: Path) -> None:
    one, two = everything(a), everything(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def settings_of(kind: str) -> tuple[str, dict[str, Any], int]:
    act_fn, settings = KINDS[kind]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    return act_fn, {"n_checkpoints": 4, "tokens": 16 * accumulation, **REPORTS, **SCHEDULE, **settings}, accumulation


@pytest.mark.parametrize("way", ["from_checkpoint", "from_pretrained_path"])
@pytest.mark.parametrize("stop", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_ended_early_and_went_on(
    run: New, new_sae: New, batches: New, kind: str, stop: int, way: str
) -> None:
    act_fn, settings, accumulation = settings_of(kind)
    stream = batches(STEPS * accumulation, masked=True)
    whole = run(new_sae(act_fn), stream, name="whole", **settings)
    first = run(new_sae(act_fn), stream[: stop * accumulation], name="parts", **settings)
    assert first.ended_early and first.trainer.cur_step == stop and not whole.ended_early

    torch.manual_seed(12345)  # whatever the new process has drawn before
    rest = stream[stop * accumulation :]
    if way == "from_checkpoint":
        sae = SparseAutoEncoder.from_pretrained(first.path, fold_activation_scale=False)
        trainer = Trainer.from_checkpoint(sae, first.path)
        assert (trainer.cur_step, trainer.cur_tokens) == (stop, first.trainer.cur_tokens)
        second = run(sae, rest, name="parts", trainer=trainer)
    else:
        second = run(new_sae(act_fn, seed=9), rest, name="parts", from_pretrained_path=str(first.path), **settings)
    assert not second.ended_early and second.trainer.cur_tokens == whole.trainer.cur_tokens
    assert_same(whole.path, second.path)
    assert rows(first, second) == rows(whole)
    if "auxk_coefficient" in settings:
        assert stop == 1 or first.trainer.is_dead.any()  # so that the next step revives what was dead before it
        assert whole.log.rows[STEPS]["losses/aux_loss"] > 0 and whole.log.rows[STEPS]["sparsity/dead"] > 0
    if act_fn == "batchtopk":
        assert everything(second.path)["sae_weights.safetensors/activation_function.batch_topk_threshold"] > 0


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(run: New, new_sae: New, batches: New) -> None:
    act_fn, settings, _ = settings_of("topk with auxk and k going down")
    stream = batches(STEPS)
    whole = run(new_sae(act_fn), stream, name="whole", **settings)
    with pytest.raises(Killed):
        run(new_sae(act_fn), killed(stream, 9), name="parts", **settings)
    path = whole.path.parent / "parts"
    assert list(saved_steps(path)) == [2, 4, 7]  # 12^(1/4), 12^(2/4), 12^(3/4)
    second = run(new_sae(act_fn), stream[7:], name="parts", from_pretrained_path=str(path), **settings)
    assert second.log.calls[:2] == [("start", 7), ("advance", 8)]
    assert_same(whole.path, path)


def test_a_plain_iterable_is_said_to_need_the_remaining_batches(
    run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(new_sae("topk"), batches(2))
    assert "remaining" not in caplog.text
    run(new_sae("topk"), batches(4), from_pretrained_path=str(first.path))
    warnings = [
        r.getMessage() for r in caplog.records if "remaining" in r.getMessage() and r.levelno == logging.WARNING
    ]
    assert warnings == ["resuming at step 2 from a plain iterable: it must yield the remaining batches"]


# --- streams with a position -----------------------------------------------------------------------------------------


class Positioned:
    """Somebody else's stream: an iterator with a position, that cannot be peeked at."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0

    def __iter__(self) -> Positioned:
        return self

    def __next__(self) -> Any:
        if self.at >= len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Restarting:
    """A loader that goes on from a loaded position when it is next iterated, as torchdata's does."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.at, len(self.batches)):
            self.at = i + 1
            yield self.batches[i]

    state_dict, load_state_dict = Positioned.state_dict, Positioned.load_state_dict


@pytest.mark.parametrize("kind", [Positioned, Restarting])
def test_any_stream_with_a_position_is_put_back_to_it(
    run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture, kind: Callable[[list[Any]], Any]
) -> None:
    """The whole stream is given each time; what was only peeked at does not count as used."""
    stream = batches(STEPS)
    settings = {**REPORTS, "n_checkpoints": 1}
    whole = run(new_sae("topk"), kind(stream), name="whole", **settings)
    first = run(new_sae("topk"), kind(stream[:5]), name="parts", **settings)
    second = run(new_sae("topk"), kind(stream), name="parts", from_pretrained_path=str(first.path), **settings)
    assert_same(whole.path, second.path)
    assert rows(first, second) == rows(whole)
    assert "plain iterable" not in caplog.text


def test_batches_that_only_the_initializer_has_seen_are_not_used_up(run: New, new_sae: New, batches: New) -> None:
    """It looks at 8; the run stops after 3, and must go on with the fourth."""
    stream = batches(STEPS)
    settings = {**REPORTS, "n_checkpoints": 2, "check_point_save_mode": "linear"}

    def initialised(stream: Any) -> SparseAutoEncoder:
        torch.manual_seed(0)
        return Initializer(InitializerConfig()).initialize_sae_from_config(new_sae("topk").cfg, stream)  # type: ignore[return-value]

    def failing(sae: Any) -> None:
        raise Killed

    whole = run(initialised(Positioned(stream)), Positioned(stream), name="whole", **settings)
    started = Positioned(stream)
    with pytest.raises(Killed):
        run(initialised(started), started, name="parts", eval_fn=failing, eval_frequency=7, **settings)
    assert started.at == 8
    path = whole.path.parent / "parts"
    run(new_sae("topk", seed=9), Positioned(stream), name="parts", from_pretrained_path=str(path), **settings)
    assert_same(whole.path, path)


@pytest.mark.parametrize("kind", [Positioned, Restarting])
def test_a_position_may_be_loaded_after_looking(batches: New, kind: Callable[[list[Any]], Any]) -> None:
    stream = batches(6)
    looked = peekable(kind(stream))
    assert isinstance(looked, Stateful)
    assert looked.peek(2)[1] is stream[1] and looked.state_dict() == {"at": 0}
    assert next(looked) is stream[0] and looked.state_dict() == {"at": 1}
    looked.load_state_dict({"at": 4})
    assert list(looked) == stream[4:] and looked.state_dict() == {"at": 6}


SHUFFLED = BufferShuffleConfig(perm_seed=3)
STREAMS: dict[str, dict[str, Any]] = {
    "in order": {},
    "in order, run ahead": {"num_workers": 3},
    "shuffled whole": {"buffer_shuffle": SHUFFLED},
    "shuffled in a buffer": {"buffer_size": 48, "buffer_shuffle": SHUFFLED},
    "shuffled in a buffer, run ahead": {"buffer_size": 48, "buffer_shuffle": SHUFFLED, "num_workers": 3},
    "contexts": {"target": ActivationFactoryTarget.ACTIVATIONS_2D, "batch_size": 4},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 contexts of 4 tokens in three shards, some tokens masked."""
    g = torch.Generator().manual_seed(4)
    stream = [
        {HOOK: torch.randn(8, 4, 8, generator=g), "tokens": torch.arange(32).view(8, 4) + 32 * i,
         "mask": torch.rand(8, 4, generator=g) < 0.9}
        for i in range(3)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("cache") / "activations"
    return ActivationWriter(ActivationWriterConfig(cache_dir=path, hook_points=[HOOK], n_samples_per_chunk=8)).process(
        stream
    )


def opened(cache: Path, **settings: Any) -> ActivationStream:
    defaults = {"target": ActivationFactoryTarget.ACTIVATIONS_1D, "batch_size": 16, "num_workers": 0}
    source = ActivationFactoryActivationsSource(path=cache, epochs=None)
    cfg = ActivationFactoryConfig(**{"sources": [source], "hook_points": [HOOK], **defaults, **settings})
    return ActivationFactory(cfg, seed=1).process()


@pytest.mark.parametrize("kind", STREAMS)
def test_cached_activations_go_on_where_they_were(run: New, new_sae: New, cache: Path, kind: str) -> None:
    """One run of 12 steps; another is stopped in step 8 and goes on from its last checkpoint, that of step 6."""
    settings = {**REPORTS, "n_checkpoints": 2, "check_point_save_mode": "linear"}

    def failing(sae: Any) -> None:
        raise Killed

    with opened(cache, **STREAMS[kind]) as stream:
        whole = run(new_sae("batchtopk"), stream, name="whole", **settings)
    with opened(cache, **STREAMS[kind]) as stream, pytest.raises(Killed):
        run(new_sae("batchtopk"), stream, name="parts", eval_fn=failing, eval_frequency=8, **settings)
    path = whole.path.parent / "parts"
    assert list(saved_steps(path)) == [6]
    with opened(cache, **STREAMS[kind]) as stream:
        second = run(new_sae("batchtopk", seed=9), stream, name="parts", from_pretrained_path=str(path), **settings)
    assert_same(whole.path, path)
    assert rows(second) == {step: row for step, row in rows(whole).items() if step > 6}
    assert second.trainer.cur_tokens == whole.trainer.cur_tokens


def test_a_stream_with_other_settings_is_refused(run: New, new_sae: New, cache: Path) -> None:
    with opened(cache) as stream:
        first = run(new_sae("topk"), stream, steps=2, n_checkpoints=1)
    with opened(cache, batch_size=8) as stream, pytest.raises(CheckpointError, match="batch_size"):
        run(new_sae("topk"), stream, from_pretrained_path=str(first.path))


# --- the plan of a resumed run ---------------------------------------------------------------------------------------


def test_a_resumed_run_may_be_made_longer(run: New, new_sae: New, batches: New) -> None:
    stream = batches(9)
    first = run(new_sae("topk"), stream[:4], steps=4, n_checkpoints=1)
    assert not first.ended_early
    second = run(new_sae("topk"), stream[4:], steps=8, n_checkpoints=1, from_pretrained_path=str(first.path))
    assert second.trainer.total_training_steps == second.trainer.cur_step == 8 and not second.ended_early


def test_a_finished_run_has_nothing_left_to_do(run: New, new_sae: New, batches: New) -> None:
    first = run(new_sae("topk"), batches(3), steps=3, n_checkpoints=1)
    sae = new_sae("topk", seed=9)
    second = run(sae, batches(3), steps=3, n_checkpoints=1, from_pretrained_path=str(first.path))
    assert not second.ended_early and second.log.calls == [("start", 3), ("close", 0)]
    assert all(torch.equal(a, b) for a, b in zip(first.sae.parameters(), sae.parameters(), strict=True))


# --- the same seed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_run_and_another_does_not(run: New, new_sae: New, batches: New, kind: str) -> None:
    act_fn, settings, accumulation = settings_of(kind)
    made = [
        run(new_sae(act_fn, seed=seed), batches(STEPS * accumulation), name=name, **settings)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert_same(made[0].path, made[1].path)
    assert rows(made[0]) == rows(made[1]) != rows(made[2])
    assert not torch.equal(made[0].sae.W_E, made[2].sae.W_E)
