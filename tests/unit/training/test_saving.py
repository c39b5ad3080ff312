"""When a run is saved, what it says about room, and what happens when the disk has none."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lm_saes import SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.errors import CheckpointError
from lm_saes.storage.manifest import problems
from lm_saes.storage.tensors import save_tensors
from lm_saes.training import checkpoint, resume
from lm_saes.training.checkpoint import all_steps, saved_steps
from lm_saes.training.resume import MAY_CHANGE

New = Callable[..., Any]
SPREAD = {"n_checkpoints": 3, "check_point_save_mode": "linear"}


# --- room ------------------------------------------------------------------------------------------------------------


def test_the_room_for_all_checkpoints_is_told_at_the_start(
    run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fitted = run(new_sae("topk"), batches(6), **SPREAD)
    (told,) = [message for message in caplog.messages if message.startswith("checkpoints: ")]
    count, each, unit = told.removeprefix("checkpoints: ").split(",")[0].replace(" of ", " ").split()
    assert int(count) == 3 == len(fitted.saved) and unit == "KiB"
    tensors = sum(file.stat().st_size for file in fitted.path.glob("checkpoints/step_6/*.safetensors"))
    tensors -= 5056 + 8 * 250  # without the generator's state and, of files this small, the names of the tensors
    assert float(each) * 1024 == pytest.approx(tensors, rel=0.2)
    assert f"{3 * float(each):.3g} KiB in all" in told or "in all; " in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"n_checkpoints": 0}, ""),
        ({"n_checkpoints": 1}, "checkpoints: 1 of "),
        ({"save_every_minutes": 30.0}, "in all, and one every 30 minutes; "),
        ({"save_every_minutes": 30.0, "keep_last": 2}, "checkpoints: 2 of "),
        ({"save_every_minutes": 30.0, "keep_last": 2, **SPREAD}, "checkpoints: 5 of "),
    ],
)
def test_what_the_room_is_for(
    run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str
) -> None:
    caplog.set_level(logging.INFO)
    run(new_sae("topk"), batches(6), **settings)
    assert (told in caplog.text) if told else ("checkpoints:" not in caplog.text)


def test_a_resumed_run_counts_what_is_still_to_come_and_a_small_disk_is_warned_of(
    run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(new_sae("topk"), batches(2), **SPREAD)
    caplog.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    run(new_sae("topk"), batches(4), from_pretrained_path=str(first.path), **SPREAD)
    (warning,) = [r.getMessage() for r in caplog.records if "too little" in r.getMessage()]
    assert warning.startswith("checkpoints: 2 of ") and warning.endswith("or use another disk")


# --- a disk that is full ---------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_older_checkpoint_and_the_run(
    run: New, new_sae: New, batches: New, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 3 to 5 nothing more can be flushed to disk."""
    real = os.fsync
    sae = new_sae("topk")

    def full(descriptor: int) -> None:
        if sae.provenance and 3 <= sae.provenance["steps"] <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    fitted = run(sae, batches(6), n_checkpoints=6, check_point_save_mode="linear")
    assert fitted.saved == [1, 2, 6] and fitted.trainer.cur_step == 6 and not fitted.ended_early
    assert [path.name for path in (fitted.path / "checkpoints").iterdir() if path.name.startswith(".")] == []
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 3
    assert errors[0].startswith("step 3: the checkpoint could not be saved ([Errno 28] No space left on device")
    whole = run(new_sae("topk"), batches(6), name="whole", n_checkpoints=0)
    assert all(torch.equal(a, b) for a, b in zip(fitted.sae.parameters(), whole.sae.parameters(), strict=True))


