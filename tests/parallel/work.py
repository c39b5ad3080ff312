"""What the processes of a test do: train a few steps on their shares of the batches, and say what came of it.

`train` runs alone (no mesh) or on a mesh. The results have the same names and, joined over the latents, the same
shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lm_saes import Initializer, InitializerConfig, Trainer, TrainerConfig
from lm_saes.axes.cuts import runs_of
from lm_saes.data.batch import Batch
from lm_saes.data.peek import peekable
from lm_saes.data.share import share
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.evaluation.evaluator import EvalConfig, Evaluator, numbers
from lm_saes.parallel.mesh import axes_of
from lm_saes.training.pace import Pace
from lm_saes.training.run import Run
from lm_saes.training.update import update

from ..contracts import toy  # noqa: F401 (a kind that registers itself)

D, CONTEXTS, LENGTH = 6, 8, 5
REPORT = 5
"""Steps between reports."""
KINDS: dict[str, dict[str, Any]] = {
    "sae": {"hook_point_in": "a", "hook_point_out": "a"},
    "transcoder": {"hook_point_in": "a", "hook_point_out": "b", "use_glu_encoder": True,
                   "sparsity_include_decoder_norm": False},
    "crosscoder": {"hook_points": ["a", "b", "c", "d"]},
    "clt": {"hook_points_in": ["a", "b"], "hook_points_out": ["b", "c"]},
    "molt": {"hook_point_in": "a", "hook_point_out": "b", "rank_counts": {1: 12, 3: 8, 9: 4}},
    "lorsa": {"hook_point_in": "a", "hook_point_out": "b", "n_qk_heads": 8, "d_qk_head": 4, "n_ctx": LENGTH,
              "rotary_dim": 4, "use_post_qk_ln": True, "normalization_type": "RMS"},
    "tied": {"hook_point_in": "a", "hook_point_out": "a"},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One training run."""

    kind: str
    act_fn: str
    steps: int = 20
    dtype: str = "float64"
    sae: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    initializer: dict[str, Any] = field(default_factory=dict)
    uneven: bool = False
    """Whether tokens are masked so that processes have different numbers of valid ones."""
    short_end: bool = False
    """Whether the last batch has one context only: too few for all processes to get one."""


def config(case: Case) -> BaseSAEConfig:
    settings: dict[str, Any] = {"d_model": D, "expansion_factor": 4.0, "act_fn": case.act_fn, "dtype": case.dtype}
    if case.kind == "molt":
        del settings["expansion_factor"]
    if "topk" in case.act_fn:  # fresh heads are alike: a batch's budget must not end among equals
        settings["top_k"] = 4 if case.kind == "crosscoder" else 3
    name = "sae" if case.kind == "transcoder" else case.kind
    return BaseSAEConfig.kind(name)(**settings | KINDS[case.kind] | case.sae)


def batches(case: Case) -> list[Batch]:
    """The run's whole batches: contexts of sums of a few directions, the same for whoever asks."""
    draw = torch.Generator().manual_seed(3)
    directions = torch.randn(4, 12, D, generator=draw, dtype=torch.float64)
    made: list[Batch] = []
    for step in range(case.steps * case.trainer.get("gradient_accumulation_steps", 1)):
        shape = (CONTEXTS, LENGTH)
        strength = torch.rand(*shape, 12, generator=draw, dtype=torch.float64)
        strength *= torch.rand(*shape, 12, generator=draw) < 0.2
        batch: Batch = {"tokens": torch.arange(CONTEXTS * LENGTH).view(shape) + step}
        for hook, rows in zip("abcd", directions, strict=True):
            noise = torch.randn(*shape, D, generator=draw, dtype=torch.float64)
            batch[hook] = (strength @ rows + 0.1 * noise).to(getattr(torch, case.dtype))
        if case.uneven:
            ends = torch.arange(CONTEXTS)[:, None] * LENGTH // CONTEXTS
            batch["mask"] = torch.arange(LENGTH) <= ends
        made.append(batch)
    if case.short_end:
        made[-1] = {name: value[:1] for name, value in made[-1].items()}
    return made


def train(
    case: Case, mesh: DeviceMesh | None, place: str, save_to: str = "", save_after: int = 0, resume: str = ""
) -> dict[str, Tensor]:
    """Train, and return losses and metrics, weights, what is selected, and dead counts.

    Args:
        save_to: a run's directory to save a checkpoint in `save_after` so many steps.
        resume: the step's directory of a checkpoint to go on from.
    """
    torch.manual_seed(5)
    whole = batches(case)
    probe, micro = whole[0], case.trainer.get("gradient_accumulation_steps", 1)
    if resume:
        own = share_of(whole[micro * int(resume.rpartition("_")[2]) :], mesh)
        sae = AbstractSparseAutoEncoder.from_config(config(case), mesh)
    else:
        own = share_of(whole, mesh)
        sae = initialise(case, own, mesh)
    results: dict[str, Tensor] = {}
    trainer, reports = Trainer(settings(case, place, resume)), list[dict[str, float]]()
    stream = peekable(own)
    run = trainer._prepare(sae, stream)
    sae.train()
    pace = Pace(trainer.cfg, run, stream)
    while batches_of_step := pace.take():
        take_step(trainer, run, batches_of_step)
        pace.agree(trainer.cur_step, None)
        if trainer.cur_step % REPORT == 0 or trainer.cur_step == case.steps:
            report = trainer._report(run)
            reports.append({name: value for name, value in report.items() if name != "details/tokens_per_second"})
        if trainer.cur_step == save_after:
            trainer.save_checkpoint(sae, save_to)
    for name in reports[-1].keys() | reports[0].keys():
        results[f"report.{name}"] = torch.tensor([r.get(name, 0.0) for r in reports], dtype=torch.float64)
    results |= weights_of(sae) | evaluated(sae, whole)
    results["waited"] = joined(sae, run.board.dead.tokens_since_last_activation, -1)
    with torch.no_grad():
        sae.attach(sae.axes.of_whole_batches())
        dense = sae.record(probe).code.dense()
        results["chosen"] = joined(sae, (dense > 0).to(torch.int8), 1)
    return results


