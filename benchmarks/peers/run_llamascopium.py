"""llamascopium: `Initializer`, then `Trainer.fit` on a plain stream; settings of its pythia examples in float32."""
# pyright: reportMissingImports=false

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from llamascopium import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig
from peer import Setting, speed
from timing import Clock

HOOK = "acts"


def as_batch(x: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(len(x), dtype=torch.long)
    return {HOOK: x, "tokens": tokens, "mask": torch.ones(len(x), dtype=torch.bool)}


class Stream:
    """Can be begun again: the initializer and `fit` each look at the first batch before the training."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.looks = clock, 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.looks -= 1
        return map(as_batch, repeat(self.clock.batch(0)) if self.looks >= 0 else self.clock)


def train(setting: Setting, clock: Clock) -> None:
    stream = Stream(clock)
    own = {"jumprelu_threshold_window": 4.0} if setting.act_fn == "jumprelu" else {}
    cfg = SAEConfig(
        hook_point_in=HOOK, hook_point_out=HOOK, d_model=setting.d_model, act_fn=setting.act_fn, top_k=setting.k,
        expansion_factor=setting.d_sae / setting.d_model, dtype=torch.float32, device="cpu", **own,
    )  # fmt: skip
    initializer = InitializerConfig(
        grid_search_init_norm=False, init_log_jumprelu_threshold_value=math.log(0.1), decoder_uniform_bound=0.07
    )
    stream.looks = 1
    sae = Initializer(initializer).initialize_sae_from_config(
        cfg, activation_stream=stream, activation_norm={HOOK: clock.batch(0).norm(dim=1).mean().item()}
    )
    # the JumpReLU example's "tanh-quad" raises in 2.0.0b34 (a 0-d loss has no token specs), hence "tanh"
    losses = {
        "jumprelu": {"lr": 5e-5, "l1_coefficient": 0.3, "sparsity_loss_type": "tanh", "jumprelu_lr_factor": 0.1},
        "relu": {"sparsity_loss_type": "power", "p": 1},
    }
    options = {
        "amp_dtype": torch.float32, "lr": 1e-4, "initial_k": setting.k, "n_checkpoints": 0, "exp_result_path": "run",
        "total_training_tokens": 100_000 * setting.n_tokens, **losses.get(setting.act_fn, {}),
    }  # fmt: skip
    trainer = Trainer(TrainerConfig(**options))
    stream.looks = 1
    trainer.fit(sae, stream)


torch.manual_seed(0)
speed(train)
