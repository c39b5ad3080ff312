"""dictionary_learning: `<Trainer>.update(step, x)`."""
# pyright: reportMissingImports=false

from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, StandardTrainer, TopKTrainer
from peer import Setting, speed
from timing import Clock

CLASSES = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer, "jumprelu": JumpReluTrainer, "relu": StandardTrainer}


def train(setting: Setting, clock: Clock) -> None:
    own = {"k": setting.k} if "topk" in setting.act_fn else {}
    trainer = CLASSES[setting.act_fn](
        steps=100_000, activation_dim=setting.d_model, dict_size=setting.d_sae, layer=0, lm_name="synthetic",
        device="cpu", seed=0, **own,
    )  # fmt: skip
    for step, x in enumerate(clock):
        trainer.update(step, x)


speed(train)