def evaluated(sae: AbstractSparseAutoEncoder, whole: list[Batch]) -> dict[str, Tensor]:
    """All numbers of an evaluation, the frequencies, and the examples as bytes."""
    result = Evaluator(EvalConfig(n_latents=6, n_snippets=2, snippet_context=2)).evaluate(sae, whole[:3])
    found = {f"evaluated.{name}": torch.tensor(value) for name, value in numbers(result).items()}
    examples = json.dumps(result["latents"]).encode()
    return found | {
        "evaluated.frequency": torch.tensor(result["sparsity/frequency"]),
        "evaluated.latents": torch.frombuffer(bytearray(examples), dtype=torch.uint8),
    }


def share_of(batches: Iterable[Batch], mesh: DeviceMesh | None) -> Iterator[Batch]:
    """This process's shares of whole batches."""
    if mesh is None:
        yield from batches
        return
    tokens = axes_of(mesh).tokens
    for batch in batches:
        yield share(batch, tokens.place, tokens.size)


def take_step(trainer: Trainer, run: Run, batches_of_step: list[Batch]) -> None:
    """One optimizer step, as the trainer's loop takes it."""
    update(run, trainer.cfg, trainer.cur_step, batches_of_step)
    trainer.cur_step += 1
    trainer._settle(run)


def traffic(case: Case, mesh: DeviceMesh, place: str) -> dict[str, Tensor]:
    """What the first process hands to collectives in the second step, in bytes: of all_reduce, and of all_gather."""
    own = share_of(batches(case), mesh)
    sae = initialise(case, own, mesh)
    trainer, stream = Trainer(settings(case, place, "")), peekable(own)
    run = trainer._prepare(sae, stream)
    axes = {name: getattr(sae.axes, name) for name in ("latents", "tokens", "sites")}
    take_step(trainer, run, [next(stream)])
    for axis in axes.values():
        getattr(axis, "traffic", {}).clear()
    take_step(trainer, run, [next(stream)])
    handed = {name: getattr(axis, "traffic", {}) for name, axis in axes.items()}
    return {name: torch.tensor([by.get("all_reduce", 0), by.get("all_gather", 0)]) for name, by in handed.items()}


def initialise(case: Case, own: Iterator[Batch], mesh: DeviceMesh | None) -> AbstractSparseAutoEncoder:
    """A dictionary with fresh weights."""
    threshold: dict[str, Any] = {"init_log_jumprelu_threshold_value": -1.0} if case.act_fn == "jumprelu" else {}
    initializer = Initializer(InitializerConfig(**threshold | case.initializer))
    return initializer.initialize_sae_from_config(config(case), own, device_mesh=mesh)


def settings(case: Case, place: str, resume: str = "") -> TrainerConfig:
    """The trainer's settings."""
    return TrainerConfig(
        total_training_tokens=case.steps * CONTEXTS * LENGTH * case.trainer.get("gradient_accumulation_steps", 1),
        exp_result_path=place, log_frequency=1, dead_threshold=60, feature_sampling_window=5, clip_grad_norm=0.5,
        amp_dtype=None, from_pretrained_path=resume or None,
        **{"lr": 1e-2, **case.trainer},
    )  # fmt: skip


def weights_of(sae: AbstractSparseAutoEncoder) -> dict[str, Tensor]:
    """All processes' weights, by `weights.` and their names in files."""
    weights = dict[str, Tensor]()
    for name, tensor in sae.full_state_dict().items():
        dims = sae.file_dim_maps().get(name, {})
        whole = joined(sae, tensor, dims.get("model"))
        weights[f"weights.{name}"] = whole if "head" not in dims else sae.axes.sites.join(whole.contiguous())
    return weights


def joined(sae: AbstractSparseAutoEncoder, part: Tensor, dim: int | None) -> Tensor:
    """A tensor of all latents from the processes' parts."""
    part, latents = part.detach(), sae.axes.latents
    if dim is None or latents.size == 1:
        return part
    runs = [n // latents.size for n in runs_of(sae, part.shape[dim] * latents.size)]
    pieces = [latents.join(piece.movedim(dim, 0).contiguous()) for piece in part.split(runs, dim)]
    return torch.cat(pieces).movedim(0, dim)
