"""The mixture of linear transforms beyond its losses: config, files, folding, norms, initialisation, training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lm_saes import Initializer, InitializerConfig, Trainer, TrainerConfig
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.molt import MixtureOfLinearTransform, MOLTConfig
from lm_saes.errors import ConfigError
from lm_saes.latents.codes import SparseCode
from lm_saes.latents.encode import transforms
from lm_saes.latents.selection import selector

from .molt_twin import RANKS, MoltTwin, molt_config, random_molt
from .twin import ACT_FNS, IN, OUT, assert_same, least_distance, random_batch

SAME = 1e-5
NORMS = {IN: 3.0, OUT: 11.0}


# -- config --------------------------------------------------------------------------------------------------------


def test_latents_are_counted_and_ordered_by_rank() -> None:
    cfg = molt_config()
    assert cfg.d_sae == 20
    assert list(cfg.ranks.items()) == [(1, 8), (3, 7), (9, 5)]
    molt = MixtureOfLinearTransform(cfg)
    shapes = {name: tuple(t.shape) for name, t in molt.state_dict().items()}
    assert shapes == {
        "W_E": (6, 20), "b_E": (20,), "b_D": (6,),
        "U_matrices.1": (8, 6, 1), "U_matrices.3": (7, 6, 3), "U_matrices.9": (5, 6, 9),
        "V_matrices.1": (8, 1, 6), "V_matrices.3": (7, 3, 6), "V_matrices.9": (5, 9, 6),
    }  # fmt: skip


def test_rank_counts_go_through_json(tmp_path: Path) -> None:
    cfg = molt_config()
    cfg.save_hyperparameters(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rank_counts"] == {"9": 5, "1": 8, "3": 7}
    loaded = BaseSAEConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MOLTConfig)
    assert loaded.rank_counts == RANKS
    assert loaded == cfg


def test_an_expansion_factor_has_to_agree() -> None:
    for factor in (None, 20 / 6, 3.34):  # int(6 * 3.34) = 20
        assert molt_config(expansion_factor=factor).d_sae == 20
    with pytest.raises(ValidationError, match=r"expansion_factor=4.0: gives 24 latents.*has 20 transforms; remove it"):
        molt_config(expansion_factor=4.0)


@pytest.mark.parametrize("rank_counts", [{}, {0: 3}, {-1: 3}, {2: 0}, {2: -1}, {"two": 3}])
def test_rank_counts_that_cannot_be(rank_counts: Any) -> None:
    with pytest.raises(ValidationError):
        molt_config(rank_counts=rank_counts)


def test_what_the_config_refuses() -> None:
    with pytest.raises(ValidationError, match="top_k=21 exceeds the 20 latents"):
        molt_config(act_fn="topk", top_k=21)
    with pytest.raises(ValidationError, match="act_fn='layertopk' is not an activation function here"):
        molt_config(act_fn="layertopk")


# -- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_the_ways_to_reconstruct_agree(act_fn: str) -> None:
    molt = random_molt(molt_config(act_fn=act_fn)).eval()
    if act_fn == "batchtopk":
        molt.activation_function.batch_topk_threshold.fill_(0.7)  # type: ignore[operator]
    batch = random_batch(molt.cfg, (3, 4))
    x, twin = batch[IN], MoltTwin(molt)
    latents, h = molt.encode(x, return_hidden_pre=True)
    assert isinstance(latents, Tensor)
    assert_same(h, twin.hidden(x), SAME)
    want = twin.decode(latents.flatten(0, 1), x.flatten(0, 1)).view(3, 4, 6)
    assert_same(molt.decode(latents, x), want, SAME)
    assert_same(molt.decode(latents.detach(), x), want, SAME)
    assert_same(molt(x), want, SAME)
    assert_same(molt.reconstruct(batch), want, SAME)


def test_decoding_needs_the_input() -> None:
    molt = random_molt(molt_config())
    with pytest.raises(ConfigError, match="decode: the latents of a mixture of linear transforms act on its input"):
        molt.decode(torch.zeros(3, 20))


def test_only_active_transforms_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not active may hold anything: it is never read."""
    for module in (selector, transforms):
        monkeypatch.setattr(module, "sparse_pays", lambda entries, places: True)
    molt = random_molt(molt_config(act_fn="topk", sparsity_include_decoder_norm=False))
    with torch.no_grad():
        molt.b_E[4:] = -100
        want = molt(x := random_batch(molt.cfg)[IN])
        for rank in (3, 9):
            molt.V_matrices[str(rank)].fill_(torch.nan)
        assert torch.equal(molt(x), want)