def test_safetensors_own_error_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises where the disk is full (as seen on a small file system) is no `OSError`."""

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    (tmp_path / "x.safetensors").write_bytes(b"old")
    monkeypatch.setattr("lm_saes.storage.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        save_tensors({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "x.safetensors").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


REFUSED = range(4, 10)
"""The steps after which the kernel refuses."""
WITH_LIMITED_FILES = """
    import logging, resource, signal, sys
    from pathlib import Path
    import torch
    from lm_saes import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig
    from lm_saes.training.loggers import JsonlLogger
    run, kib, first, last = Path(sys.argv[1]), *map(int, sys.argv[2:])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, instead of ending the process
    logging.basicConfig(level=logging.INFO)
    hook = "blocks.0.hook_resid_post"

    def batches():
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step in range(1, 13):
            limit = kib * 1024 if first <= step <= last else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            yield {hook: torch.randn(16, 8), "tokens": torch.arange(16)}

    cfg = SAEConfig(hook_point_in=hook, hook_point_out=hook, d_model=8, expansion_factor=32, act_fn="topk", top_k=4)
    sae = Initializer(InitializerConfig()).initialize_sae_from_config(cfg, activation_norm={hook: 3.0})
    settings = TrainerConfig(total_training_tokens=12 * 16, n_checkpoints=12, check_point_save_mode="linear",
                             log_frequency=1, lr_warm_up_steps=0, amp_dtype=None, exp_result_path=str(run))
    Trainer(settings).fit(sae, batches(), loggers=JsonlLogger(run / "metrics.jsonl"))
