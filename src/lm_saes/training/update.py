"""One optimizer step: forward, loss and backward of its micro-batches, clip, optimizer, measurements.

On a device that the host had better not wait for, nothing here reads a value: a step that is not finite is left out by
the device (`Ledger` says later which were), and sizes do not depend on values.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from lm_saes import machine
from lm_saes.data.batch import Batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.torch_private import step_if
from lm_saes.training.config import TrainerConfig
from lm_saes.training.faults import Check
from lm_saes.training.micro_batches import backward, valid_tokens
from lm_saes.training.optim import clip_gradients, gradient_norm, threshold_gradient_norm
from lm_saes.training.run import Run


def update(run: Run, cfg: TrainerConfig, t: int, batches: list[Batch]) -> None:
    """The step after `t` updates; not taken if anything is not finite.

    Raises:
        TrainingError: something is not finite, `on_non_finite="stop"`, and looking costs nothing.
    """
    sae = run.dictionary
    counts = valid_tokens(batches, sae.axes.tokens)
    n_tokens = sum(counts)
    run.set_schedules(t)
    passes = backward(sae, batches, counts, run.plan.loss_settings(t), run.board.dead, cfg.amp_dtype)
    norm = clipped = gradient_norm(sae)
    checks = [(name, value.isfinite()) for _, terms in passes for name, value in terms.items()]
    checks += [("gradient", norm.isfinite()), *_checks_of_inputs(sae, batches)]
    if sae.activation_function.log_threshold is not None:
        checks.append(("threshold gradient", threshold_gradient_norm(sae).isfinite()))
    taken = run.ledger.judge(t + 1, checks, sae.cfg.associated_hook_points[0], batches)
    if taken is not False:
        if cfg.clip_grad_norm:
            clipped = clip_gradients(sae, norm, cfg.clip_grad_norm)
        _take(run.optimizer, None if taken is True else taken)
        run.board.step(passes, n_tokens, norm, clipped, None if taken is True else taken)
    run.optimizer.zero_grad(set_to_none=True)
    run.ledger.count(n_tokens)


def _checks_of_inputs(sae: AbstractSparseAutoEncoder, batches: list[Batch]) -> list[Check]:
    """Whether activations are finite that were on the device already, where `check_batch` does not look at values."""
    given = [(hook, batch[hook]) for batch in batches for hook in dict.fromkeys(sae.cfg.associated_hook_points)]
    everywhere = sae.axes.everywhere
    return [(hook, everywhere.smallest(x.isfinite().all().int()) > 0) for hook, x in given
            if machine.waits_cost(x.device)]  # fmt: skip


def _take(optimizer: Optimizer, taken: Tensor | None) -> None:
    """Let the optimizer step; with `taken` (0-d bool) false the device leaves everything as it is."""
    optimizer.step() if taken is None else step_if(optimizer, taken)