def test_maps_cost_more_than_directions() -> None:
    cfg = molt_config(act_fn="topk", top_k=16, rank_counts={2: 50, 9: 50})
    code = random_molt(cfg).encode_sparse(random_batch(cfg, (50,))[IN])
    assert isinstance(code, SparseCode)  # at 16%, where an autoencoder would go dense


# -- saving, folding -----------------------------------------------------------------------------------------------


def seen(act_fn: str, **settings: Any) -> MixtureOfLinearTransform:
    """A dictionary that knows its norms and has seen a batch, so that running thresholds are what they are in use."""
    molt = random_molt(molt_config(act_fn=act_fn, norm_activation="dataset-wise", **settings))
    molt.set_dataset_average_activation_norm(NORMS)
    with torch.no_grad():
        molt.record(random_batch(molt.cfg, (20,), scale=1.4))
    return molt


def active(molt: MixtureOfLinearTransform, batch: dict[str, Any]) -> Tensor:
    return molt.record(batch).code.dense() > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_folding_keeps_function_and_selection(tmp_path: Path, act_fn: str, gated: bool, training: bool) -> None:
    molt = seen(act_fn, sparsity_include_decoder_norm=gated)
    molt.save_pretrained(tmp_path)
    batch = random_batch(molt.cfg, (30,), seed=5, scale=2.0)
    folded = AbstractSparseAutoEncoder.from_pretrained(tmp_path).train(training)
    unfolded = MixtureOfLinearTransform.from_pretrained(tmp_path, fold_activation_scale=False).train(training)
    assert isinstance(folded, MixtureOfLinearTransform)
    assert folded.cfg.norm_activation == "inference"
    molt.train(training)
    with torch.no_grad():
        want, selected = molt.reconstruct(batch), active(molt, batch)
        assert 0 < int(selected.sum()) < selected.numel()
        for loaded in (folded, unfolded):
            loaded.load_state_dict({n: b for n, b in loaded.state_dict().items() if "batch_topk" in n}, strict=False)
            assert_same(loaded.reconstruct(batch), want, SAME)
            assert torch.equal(active(loaded, batch), selected)
        scale = NORMS[OUT] / NORMS[IN]  # a_in / a_out with a = sqrt(d) / norm
        assert_same(folded.decoder_norm(), molt.decoder_norm() * scale, SAME)


@pytest.mark.parametrize("norm_activation", ["token-wise", "batch-wise"])
def test_scales_that_depend_on_the_activations_cannot_be_folded(norm_activation: str) -> None:
    molt = random_molt(molt_config(norm_activation=norm_activation))
    with pytest.raises(NotImplementedError, match="depends on the activations"):
        molt.standardize_parameters_of_dataset_norm()


# -- norms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_unit_decoder_norm_keeps_the_function(act_fn: str, gated: bool) -> None:
    molt = seen(act_fn, sparsity_include_decoder_norm=gated).eval()
    batch = random_batch(molt.cfg, seed=5, scale=2.0)
    with torch.no_grad():
        want, selected = molt.reconstruct(batch), active(molt, batch)
        if not gated and "topk" in act_fn:
            with pytest.raises(NotImplementedError, match="without gating"):
                molt.transform_to_unit_decoder_norm()
            return
        molt.transform_to_unit_decoder_norm()
        assert_same(molt.decoder_norm(), torch.ones(20), SAME)
        assert_same(molt.reconstruct(batch), want, SAME)
        assert torch.equal(active(molt, batch), selected)


def test_fixed_norms() -> None:
    molt = random_molt(molt_config())
    with torch.no_grad():
        before = molt.decoder_norm().clone()
        middle = float(before.median())
        molt.set_decoder_to_fixed_norm(middle, force_exact=False)
        assert_same(molt.decoder_norm(), before.clamp(max=middle), SAME)  # only shrinks what is above
        molt.set_decoder_to_fixed_norm(5.0, force_exact=True)
        assert_same(molt.decoder_norm(), torch.full((20,), 5.0), SAME)
        molt.set_encoder_to_fixed_norm(0.25)
        assert_same(molt.encoder_norm(), torch.full((20,), 0.25), SAME)
        assert molt.decoder_norm(keepdim=True).shape == (20, 1)
        assert molt.encoder_norm(keepdim=True).shape == (1, 20)