"""


@pytest.mark.parametrize(("kib", "refused"), [(14, "sae_weights"), (24, "optimizer")])
def test_files_that_the_kernel_refuses_to_write(tmp_path: Path, kib: int, refused: str) -> None:
    """A limit on the size of files tears the weights (17 KiB), or only the optimiser's state (35 KiB), in the write."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(textwrap.dedent(WITH_LIMITED_FILES))
    done = subprocess.run(
        [sys.executable, str(script), str(run), str(kib), str(REFUSED[0]), str(REFUSED[-1])],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checkpoints: 12 of " in done.stderr
    errors = [line.removeprefix("ERROR:lm_saes.trainer:") for line in done.stderr.splitlines() if "ERROR" in line]
    reason = f"([Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: "
    assert [error.partition(reason)[0] for error in errors] == [
        f"step {step}: the checkpoint could not be saved " for step in REFUSED
    ]
    assert all(f"/{refused}.safetensors'); older ones are kept" in error for error in errors)
    steps = all_steps(run)
    assert list(steps) == [step for step in range(1, 13) if step not in REFUSED]
    assert all(problems(path, whole=True) == [] for path in steps.values())
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert SparseAutoEncoder.from_pretrained(run).provenance["steps"] == 12  # type: ignore[index]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12


# --- what a kill leaves ----------------------------------------------------------------------------------------------


def test_what_a_kill_in_a_save_left_is_swept_away(run: New, new_sae: New, batches: New) -> None:
    first = run(new_sae("topk"), batches(4), steps=6, **SPREAD)
    steps = first.path / "checkpoints"
    shutil.copytree(steps / "step_4", steps / ".step_5.draft")
    (steps / "step_2").rename(steps / ".step_2.old")  # between the two renames of a replacement
    shutil.copytree(steps / "step_4", steps / ".step_4.old")  # after them
    second = run(new_sae("topk"), batches(6)[4:], steps=6, from_pretrained_path=str(first.path), **SPREAD)
    assert sorted(path.name for path in steps.iterdir()) == ["step_2", "step_4", "step_6"]
    assert second.trainer.cur_step == 6 and list(saved_steps(first.path)) == [2, 4, 6]


def test_the_only_checkpoint_is_found_even_if_it_was_just_being_replaced(run: New, new_sae: New, batches: New) -> None:
    first = run(new_sae("topk"), batches(2), steps=4, n_checkpoints=1)
    (step,) = (first.path / "checkpoints").iterdir()
    step.rename(step.with_name(f".{step.name}.old"))
    second = run(new_sae("topk"), batches(4)[2:], steps=4, n_checkpoints=1, from_pretrained_path=str(first.path))
    assert second.log.calls[0] == ("start", 2)


def test_a_removed_checkpoint_is_never_seen_half(
    run: New, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`keep_last` takes the name away first: a kill in the middle of removing leaves no torn checkpoint."""

    def killed(path: Path) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run(new_sae("topk"), batches(6), save_every_minutes=1e-9, keep_last=1)
    (path,) = (tmp_path / "run").glob("checkpoints/step_*")
    assert path.name == "step_2" and problems(path, whole=True) == []


# --- what may change -------------------------------------------------------------------------------------------------


OTHERS: dict[str, Any] = {
    "l1_coefficient": 0.5, "l1_coefficient_warmup_steps": 3, "lp_coefficient": 0.25, "auxk_coefficient": 0.5,
    "amp_dtype": "bfloat16", "sparsity_loss_type": "tanh", "tanh_stretch_coefficient": 2.0, "frequency_scale": 0.5,
    "p": 2.0, "initial_k": 8, "k_warmup_steps": 3, "k_cold_booting_steps": 2, "k_schedule_type": "exponential",
    "k_exponential_factor": 2.0, "k_aux": 3, "dead_threshold": 5.0, "skip_metrics_calculation": True,
    "gradient_accumulation_steps": 2, "lr": 0.5, "betas": (0.5, 0.5), "optimizer_class": "sparseadam",
    "optimizer_foreach": False, "lr_scheduler_name": "cosineannealing", "lr_end_ratio": 0.5, "lr_warm_up_steps": 2,
    "lr_cool_down_steps": 2, "jumprelu_lr_factor": 2.0, "clip_grad_norm": 0.5,
    "feature_sampling_window": 3, "total_training_tokens": 64, "log_frequency": 7, "eval_frequency": 7,
    "n_checkpoints": 4, "check_point_save_mode": "linear", "from_pretrained_path": "x", "exp_result_path": "y",
    "save_every_minutes": 5.0, "keep_last": 7, "on_non_finite": "skip",
}  # fmt: skip


def test_every_field_is_either_fixed_or_free(run: New, new_sae: New, batches: New) -> None:
    """Each field is changed alone; only those of length, logging, saving and faults pass."""
    sae = new_sae("topk")
    fitted = run(sae, batches(2), steps=2, n_checkpoints=1)
    (step,) = saved_steps(fitted.path).values()
    assert set(OTHERS) == set(TrainerConfig.model_fields)
    free = set()
    for name, value in OTHERS.items():
        changed = fitted.trainer.cfg.model_copy(
            update={name: TrainerConfig.model_construct(**{name: value}).__dict__[name]}
        )
        try:
            resume.refuse_changes(step, sae.cfg, changed)
            free.add(name)
        except CheckpointError as error:
            assert str(error).count("trainer.") == str(error).count(f"trainer.{name}") > 0
    assert free == MAY_CHANGE


def test_every_changed_field_is_listed_at_once(run: New, new_sae: New, batches: New) -> None:
    first = run(new_sae("topk"), batches(2), steps=4, n_checkpoints=1)
    message = (
        r"step_2: made with other settings \(sae.norm_activation: 'dataset-wise' there, 'token-wise' here; "
        r"sae.top_k: 4 there, 5 here; trainer.lr: 0.01 there, 0.5 here; trainer.clip_grad_norm: 0.0 there, 1.0 here\)"
    )
    with pytest.raises(CheckpointError, match=message) as error:
        run(new_sae("topk", top_k=5, norm_activation="token-wise"), batches(2), steps=4, lr=0.5, clip_grad_norm=1.0,
            from_pretrained_path=str(first.path))  # fmt: skip
    assert "\n" not in str(error.value) and "set them back, or start a new run" in str(error.value)


def test_old_settings_without_a_newer_field_are_read_with_its_default(run: New, new_sae: New, batches: New) -> None:
    first = run(new_sae("topk"), batches(2), steps=4, n_checkpoints=1)
    (step,) = saved_steps(first.path).values()
    data = json.loads((step / checkpoint.PROGRESS).read_text())
    del data["cfg"]["clip_grad_norm"], data["cfg"]["keep_last"]
    (step / checkpoint.PROGRESS).write_text(json.dumps(data))
    resume.refuse_changes(step, first.sae.cfg, first.trainer.cfg)


# --- what else goes on -----------------------------------------------------------------------------------------------


def test_skipped_steps_are_still_counted_after_a_resume(run: New, new_sae: New, batches: New) -> None:
    stream = batches(6)
    hook = new_sae().cfg.associated_hook_points[0]
    for at in (1, 4):
        stream[at][hook] = stream[at][hook] * 1e25
    settings = {"on_non_finite": "skip", "n_checkpoints": 1}
    first = run(new_sae("relu"), stream[:3], **settings)
    assert first.trainer.skipped_steps == 1
    second = run(new_sae("relu"), stream[3:], from_pretrained_path=str(first.path), **settings)
    assert second.trainer.skipped_steps == 2
    assert second.log.series("details/skipped_steps") == {4: 1.0, 5: 2.0, 6: 2.0}


def test_a_dictionary_saved_while_k_goes_down_selects_as_it_was_trained(run: New, new_sae: New, batches: New) -> None:
    settings = {"initial_k": 16, "k_warmup_steps": 10, "steps": 12, **SPREAD}
    first = run(new_sae("topk"), batches(5), **settings)
    step = first.path / "checkpoints" / "step_5"
    x = batches(1, seed=3)[0]
    for path in (step, first.path):
        loaded = SparseAutoEncoder.from_pretrained(path)
        assert loaded.current_k == first.sae.current_k == 12 and loaded.cfg.top_k == 4
        assert loaded.encode_sparse(loaded.prepare_input(x)).counts().sum() > 4 * 16
        torch.testing.assert_close(loaded.reconstruct(x), first.sae.eval().reconstruct(x), rtol=1e-4, atol=1e-5)
        assert SparseAutoEncoder.from_pretrained(path, top_k=3).current_k == 3  # what one asks for counts
        again = Path(str(path) + "-again")
        loaded.save_pretrained(again)
        assert SparseAutoEncoder.from_pretrained(again).current_k == 12
    end = run(new_sae("topk"), batches(12), name="end", **settings)
    assert SparseAutoEncoder.from_pretrained(end.path).current_k == 4


@pytest.fixture
def described(batches: New) -> Any:
    class Stream:
        """Batches that can tell where they come from."""

        def __iter__(self) -> Iterator[Any]:
            return iter(batches(4))

        def provenance(self) -> dict[str, Any]:
            return {"sources": [{"fingerprint": "abc"}]}

    return Stream()


def test_every_artefact_says_where_it_comes_from(run: New, new_sae: New, batches: New, described: Any) -> None:
    fitted = run(new_sae("topk"), described, steps=4, n_checkpoints=2, check_point_save_mode="linear")
    for path, step in ((fitted.path / "checkpoints" / "step_2", 2), (fitted.path, 4)):
        told = json.loads((path / "provenance.json").read_text())
        assert told["torch"] == torch.__version__.split("+")[0] or told["torch"] == torch.__version__
        assert {"lm_saes", "transformers", "python"} <= set(told)
        assert (told["steps"], told["tokens"]) == (step, 16 * step)
        assert told["trainer"] == fitted.trainer.cfg.to_json()
        assert told["training_metrics"] == {**fitted.log.rows[step]}
    assert told["data"] == {"stream": "PeekableStream"} or told["data"] == {"sources": [{"fingerprint": "abc"}]}

    loaded = SparseAutoEncoder.from_pretrained(fitted.path)
    loaded.save_pretrained(fitted.path / "copy")
    assert json.loads((fitted.path / "copy" / "provenance.json").read_text()) == told

    # a warm start: a new run from these weights says what it began with
    warm = SparseAutoEncoder.from_pretrained(fitted.path, fold_activation_scale=False)
    run(warm, batches(2), steps=2, name="warm")
    assert warm.provenance is not None and warm.provenance["started_from"] == told and warm.provenance["steps"] == 2
    assert load_file(fitted.path.parent / "warm" / "sae_weights.safetensors").keys() == warm.full_state_dict().keys()


class Down:
    """A W&B run, or a logger, whose server is gone."""

    id = "abc"

    def start(self, total_steps: int, step: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def log(self, *_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    report = log
    close = log


@pytest.mark.parametrize("way", ["wandb_logger", "loggers"])
def test_a_logger_that_is_down_is_told_once_and_does_not_end_the_run(
    new_sae: New, batches: New, tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    cfg = TrainerConfig(
        total_training_tokens=96, log_frequency=1, n_checkpoints=0, amp_dtype=None, exp_result_path=str(tmp_path)
    )
    trainer = Trainer(cfg)
    down: dict[str, Any] = {way: Down()}
    assert trainer.fit(new_sae("topk"), batches(6), **down) is False
    assert trainer.cur_step == 6 and (tmp_path / "sae_weights.safetensors").exists()
    (told,) = [message for message in caplog.messages if "is left out from here on" in message]
    assert told.endswith("failed and is left out from here on: ConnectionError: no route to host")
