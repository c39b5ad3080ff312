"""Say what each initialisation is worth: `l_rec` on tokens that were not trained on, before and after a few steps.

    python benchmarks/initialisers.py --kind lorsa
    python benchmarks/initialisers.py --kind sae --only "grid search" --seed 1

Settings, model and text are those of the kind's example (`make demo` fetches the last two), in batches of 512 tokens
and with the usual betas; a crosscoder has 4,608 latents, as autoencoder and transcoder have. All initialisations see
the same batches, in memory, and the initializer looks at the first. The first line gives the `l_rec` of predicting
nothing, and the held-out mean.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from itertools import islice
from typing import Any

import torch

from lm_saes import ActivationFactory, Initializer, InitializerConfig, Trainer
from lm_saes.config import build, read_document
from lm_saes.data.batch import Batch
from lm_saes.data.text import load_dataset
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.machine import keep_freed_memory
from lm_saes.models.base import LanguageModel
from lm_saes.models.load import load_language_model
from lm_saes.runners import train_settings_class
from lm_saes.runs.settings import TrainSettings, held_out

EXAMPLES = {"sae": "sae-topk"}
N_TOKENS = 512
"""Tokens in a batch; for a Lorsa as contexts."""
N_HELD_OUT = 8192

GRID: dict[str, Any] = {"grid_search_init_norm": True}
MEAN: dict[str, Any] = {"init_encoder_bias_with_mean_hidden_pre": True}
MEDIAN: dict[str, Any] = {"bias_init_method": "geometric_median"}
SUBSPACE: dict[str, Any] = {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 256}
UNTIED: dict[str, Any] = {"init_encoder_with_decoder_transpose": False} | dict.fromkeys(
    ("encoder_uniform_bound", "decoder_uniform_bound"), (3 / 576) ** 0.5
)
MLP: dict[str, Any] = {"initialize_tc_with_mlp": True, "model_layer": 9}
MHSA: dict[str, Any] = {"initialize_lorsa_with_mhsa": True, "model_layer": 9}
PER_HEAD: dict[str, Any] = {"initialize_W_D_with_active_subspace": True, "model_layer": 9}

GENERAL: dict[str, dict[str, Any]] = {
    "default": {},
    "grid search": GRID,
    "mean pre-activation bias": MEAN,
    "geometric median": MEDIAN,
    "mean pre-activation bias, geometric median": MEAN | MEDIAN,
    "grid search, mean pre-activation bias": GRID | MEAN,
    "grid search, geometric median": GRID | MEDIAN,
}
WITH_SUBSPACE = GENERAL | {
    "active subspace of 256": SUBSPACE,
    "grid search, active subspace of 256": GRID | SUBSPACE,
    "grid search, geometric median, active subspace of 256": GRID | MEDIAN | SUBSPACE,
}
INITIALISATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sae": WITH_SUBSPACE,
    "transcoder": GENERAL
    | {
        "unit norms, not tied": UNTIED,
        "from the MLP": MLP,
        "from the MLP, mean pre-activation bias": MLP | MEAN,
        "from the MLP, geometric median": MLP | MEDIAN,
        "from the MLP, grid search": MLP | GRID,
    },
    "molt": GENERAL,
    "clt": WITH_SUBSPACE,
    "crosscoder": WITH_SUBSPACE,
    "lorsa": GENERAL
    | {
        "from attention": MHSA,
        "from attention, grid search": MHSA | GRID,
        "active subspace per head": PER_HEAD,
        "from attention, active subspace per head": MHSA | PER_HEAD,
        "from attention, active subspace per head, grid search": MHSA | PER_HEAD | GRID,
        "from attention, active subspace per head, geometric median": MHSA | PER_HEAD | MEDIAN,
        "from attention, active subspace per head, mean pre-activation bias": MHSA | PER_HEAD | MEAN,
    },
}


def example(kind: str, steps: int) -> TrainSettings:
    """The settings of the kind's example, in smaller batches."""
    data = read_document(f"examples/{EXAMPLES.get(kind, kind)}.toml")
    contexts = data["activation_factory"]["target"] == "activations-2d"
    size = N_TOKENS // data["activation_factory"]["context_size"] if contexts else N_TOKENS
    data["activation_factory"] |= {"batch_size": size, "model_batch_size": min(size, 8) if contexts else 8}
    data["trainer"] |= {"total_training_tokens": steps * N_TOKENS, "n_checkpoints": 0, "betas": [0.9, 0.999]}
    if kind == "crosscoder":
        data["sae"]["expansion_factor"] = 8
    return build(train_settings_class(data["sae"]["sae_type"]), data)


def read(settings: TrainSettings, model: LanguageModel, n: int, apart: bool) -> list[Batch]:
    """The first `n` batches of the training text, or of the text that is kept apart."""
    datasets = held_out(settings.datasets) if apart else settings.datasets
    texts = {name: load_dataset(cfg) for name, cfg in datasets.items()}
    with ActivationFactory(settings.activation_factory, seed=0).process(model=model, datasets=texts) as stream:
        return list(islice(stream, n))


@torch.no_grad()
def l_rec(sae: AbstractSparseAutoEncoder, batches: list[Batch]) -> float:
    """Reconstruction loss over all valid tokens of the batches together."""
    total = n_tokens = 0.0
    for batch in batches:
        result: Any = sae.compute_loss(sae.normalize_activations(batch))
        total += float(result["l_rec"] * result["n_tokens"])
        n_tokens += float(result["n_tokens"])
    return total / n_tokens


@torch.no_grad()
def constants(sae: AbstractSparseAutoEncoder, batches: list[Batch]) -> tuple[float, float]:
    """The same loss of two constant predictions: nothing, and the mean of the labels."""
    records = [sae.make_record(sae.normalize_activations(batch)) for batch in batches]
    y_GND = torch.cat([r.label if r.mask is None else r.label[:, r.mask] for r in records], 1)
    centred_GND = y_GND - y_GND.mean(1, keepdim=True)
    return float(torch.linalg.vecdot(y_GND, y_GND).mean()), float(torch.linalg.vecdot(centred_GND, centred_GND).mean())


def main() -> None:
    """Print one line an initialisation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, choices=list(INITIALISATIONS))
    parser.add_argument("--only", help="the one initialisation to try")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    keep_freed_memory()
    settings = example(given.kind, given.steps)
    assert settings.model is not None
    model = load_language_model(settings.model)
    training = read(settings, model, given.steps, apart=False)
    others = read(settings, model, N_HELD_OUT // N_TOKENS, apart=True)
    chosen = {k: v for k, v in INITIALISATIONS[given.kind].items() if given.only in (None, k)}
    for i, (name, options) in enumerate(chosen.items()):
        torch.manual_seed(given.seed)
        initializer = Initializer(build(InitializerConfig, options))
        sae = initializer.initialize_sae_from_config(settings.sae, training, model=model)
        if i == 0:
            print("{}: nothing {:.4g}, mean {:.4g}".format(given.kind, *constants(sae, others)), flush=True)
        before, norm = l_rec(sae, others), float(sae.decoder_norm().detach().mean())
        with tempfile.TemporaryDirectory() as directory:
            trainer = settings.trainer.model_copy(update={"exp_result_path": directory})
            Trainer(trainer).fit(sae, training)
        after = f"after {given.steps} steps {l_rec(sae, others):.4g}"
        print(f"{given.kind}, {name}: {before:.4g}, {after} (decoder norm at the start {norm:.3g})", flush=True)


if __name__ == "__main__":
    main()