def test_a_zero_transform_stays_zero() -> None:
    molt = MixtureOfLinearTransform(molt_config())
    molt.set_decoder_to_fixed_norm(5.0, force_exact=True)
    molt.set_encoder_to_fixed_norm(5.0)
    molt.transform_to_unit_decoder_norm()
    assert not any(bool(p.any()) for p in molt.parameters())


def test_every_rank_is_cut_along_the_model_axis() -> None:
    maps = random_molt(molt_config(act_fn="jumprelu")).dim_maps()
    latents = {name: dims["model"] for name, dims in maps.items() if dims}
    assert latents == {
        "W_E": 1, "b_E": 0, "activation_function.log_jumprelu_threshold": 0,
        **{f"{side}_matrices.{rank}": 0 for side in "UV" for rank in RANKS},
    }  # fmt: skip
    assert maps["b_D"] == {}


# -- initialisation ------------------------------------------------------------------------------------------------


def test_fresh_weights() -> None:
    cfg = molt_config(d_model=64, rank_counts={2: 40, 8: 60})
    torch.manual_seed(0)
    molt = Initializer(InitializerConfig()).initialize_parameters(MixtureOfLinearTransform(cfg))
    for name, parameter in molt.named_parameters():
        if name in ("b_E", "b_D"):
            assert not parameter.any()
        else:  # uniform within 1 / sqrt(100)
            assert 0.098 < float(parameter.detach().max()) <= 0.1
            assert -0.1 <= float(parameter.detach().min()) < -0.098
            assert float(parameter.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_tying_the_encoder_is_refused_where_it_is_asked_for() -> None:
    initializer = Initializer(InitializerConfig(init_encoder_with_decoder_transpose=True))
    with pytest.raises(ConfigError, match=r"init_encoder_with_decoder_transpose=True.*'molt'"):
        initializer.initialize_sae_from_config(molt_config())
    with pytest.raises(NotImplementedError, match="no common shape to tie"):
        MixtureOfLinearTransform(molt_config()).init_encoder_with_decoder_transpose()


def test_biases_from_a_batch() -> None:
    molt = random_molt(molt_config(dtype=torch.float64))
    batch = random_batch(molt.cfg, (5, 6), masked=True)
    mask = batch["mask"]
    molt.init_decoder_bias_with_geometric_median(batch)
    molt.init_encoder_bias_with_mean_hidden_pre(batch)
    assert molt.b_D is not None
    assert_same(molt.b_D, least_distance(batch[OUT][mask]), 1e-4)
    torch.testing.assert_close((batch[IN][mask] @ molt.W_E).mean(0), -molt.b_E.detach())


def test_grid_search_lowers_the_loss() -> None:
    batch = random_batch(molt_config(), (200,), scale=2.0)
    plain, searched = (
        Initializer(InitializerConfig(grid_search_init_norm=search)).initialize_sae_from_config(molt_config(), [batch])
        for search in (False, True)
    )
    norms = searched.decoder_norm()
    assert_same(norms, norms.mean().expand(20), SAME)
    losses = [float(d.compute_loss(batch)["l_rec"].detach()) for d in (plain, searched)]  # type: ignore[index]
    assert losses[1] < losses[0]


# -- training ------------------------------------------------------------------------------------------------------


def true_batches(n: int, tokens: int = 64) -> list[dict[str, Any]]:
    """Labels are what one of four maps of rank 2 makes of the input; which one, the input's mean tells."""
    draw = torch.Generator().manual_seed(7)
    maps = torch.randn(4, 6, 2, generator=draw) @ torch.randn(4, 2, 6, generator=draw)
    directions = 3 * torch.nn.functional.normalize(torch.randn(4, 6, generator=draw), dim=1)
    batches = []
    for i in range(n):
        which = torch.randint(4, (tokens,), generator=draw)
        x = directions[which] + torch.randn(tokens, 6, generator=draw)
        y = torch.einsum("nde,ne->nd", maps[which], x)
        batches.append({IN: x, OUT: y, "tokens": torch.arange(i * tokens, (i + 1) * tokens)})
    return batches


def begin(act_fn: str) -> AbstractSparseAutoEncoder:
    cfg = molt_config(act_fn=act_fn, norm_activation="dataset-wise", rank_counts={1: 6, 2: 8, 8: 4})
    torch.manual_seed(0)
    start: dict[str, Any] = {"init_log_jumprelu_threshold_value": -2.0} if act_fn == "jumprelu" else {}
    return Initializer(InitializerConfig(**start)).initialize_sae_from_config(cfg, true_batches(8))


def trainer_config(path: Path, steps: int, **settings: Any) -> TrainerConfig:
    return TrainerConfig(
        **{
            "amp_dtype": None, "lr": 1e-2, "lr_scheduler_name": "constant", "log_frequency": 1, "n_checkpoints": 0,
            "total_training_tokens": steps * 64, "exp_result_path": str(path), "dead_threshold": 200,
            "auxk_coefficient": 0.03,
        }
        | settings
    )  # fmt: skip


class Kept:
    """A logger that keeps every report."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def start(self, total_steps: int, step: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def report(self, step: int, metrics: Any) -> None:
        self.rows[step] = dict(metrics)

    def close(self, summary: Any) -> None: ...


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_training_lowers_the_loss(tmp_path: Path, act_fn: str) -> None:
    molt, kept = begin(act_fn), Kept()
    extra = {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 1e-3} if act_fn == "jumprelu" else {}
    Trainer(trainer_config(tmp_path, 20, **extra)).fit(molt, true_batches(20), loggers=kept)
    assert kept.rows[20]["losses/mse_loss"] < 0.8 * kept.rows[1]["losses/mse_loss"]
    row = kept.rows[20]
    ranks = {1: 6, 2: 8, 8: 4}
    l0 = {rank: row[f"molt_metrics/l0_rank{rank}"] for rank in ranks}
    assert sum(l0.values()) == pytest.approx(row["metrics/l0"])
    for rank, n in ranks.items():
        assert row[f"molt_metrics/l0_rank{rank}_ratio"] == pytest.approx(l0[rank] / n)
    assert row["molt_metrics/total_rank_sum"] == pytest.approx(sum(rank * value for rank, value in l0.items()))


def test_ranks_in_use_by_hand(tmp_path: Path) -> None:
    cfg = molt_config(rank_counts={2: 2, 8: 2})
    molt, kept = MixtureOfLinearTransform(cfg), Kept()
    with torch.no_grad():
        molt.W_E[:4, :4] = torch.eye(4)
        for parameter in (*molt.U_matrices.values(), *molt.V_matrices.values()):
            parameter.fill_(1.0)
    x = torch.zeros(4, 6)
    x[0, [0, 2]] = 1.0  # one of rank 2, one of rank 8
    x[1, [0, 1]] = 1.0  # two of rank 2
    x[3] = 1.0  # masked
    batch = {IN: x, OUT: x, "tokens": torch.arange(4), "mask": torch.tensor([True, True, True, False])}
    settings = {"lr": 1e-30, "total_training_tokens": 4, "auxk_coefficient": None}
    Trainer(trainer_config(tmp_path, 1, **settings)).fit(molt, [batch], loggers=kept)
    row = {name: value for name, value in kept.rows[1].items() if name.startswith("molt_metrics")}
    assert row == pytest.approx(
        {
            "molt_metrics/l0_rank2": 3 / 3,
            "molt_metrics/l0_rank8": 1 / 3,
            "molt_metrics/l0_rank2_ratio": 1 / 2,
            "molt_metrics/l0_rank8_ratio": 1 / 6,
            "molt_metrics/total_rank_sum": (2 + 8 + 2 + 2) / 3,
        }
    )


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, act_fn: str) -> None:
    batches = true_batches(12)
    whole = begin(act_fn)
    Trainer(trainer_config(tmp_path / "whole", 12)).fit(whole, batches)

    stopped = begin(act_fn)
    assert Trainer(trainer_config(tmp_path / "part", 12)).fit(stopped, batches[:7])  # the stream ends early
    resumed = AbstractSparseAutoEncoder.from_config(stopped.cfg)
    trainer = Trainer.from_checkpoint(resumed, tmp_path / "part")
    assert trainer.cur_step == 7
    trainer.fit(resumed, batches[7:])
    for name, tensor in whole.full_state_dict().items():
        assert torch.equal(resumed.full_state_dict()[name], tensor), name
