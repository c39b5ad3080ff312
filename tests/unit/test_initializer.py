"""Initialisation: every setting does what it says, in the specification's order, from the batches it may look at."""

import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lm_saes.config import build
from lm_saes.data.batch import Batch
from lm_saes.data.peek import peekable
from lm_saes.dictionaries.sae import SAEConfig, SparseAutoEncoder
from lm_saes.errors import ConfigError, DataError
from lm_saes.initializer import Initializer, InitializerConfig

from .dictionaries.twin import IN, OUT, Twin, assert_same, least_distance, random_batch, sae_config, valid

NORMS = {IN: 2.0, OUT: 6.0}


def initialize(
    cfg: SAEConfig, stream: Any = None, norms: dict[str, float] | None = None, seed: int = 0, **settings: Any
) -> SparseAutoEncoder:
    """A dictionary initialised with `settings`, the draws repeatable."""
    torch.manual_seed(seed)
    made = Initializer(build(InitializerConfig, settings)).initialize_sae_from_config(cfg, stream, norms)
    assert isinstance(made, SparseAutoEncoder)
    return made


def structured_batch(cfg: SAEConfig, n: int = 60) -> Batch:
    """Activations around a mean, with directions of unequal variance; a quarter of the tokens is masked garbage."""
    batch = random_batch(cfg, (n,), masked=True, seed=3)
    for i, hook in enumerate(cfg.associated_hook_points):
        x = batch[hook] * torch.linspace(3, 0.2, cfg.d_model) + torch.arange(cfg.d_model) * (0.3 + i)
        batch[hook] = torch.where(batch["mask"][:, None], x, 100 * x)
    return batch


# -- fresh weights -------------------------------------------------------------------------------------------------


def test_bounds_of_the_draws() -> None:
    cfg = sae_config(d_model=64, use_glu_encoder=True)
    sae = initialize(
        cfg, encoder_uniform_bound=0.3, decoder_uniform_bound=2.0, init_encoder_with_decoder_transpose=False
    )
    for weights, bound in ((sae.W_E, 0.3), (sae.W_E_glu, 0.3), (sae.W_D, 2.0)):
        assert 0.98 * bound < float(weights.detach().abs().max()) <= bound
        assert float(weights.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)  # uniform
        assert abs(float(weights.detach().mean())) < 0.02 * bound
    for bias in (sae.b_E, sae.b_E_glu, sae.b_D):
        assert bias is not None and not bias.any()
    assert sae.training


def test_default_bounds_and_the_tie() -> None:
    sae = initialize(sae_config(d_model=64, use_glu_encoder=True))
    assert 0.98 < float(sae.W_D.detach().abs().max()) <= 1.0
    assert torch.equal(sae.W_E, sae.W_D.T)
    assert not torch.equal(sae.W_E_glu, sae.W_D.T)
    untied = initialize(sae_config(d_model=64), init_encoder_with_decoder_transpose=False)
    assert not torch.equal(untied.W_E, untied.W_D.T)


def test_the_factor_of_the_tie() -> None:
    sae = initialize(sae_config(), init_encoder_with_decoder_transpose_factor=0.25)
    assert torch.equal(sae.W_E, 0.25 * sae.W_D.T)


def test_thresholds_start_as_set() -> None:
    sae = initialize(sae_config(act_fn="jumprelu"), init_log_jumprelu_threshold_value=-1.5)
    assert torch.equal(sae.activation_function.log_threshold, torch.full((24,), -1.5))  # type: ignore[arg-type]


