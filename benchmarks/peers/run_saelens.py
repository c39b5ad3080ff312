"""SAELens: `SAETrainer.fit` on a plain iterator of batches, default settings."""
# pyright: reportMissingImports=false

import sae_lens
from peer import Setting, speed
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from timing import Clock

NAMES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "relu": "Standard"}
LR = 3e-4  # the default


def train(setting: Setting, clock: Clock) -> None:
    name = f"{NAMES[setting.act_fn]}TrainingSAE"
    own = {"k": setting.k} if "topk" in setting.act_fn else {}
    cfg = getattr(sae_lens, f"{name}Config")(d_in=setting.d_model, d_sae=setting.d_sae, **own)
    n = setting.n_tokens
    # `lr_end` is what the library's own runner passes; the trainer insists on it
    training = SAETrainerConfig(
        total_training_samples=(clock.n_steps + 1) * n, train_batch_size_samples=n, lr=LR, lr_end=LR / 10
    )
    SAETrainer(training, getattr(sae_lens, name)(cfg), iter(clock)).fit()


speed(train)
