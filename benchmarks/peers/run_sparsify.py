"""sparsify: `Trainer.fit`, with a lookup table in the place of the language model.

The "tokens" are row numbers of the table of activations, and the hooked module passes the rows on, so that the whole
step, but for one copy of a batch, is the library's own.
"""
# pyright: reportMissingImports=false

import torch
from peer import Setting, speed
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from timing import Clock


class Table(torch.nn.Module):
    """Gives rows for row numbers; each time it is asked is the beginning of a step."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.rows = clock, torch.cat(clock.batches)
        self.acts, self.device = torch.nn.Identity(), torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> "Table":
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.numel() > 1:
            self.clock.tick()
        return self.acts(self.rows[input_ids])


class Rows(torch.utils.data.Dataset):
    """One item is the row numbers of one batch."""

    def __init__(self, steps: list[int], size: int, n_rows: int) -> None:
        self.steps, self.size, self.n_rows = steps, size, n_rows

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i >= len(self):
            raise IndexError
        return {"input_ids": (torch.arange(self.size) + self.steps[i] * self.size) % self.n_rows}

    def select(self, indices: range) -> "Rows":
        return Rows([self.steps[i] for i in indices], self.size, self.n_rows)


def train(setting: Setting, clock: Clock) -> None:
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=setting.d_sae, k=setting.k), batch_size=1, hookpoints=["acts"],
        log_to_wandb=False, save_dir="run", run_name="run", save_every=10**6,
    )  # fmt: skip
    table = Table(clock)
    Trainer(cfg, Rows(list(range(clock.n_steps + 1)), setting.n_tokens, len(table.rows)), table).fit()


speed(train)