def test_parameters_alone_and_the_seed() -> None:
    first, second, other = (initialize(sae_config(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.W_D, second.W_D)
    assert not torch.equal(first.W_D, other.W_D)
    torch.manual_seed(1)
    alone = SparseAutoEncoder(sae_config())
    assert Initializer(InitializerConfig()).initialize_parameters(alone) is alone
    assert torch.equal(alone.W_D, first.W_D)
    assert torch.equal(alone.W_E, first.W_E)


# -- dataset norms -------------------------------------------------------------------------------------------------


def counting_stream(cfg: SAEConfig, n: int) -> list[Batch]:
    """Batches whose valid tokens have norm 1, 2, 3, ... at the input and ten times that at the output."""
    batches = []
    for i in range(1, n + 1):
        mask = torch.tensor([True, i % 2 == 0, False])  # batches differ in how many tokens count
        batch: Batch = {"tokens": torch.full((3,), i), "mask": mask}
        for hook, scale in ((IN, 1.0), (OUT, 10.0)):
            x = torch.zeros(3, cfg.d_model)
            x[:, i % cfg.d_model] = torch.where(mask, i * scale, 1e4)
            batch[hook] = x
        batches.append(batch)
    return batches


@pytest.mark.parametrize("n", [3, 8, 11])
def test_norms_are_measured_over_the_valid_tokens_of_the_first_eight_batches(n: int) -> None:
    cfg = sae_config(True, norm_activation="dataset-wise")
    batches = counting_stream(cfg, n)
    sae = initialize(cfg, batches)
    weights = {i: 1 + (i % 2 == 0) for i in range(1, min(n, 8) + 1)}
    mean = sum(i * w for i, w in weights.items()) / sum(weights.values())
    assert sae.dataset_average_activation_norm == {IN: pytest.approx(mean), OUT: pytest.approx(10 * mean)}


def test_norms_that_are_given_are_not_measured() -> None:
    cfg = sae_config(True, norm_activation="dataset-wise")
    assert initialize(cfg, counting_stream(cfg, 8), NORMS).dataset_average_activation_norm == NORMS
    assert initialize(cfg, None, NORMS).dataset_average_activation_norm == NORMS
    for given in ({}, {IN: 2.0}):
        with pytest.raises(DataError, match="has no positive average norm"):
            initialize(cfg, counting_stream(cfg, 8), given)


def test_other_modes_measure_nothing() -> None:
    for mode in ("inference", "token-wise", "batch-wise"):
        cfg = sae_config(True, norm_activation=mode)
        assert initialize(cfg, counting_stream(cfg, 8)).dataset_average_activation_norm is None


def test_what_was_looked_at_is_still_trained_on() -> None:
    cfg = sae_config(True, norm_activation="dataset-wise")
    batches = counting_stream(cfg, 10)

    def generate() -> Iterator[Batch]:
        yield from batches

    for stream in (generate(), batches):
        initialize(cfg, stream, grid_search_init_norm=True)
        seen = list(peekable(stream))  # as the trainer takes them
        assert [int(batch["tokens"][0]) for batch in seen] == list(range(1, 11))


# -- the decoder bias ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transcoder", [False, True])
def test_the_decoder_bias_is_the_geometric_median_of_the_valid_normalised_labels(transcoder: bool) -> None:
    cfg = sae_config(transcoder, norm_activation="dataset-wise")
    batch, hook = structured_batch(cfg), OUT if transcoder else IN
    sae = initialize(cfg, [batch], NORMS, bias_init_method="geometric_median")
    labels = valid(batch[hook], batch) * math.sqrt(6) / NORMS[hook]
    assert_same(sae.b_D, least_distance(labels).float(), 1e-4)  # type: ignore[arg-type]
    assert not initialize(cfg, [batch], NORMS).b_D.any()  # type: ignore[union-attr]


# -- the encoder bias ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True])
def test_the_encoder_bias_centres_the_pre_activations_of_the_valid_tokens(search: bool) -> None:
    cfg = sae_config(True, norm_activation="dataset-wise")
    batch = structured_batch(cfg)
    sae = initialize(cfg, [batch], NORMS, init_encoder_bias_with_mean_hidden_pre=True, grid_search_init_norm=search)
    x = valid(sae.prepare_input(sae.normalize_activations(batch)), batch)
    h = sae.hidden_pre(x).detach()
    assert float(h.mean(0).abs().max()) < 1e-5 * float(h.abs().max())
    assert sae.b_E.any()
    assert not initialize(cfg, [batch], NORMS, grid_search_init_norm=search).b_E.any()


# -- the active subspace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_decoder_rows_lie_in_the_active_subspace(m: int, transcoder: bool) -> None:
    cfg = sae_config(transcoder, norm_activation="dataset-wise")
    batch, hook = structured_batch(cfg), OUT if transcoder else IN
    settings: dict[str, Any] = {"init_encoder_with_decoder_transpose_factor": 0.5}
    plain = initialize(cfg, [batch], NORMS, **settings)
    sae = initialize(cfg, [batch], NORMS, initialize_W_D_with_active_subspace=True, d_active_subspace=m, **settings)
    labels = valid(batch[hook], batch) * math.sqrt(6) / NORMS[hook]
    U_DM = torch.linalg.svd((labels - labels.mean(0)).T).U[:, :m]
    assert_same(sae.W_D @ U_DM @ U_DM.T, sae.W_D, 1e-4)  # the rows are their own projection
    assert int(torch.linalg.matrix_rank(sae.W_D.detach(), atol=1e-3)) == m
    # Up to the sign of each direction the coordinates are the first m of the fresh draw.
    assert_same((sae.W_D @ U_DM).abs(), plain.W_D[:, :m].abs(), 1e-4)
    assert torch.equal(sae.W_E, 0.5 * sae.W_D.T)


# -- the norm of least loss ----------------------------------------------------------------------------------------


def loss_at(cfg: SAEConfig, batch: Batch, norm: float, tie: float | None, bias: bool) -> float:
    """`l_rec` at one decoder norm, from the same fresh draw, by the twin."""
    fresh: dict[str, Any] = {"init_encoder_with_decoder_transpose": False} if tie is None else {}
    sae = initialize(cfg, [batch], NORMS, **fresh)
    scaled = sae.normalize_activations(batch)
    with torch.no_grad():
        sae.W_D.mul_(norm / sae.W_D.norm(dim=1, keepdim=True))
        if tie is not None:
            sae.W_E.copy_(tie * sae.W_D.T)
        if bias:
            sae.b_E.copy_(-(valid(scaled[cfg.hook_point_in], batch).mean(0) @ sae.W_E))
        return float(Twin(sae).losses(scaled, sparsity=None)["l_rec"])


@pytest.mark.parametrize("act_fn", ["relu", "batchtopk"])
@pytest.mark.parametrize(("tie", "bias"), [(1.0, False), (0.4, True), (None, False), (None, True)])
def test_grid_search_finds_the_norm_of_least_loss(
    tie: float | None, bias: bool, act_fn: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = sae_config(norm_activation="dataset-wise", act_fn=act_fn)
    batch = structured_batch(cfg)
    settings: dict[str, Any] = {"init_encoder_bias_with_mean_hidden_pre": True} if bias else {}
    if tie is None:
        settings["init_encoder_with_decoder_transpose"] = False
    elif tie != 1.0:
        settings["init_encoder_with_decoder_transpose_factor"] = tie
    with caplog.at_level(logging.INFO, logger="lm_saes"):
        sae = initialize(cfg, [batch], NORMS, grid_search_init_norm=True, **settings)
    coarse = {n / 10: loss_at(cfg, batch, n / 10, tie, bias) for n in range(1, 51)}
    best = min(coarse, key=lambda norm: coarse[norm])
    fine = {best + i / 100: loss_at(cfg, batch, best + i / 100, tie, bias) for i in range(-9, 11)}
    best = min(fine, key=lambda norm: fine[norm])
    assert sae.decoder_norm().tolist() == pytest.approx([best] * 24, rel=1e-4)
    assert f"best_norm_fine_grained={best:.4g}" in caplog.text
    # Everything that depends on the norm belongs to the one that was chosen.
    if tie is not None:
        assert torch.equal(sae.W_E, sae.W_D.T * tie)
    scaled = sae.normalize_activations(batch)
    found = Twin(sae).losses(scaled, sparsity=None)["l_rec"]
    assert float(found.detach()) == pytest.approx(fine[best], rel=1e-5)
    assert sae.training


def test_the_best_norm_goes_to_the_logger_that_is_given() -> None:
    class Run:
        """Keeps what it is given."""

        logged: list[dict[str, float]]

        def __init__(self) -> None:
            self.logged = []

        def log(self, metrics: dict[str, float]) -> None:
            self.logged.append(metrics)

    cfg, run = sae_config(), Run()
    batch = structured_batch(cfg)
    made = Initializer(InitializerConfig(grid_search_init_norm=True)).initialize_sae_from_config(
        cfg, [batch], wandb_logger=run
    )
    assert run.logged == [{"best_norm_fine_grained": pytest.approx(float(made.decoder_norm()[0].detach()), rel=1e-5)}]


def test_running_thresholds_begin_with_training() -> None:
    cfg = sae_config(act_fn="batchtopk")
    sae = initialize(cfg, [structured_batch(cfg)], grid_search_init_norm=True)
    assert float(sae.get_buffer("activation_function.batch_topk_threshold")) == 0


# -- all together --------------------------------------------------------------------------------------------------


def test_the_order_of_the_steps() -> None:
    """Each step sees what the ones before it made."""
    cfg = sae_config(True, norm_activation="dataset-wise")
    batches = [structured_batch(cfg), *(random_batch(cfg, (4,), seed=seed) for seed in range(9))]
    sae = initialize(
        cfg,
        batches,
        initialize_W_D_with_active_subspace=True,
        d_active_subspace=3,
        bias_init_method="geometric_median",
        grid_search_init_norm=True,
        init_encoder_bias_with_mean_hidden_pre=True,
        init_encoder_with_decoder_transpose_factor=0.7,
    )
    scaled = sae.normalize_activations(batches[0])  # with the norms of 8 batches, then everything on the first
    x, y = valid(scaled[IN], scaled), valid(scaled[OUT], scaled)
    assert_same(sae.b_D, least_distance(y).float(), 1e-4)  # type: ignore[arg-type]
    assert int(torch.linalg.matrix_rank(sae.W_D.detach(), atol=1e-3)) == 3
    norm = sae.decoder_norm()
    assert_same(norm, norm[:1].expand(24), 1e-5)
    assert torch.equal(sae.W_E, sae.W_D.T * 0.7)
    assert_same(sae.b_E, -(x.mean(0) @ sae.W_E), 1e-5)
    # The decoder bias was there when norms were compared: no candidate near the chosen one is better with it.
    at = float(norm[0].detach())
    losses = {}
    for candidate in (at - 0.05, at, at + 0.05):
        with torch.no_grad():
            sae.W_D.mul_(candidate / sae.decoder_norm(keepdim=True))
            sae.init_encoder_with_decoder_transpose(0.7)
            sae.b_E.copy_(-(x.mean(0) @ sae.W_E))
            losses[candidate] = float(sae.compute_loss(scaled, return_aux_data=False))  # type: ignore[arg-type]
    assert min(losses, key=lambda norm: losses[norm]) == at


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias_init_method": "mean"}, "bias_init_method"),
        ({"decoder_uniform_bound": 0.0}, "decoder_uniform_bound"),
        ({"encoder_uniform_bound": -1.0}, "encoder_uniform_bound"),
        ({"d_active_subspace": 3}, "d_active_subspace=3 has no effect: initialize_W_D_with_active_subspace is off"),
        ({"initialize_W_D_with_active_subspace": True, "d_active_subspace": 0}, "d_active_subspace"),
        (
            {"init_encoder_with_decoder_transpose": False, "init_encoder_with_decoder_transpose_factor": 2.0},
            "init_encoder_with_decoder_transpose_factor=2.0 has no effect",
        ),
        ({"model_layer": 2}, "model_layer=2 has no effect"),
        ({"initialize_tc_with_mlp": True}, "model_layer=None: initialize_tc_with_mlp needs the layer"),
        (
            {
                "initialize_tc_with_mlp": True,
                "model_layer": 0,
                "initialize_W_D_with_active_subspace": True,
                "d_active_subspace": 3,
            },
            "initialize_W_D_with_active_subspace=True: would overwrite",
        ),
        (
            {"initialize_tc_with_mlp": True, "model_layer": 0, "init_encoder_with_decoder_transpose_factor": 2.0},
            "init_encoder_with_decoder_transpose_factor=2.0 has no effect: initialize_tc_with_mlp",
        ),
        ({"grid_search": True}, "did you mean 'grid_search_init_norm'?"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(InitializerConfig, settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "settings", "message"),
    [
        ({"act_fn": "jumprelu"}, {}, "init_log_jumprelu_threshold_value=None: act_fn='jumprelu' needs"),
        ({}, {"init_log_jumprelu_threshold_value": -1.0}, "act_fn='relu' has no thresholds; remove it"),
        ({"use_decoder_bias": False}, {"bias_init_method": "geometric_median"}, "use_decoder_bias is off"),
        (
            {},
            {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 7},
            "d_active_subspace=7: must be between 1 and d_model=6",
        ),
        ({}, {"initialize_lorsa_with_mhsa": True, "model_layer": 0}, "initialize_lorsa_with_mhsa=True"),
        ({}, {"initialize_W_D_with_active_subspace": True}, "d_active_subspace=None"),
        ({}, {"initialize_tc_with_mlp": True, "model_layer": 0}, "initialize_tc_with_mlp=True: needs a transcoder"),
    ],
)
def test_settings_that_do_not_fit_the_dictionary(cfg: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    made = sae_config(**cfg)
    with pytest.raises(ConfigError) as error:
        initialize(made, [structured_batch(made)], **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("mode", "settings", "stream", "message"),
    [
        ("dataset-wise", {}, None, "give activation_norm, or an activation_stream"),
        ("dataset-wise", {}, [], "give activation_norm, or an activation_stream"),
        ("inference", {"grid_search_init_norm": True}, None, "looks at a batch, and there is none"),
        ("inference", {"bias_init_method": "geometric_median"}, [], "looks at a batch, and there is none"),
        ("dataset-wise", {}, [{"tokens": torch.zeros(2, dtype=torch.int64)}], f"hook point '{IN}' is missing"),
        ("dataset-wise", {}, [{"tokens": torch.zeros(2, dtype=torch.int64), IN: torch.zeros(2, 7)}], "shape [2, 7]"),
    ],
)
def test_streams_that_do_not_do(mode: str, settings: dict[str, Any], stream: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        initialize(sae_config(norm_activation=mode), stream, **settings)
    assert message in str(error.value)


def test_every_setting_is_described() -> None:
    assert [name for name, field in InitializerConfig.model_fields.items() if not field.description] == []


def test_settings_are_checked_for_a_kind_that_nobody_has_imported() -> None:
    """A Lorsa's config stands in a module of its own."""
    code = """
from lm_saes.dictionaries.lorsa_config import LorsaConfig
from lm_saes.initializer import Initializer, InitializerConfig

cfg = LorsaConfig(hook_point_in="in", hook_point_out="out", d_model=4, expansion_factor=4, n_qk_heads=4, d_qk_head=4,
                  rotary_dim=4, n_ctx=8)
Initializer(InitializerConfig()).check(cfg)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
