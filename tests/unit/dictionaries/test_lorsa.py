"""Lorsa's public methods, its config, what is refused, training, and starting from a model's attention."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_saes.config import LENIENT, build
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.lorsa import LorsaConfig, LowRankSparseAttention
from lm_saes.errors import CheckpointError, ConfigError, DataError
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.trainer import Trainer, TrainerConfig
from lm_saes.training.checkpoint import saved_steps

from .test_lorsa_twin import BASE, VARIANTS, LorsaTwin, contexts, lorsa_config, random_lorsa
from .twin import ACT_FNS, IN, OUT, assert_same, least_distance, valid

NORMS = {IN: 3.0, OUT: 5.0}
SAME = 1e-5


# -- config --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    cfg = lorsa_config()
    assert (cfg.sae_type, cfg.n_ov_heads, cfg.d_sae, cfg.score_scale) == ("lorsa", 24, 24, math.sqrt(6))
    assert (cfg.rotary_adjacent_pairs, cfg.rotary_scale, cfg.old_context_len, cfg.eps) == (True, 1, 2048, 1e-6)
    assert build(LorsaConfig, BASE | {"rotary_dim": 4}).rotary_base == 10000
    assert cfg.associated_hook_points == [IN, OUT]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hook_point_out": IN}, "attention writes elsewhere than it reads"),
        ({"n_qk_heads": 5}, "n_qk_heads=5: must divide the 24 latents"),
        ({"rotary_dim": None}, "rotary_dim=None: must be even and at most 6"),
        ({"rotary_dim": 5}, "rotary_dim=5: must be even"),
        ({"rotary_dim": 8}, "rotary_dim=8: must be even and at most 6 (d_qk_head)"),
        ({"rotary_dim": 14, "rotary_scale": 2}, "at most 12 (d_qk_head x rotary_scale)"),
        ({"positional_embedding_type": "none", "rotary_dim": 4}, "rotary_dim=4 has no effect"),
        ({"old_context_len": 512}, "old_context_len=512 has no effect: use_NTK_by_parts_rope is off"),
        ({"NTK_by_parts_factor": 8.0}, "NTK_by_parts_factor=8.0 has no effect"),
        ({"use_NTK_by_parts_rope": True, "NTK_by_parts_low_freq_factor": 4.0}, "is below"),
        ({"normalization_type": "RMS"}, "normalization_type='RMS' has no effect: use_post_qk_ln is off"),
        ({"eps": 1e-5}, "eps=1e-05 has no effect"),
        ({"use_post_qk_ln": True}, "normalization_type=None: use_post_qk_ln needs one"),
        ({"normalization_type": "layer"}, "normalization_type"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"attn_scale": 0.0}, "attn_scale"),
        ({"act_fn": "layertopk"}, "act_fn='layertopk' is not an activation function here"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(LorsaConfig, BASE | VARIANTS["adjacent"] | settings)
    assert message in str(error.value)
    for name in ("n_ctx", "n_qk_heads", "d_qk_head"):
        with pytest.raises(ConfigError, match=f"{name}: required"):
            build(LorsaConfig, {key: value for key, value in (BASE | {"rotary_dim": 4}).items() if key != name})


def test_every_field_is_described() -> None:
    assert [name for name, field in LorsaConfig.model_fields.items() if not field.description] == []


def test_old_configs_with_settings_of_no_effect_still_load() -> None:
    old = BASE | {"positional_embedding_type": "none", "rotary_dim": 4, "normalization_type": "RMS"}
    with pytest.warns(UserWarning, match="has no effect"):
        LorsaConfig.model_validate(old, context=LENIENT)


# -- shapes, errors ------------------------------------------------------------------------------------------------


def test_parameters_have_the_shapes_of_files() -> None:
    shapes = {name: tuple(p.shape) for name, p in random_lorsa(lorsa_config("halves")).named_parameters()}
    assert shapes == {
        "W_Q": (3, 6, 6), "W_K": (3, 6, 6), "b_Q": (3, 6), "b_K": (3, 6), "W_V": (24, 6), "W_O": (24, 6), "b_V": (24,),
        "ln_q.w": (3, 6), "ln_k.w": (3, 6),
    }  # fmt: skip
    lorsa = random_lorsa(lorsa_config())
    assert lorsa.W_Q.shape == (3, 6, 6)
    assert lorsa.dim_maps() == {n: {} if n == "b_D" else {"model": 0} for n, _ in lorsa.named_parameters()}


def test_single_tokens_are_refused() -> None:
    lorsa, batch = random_lorsa(lorsa_config()), contexts(lorsa_config())
    flat = {name: x.flatten(0, 1) for name, x in batch.items()}
    uses = (lorsa.record, lorsa.reconstruct, lorsa.compute_loss, lorsa.prepare_input)
    for use in uses:
        with pytest.raises(DataError, match=rf"{IN}: shape \(20, 6\), wanted \[batch, seq, d\].*activations-2d"):
            use(flat)
    with pytest.raises(DataError, match=r"x: shape \(20, 6\)"):
        lorsa.encode(flat[IN])


def test_contexts_that_are_too_long_are_refused() -> None:
    lorsa = random_lorsa(lorsa_config(n_ctx=4))
    with pytest.raises(DataError, match="contexts of 5 tokens exceed n_ctx=4; use a smaller context_size"):
        lorsa.record(contexts(lorsa.cfg))
    with pytest.raises(DataError, match="exceed n_ctx=4"):
        lorsa.hidden_pre(contexts(lorsa.cfg)[IN])
    assert random_lorsa(lorsa_config(n_ctx=5)).reconstruct(contexts(lorsa.cfg)).shape == (4, 5, 6)


def test_missing_and_wrong_hook_points() -> None:
    lorsa = random_lorsa(lorsa_config())
    batch = contexts(lorsa.cfg)
    with pytest.raises(DataError, match=f"'{OUT}' is missing"):
        lorsa.record({name: x for name, x in batch.items() if name != OUT})
    assert lorsa.reconstruct({name: x for name, x in batch.items() if name != OUT}).shape == (4, 5, 6)
    with pytest.raises(DataError, match=r"wanted \[..., 6\]"):
        lorsa.record(batch | {IN: torch.zeros(4, 5, 7)})


@pytest.mark.parametrize(
    ("tokens", "mask", "left"),
    [
        ([0, 0, 0, 7, 8], [0, 0, 0, 1, 1], True),
        ([0, 0, 7, 8, 9], [0, 0, 1, 0, 1], True),
        ([1, 7, 8, 0, 0], [0, 1, 1, 0, 0], False),  # BOS masked, padding on the right
        ([1, 7, 8, 9, 9], [0, 0, 0, 1, 1], False),  # a first part that does not count is not padding
        ([0, 0, 7, 8, 9], [1, 1, 1, 1, 1], False),
        ([1, 1, 1, 1, 1], [0, 0, 0, 0, 0], False),  # a context of padding alone
        ([1, 7, 8, 8, 9], [1, 0, 0, 0, 1], False),
    ],
)
def test_padding_on_the_left_is_refused(tokens: list[int], mask: list[int], left: bool) -> None:
    lorsa = random_lorsa(lorsa_config())
    batch = contexts(lorsa.cfg)
    batch["tokens"][2] = torch.tensor(tokens)
    batch["mask"] = torch.ones(4, 5, dtype=torch.bool)
    batch["mask"][2] = torch.tensor(mask).bool()
    if left:
        with pytest.raises(DataError, match=r"context 2 begins with padding.*pad on the right"):
            lorsa.record(batch)
    else:
        lorsa.record(batch)


def test_what_makes_no_sense_says_why() -> None:
    lorsa = random_lorsa(lorsa_config())
    for use in (
        lambda: lorsa.encoder_norm(),
        lambda: lorsa.set_encoder_to_fixed_norm(1.0),
        lambda: lorsa.init_encoder_with_decoder_transpose(),
        lambda: lorsa.init_W_D_with_active_subspace(contexts(lorsa.cfg), 2),
    ):
        with pytest.raises(NotImplementedError, match=r"\w+ \w+ \w+"):
            use()
    with pytest.raises(ConfigError, match="lp_coefficient: needs learnt thresholds"):
        lorsa.compute_loss(contexts(lorsa.cfg), lp_coefficient=1.0)


# -- the public surface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_pattern(variant: str) -> None:
    lorsa = random_lorsa(lorsa_config(variant, dtype=torch.float64))
    x = contexts(lorsa.cfg)[IN]
    twin, pattern = LorsaTwin(lorsa), lorsa.attention_pattern(x)
    assert pattern.shape == (4, lorsa.cfg.n_qk_heads, 5, 5)
    for b, g in ((0, 0), (3, lorsa.cfg.n_qk_heads - 1)):
        assert_same(pattern[b, g], twin.pattern(x[b], g), 1e-12)
    assert not pattern.triu(1).any()


def test_encode_and_decode() -> None:
    lorsa = random_lorsa(lorsa_config())
    x = contexts(lorsa.cfg)[IN]
    latents, h = lorsa.encode(x, return_hidden_pre=True)
    assert isinstance(latents, Tensor)
    assert_same(latents, h.relu(), 1e-6)
    assert lorsa.b_D is not None
    assert_same(lorsa(x), latents @ lorsa.W_O + lorsa.b_D, 1e-6)
    assert torch.equal(lorsa.hidden_pre(x), h)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_contexts_do_not_see_each_other(act_fn: str, variant: str) -> None:
    lorsa = random_lorsa(lorsa_config(variant, act_fn=act_fn, dtype=torch.float64))
    batch = contexts(lorsa.cfg)
    lorsa.record(batch)
    lorsa.eval()
    together = lorsa.reconstruct(batch)
    for row in range(4):  # also the shape of the smallest batch
        assert_same(lorsa.reconstruct({name: x[[row]] for name, x in batch.items()})[0], together[row], 1e-9)
    first = {name: x[:, :1] for name, x in batch.items()}
    assert_same(lorsa.reconstruct(first), together[:, :1], 1e-9)


@pytest.mark.parametrize("mode", ["token-wise", "batch-wise", "dataset-wise", "inference"])
def test_reconstruct_is_raw_in_raw_out(mode: str) -> None:
    lorsa = random_lorsa(lorsa_config(norm_activation=mode))
    lorsa.set_dataset_average_activation_norm(NORMS)
    batch = contexts(lorsa.cfg, masked=True, scale=4.0)

    def factor(x: Tensor, hook: str) -> Tensor:
        norm = x.square().sum(-1, keepdim=True).sqrt()
        size = {"token-wise": norm, "batch-wise": norm[batch["mask"]].mean(),
                "dataset-wise": torch.tensor(NORMS[hook]), "inference": torch.tensor(math.sqrt(6))}  # fmt: skip
        return math.sqrt(6) / size[mode]

    twin = LorsaTwin(lorsa)
    h = twin.hidden(batch[IN] * factor(batch[IN], IN))
    want = twin.decode(twin.latents(h.flatten(0, 1))).view(4, 5, 6) / factor(batch[OUT], OUT)
    assert_same(lorsa.reconstruct(batch), want, SAME)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_folding_keeps_function_selection_and_patterns(act_fn: str, gated: bool, variant: str) -> None:
    cfg = lorsa_config(variant, act_fn=act_fn, sparsity_include_decoder_norm=gated, norm_activation="dataset-wise")
    batch = contexts(cfg, masked=True, scale=2.0)
    lorsa, folded = random_lorsa(cfg), random_lorsa(cfg)
    for one in (lorsa, folded):
        one.set_dataset_average_activation_norm(NORMS)
        one.record(contexts(cfg, seed=3))  # sets the running threshold, if there is one
    folded.standardize_parameters_of_dataset_norm()
    assert (folded.cfg.norm_activation, cfg.norm_activation) == ("inference", "dataset-wise")
    for mode in ("train", "eval"):
        a, b = (getattr(one, mode)().record(batch).code.dense() for one in (lorsa, folded))
        assert torch.equal(a > 0, b > 0)
        assert 0 < int((a > 0).sum()) < a.numel()
        assert_same(folded.reconstruct(batch), lorsa.reconstruct(batch), SAME)
    x = batch[IN]
    scaled = lorsa.normalize_activations(batch)[IN]
    assert_same(folded.attention_pattern(x), lorsa.attention_pattern(scaled), SAME)


def test_folding_needs_constant_factors() -> None:
    for mode in ("token-wise", "batch-wise"):
        with pytest.raises(NotImplementedError, match=f"{mode}.*depends on the activations"):
            random_lorsa(lorsa_config(norm_activation=mode)).standardize_parameters_of_dataset_norm()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_unit_decoder_norm_keeps_the_function(act_fn: str, gated: bool) -> None:
    cfg = lorsa_config(act_fn=act_fn, sparsity_include_decoder_norm=gated)
    lorsa, batch = random_lorsa(cfg), contexts(cfg)
    lorsa.record(contexts(cfg, seed=3))
    lorsa.eval()
    want, active = lorsa.reconstruct(batch), lorsa.record(batch).code.dense() > 0
    if not gated and "topk" in act_fn:
        with pytest.raises(NotImplementedError, match="without gating"):
            lorsa.transform_to_unit_decoder_norm()
        return
    lorsa.transform_to_unit_decoder_norm()
    assert_same(lorsa.decoder_norm(), torch.ones(24), SAME)
    assert_same(lorsa.reconstruct(batch), want, SAME)
    assert torch.equal(lorsa.record(batch).code.dense() > 0, active)


def test_norms() -> None:
    lorsa = random_lorsa(lorsa_config())
    before = lorsa.decoder_norm().detach()
    assert_same(before, lorsa.W_O.detach().square().sum(1).sqrt(), 1e-6)
    middle = float(before.median())
    lorsa.set_decoder_to_fixed_norm(middle, force_exact=False)
    assert_same(lorsa.decoder_norm(), before.clamp(max=middle), SAME)
    lorsa.set_decoder_to_fixed_norm(5.0, force_exact=True)
    assert_same(lorsa.decoder_norm(), torch.full((24,), 5.0), SAME)
    assert lorsa.b_D is not None
    assert_same(lorsa.decoder_bias_norm(), lorsa.b_D.norm(), SAME)
    assert float(random_lorsa(lorsa_config("halves")).decoder_bias_norm()) == 0
    empty = LowRankSparseAttention(lorsa_config())
    empty.set_decoder_to_fixed_norm(5.0, force_exact=True)
    assert not empty.W_O.any()


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_saved_is_trained(tmp_path: Path, act_fn: str, variant: str) -> None:
    lorsa = random_lorsa(lorsa_config(variant, act_fn=act_fn, norm_activation="dataset-wise"))
    lorsa.set_dataset_average_activation_norm(NORMS)
    batch = contexts(lorsa.cfg, masked=True, scale=3.0)
    lorsa.record(contexts(lorsa.cfg, seed=3))
    lorsa.save_pretrained(tmp_path)
    want = lorsa.eval().reconstruct(batch)
    for fold in (True, False):
        loaded = AbstractSparseAutoEncoder.from_pretrained(tmp_path, fold_activation_scale=fold)
        assert isinstance(loaded, LowRankSparseAttention)
        assert_same(loaded.reconstruct(batch), want, SAME)


def test_files_of_older_versions_load(tmp_path: Path) -> None:
    lorsa = random_lorsa(lorsa_config("halves"))
    lorsa.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()  # they had none
    file = tmp_path / "sae_weights.safetensors"
    old = {"mask": torch.ones(8, 8).tril().bool(), "IGNORE": torch.tensor(-torch.inf),
           "rotary_sin": torch.zeros(8, 4), "rotary_cos": torch.zeros(8, 4)}  # fmt: skip
    save_file({**load_file(file), **old}, file)
    loaded = LowRankSparseAttention.from_pretrained(tmp_path)
    batch = contexts(lorsa.cfg)
    assert torch.equal(loaded.reconstruct(batch), lorsa.reconstruct(batch))
    save_file({**load_file(file), "W_E": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected .*W_E"):
        LowRankSparseAttention.from_pretrained(tmp_path)


# -- initialisation ------------------------------------------------------------------------------------------------


def initialize(cfg: LorsaConfig, stream: Any = None, model: Any = None, **settings: Any) -> LowRankSparseAttention:
    torch.manual_seed(0)
    made = Initializer(build(InitializerConfig, settings)).initialize_sae_from_config(
        cfg, stream, {hook: NORMS.get(hook, 7.0) for hook in cfg.associated_hook_points}, model=model
    )
    assert isinstance(made, LowRankSparseAttention)
    return made


def test_fresh_weights() -> None:
    cfg = lorsa_config("adjacent", d_model=64, expansion_factor=8, n_qk_heads=8, d_qk_head=32, use_post_qk_ln=True,
                       normalization_type="RMS", act_fn="jumprelu")  # fmt: skip
    lorsa = initialize(cfg, init_log_jumprelu_threshold_value=-1.5)
    bound = math.sqrt(6 / (64 + 32))
    for W in (lorsa.W_Q.detach(), lorsa.W_K.detach()):
        assert 0.99 * bound < float(W.abs().max()) <= bound
        assert float(W.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(lorsa.W_Q, lorsa.W_K)
    assert float(lorsa.W_V.detach().var()) == pytest.approx(1 / 512, rel=0.05)
    assert float(lorsa.W_O.detach().var()) == pytest.approx(1 / 64, rel=0.05)
    assert float(lorsa.W_O.detach().abs().max()) > 3.5 / 8  # normal, not uniform
    for bias in (lorsa.b_Q, lorsa.b_K, lorsa.b_V, lorsa.b_D):
        assert bias is not None and not bias.any()
    for w in (lorsa.ln_q.w, lorsa.ln_k.w):
        assert torch.equal(w, torch.ones_like(w))
    assert torch.equal(lorsa.activation_function.log_threshold, torch.full((512,), -1.5))  # type: ignore[arg-type]


def test_the_tie_of_encoder_and_decoder_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match="init_encoder_with_decoder_transpose=True"):
        initialize(lorsa_config(), init_encoder_with_decoder_transpose=True)


def test_biases_from_a_batch() -> None:
    cfg = lorsa_config(norm_activation="dataset-wise")
    batch = contexts(cfg, masked=True)
    lorsa = initialize(
        cfg,
        [batch],
        bias_init_method="geometric_median",
        init_encoder_bias_with_mean_hidden_pre=True,
        grid_search_init_norm=True,
    )
    scaled = lorsa.normalize_activations(batch)
    assert_same(lorsa.b_D, least_distance(valid(scaled[OUT], batch)).float(), 1e-4)  # type: ignore[arg-type]
    h = valid(lorsa.hidden_pre(scaled[IN]), batch).detach()
    assert float(h.mean(0).abs().max()) < 1e-5 * float(h.abs().max())
    norm = lorsa.decoder_norm().detach()
    assert_same(norm, norm[:1].expand(24), SAME)


# -- training ------------------------------------------------------------------------------------------------------


def stream(cfg: LorsaConfig, n: int) -> list[dict[str, Any]]:
    """Contexts whose labels are made by a Lorsa, so that there is something to learn."""
    teacher = random_lorsa(cfg, seed=7)
    batches = [contexts(cfg, masked=True, seed=seed) for seed in range(n)]
    with torch.no_grad():
        for batch in batches:
            batch[OUT] = teacher(batch[IN])
    return batches


def fit(path: Path, cfg: LorsaConfig, batches: list[dict[str, Any]], **settings: Any) -> tuple[Any, dict[str, float]]:
    reports: dict[int, dict[str, float]] = {}

    class Log:
        def log(self, metrics: dict[str, float], step: int) -> None:
            reports[step] = metrics

    wanted: dict[str, Any] = {"total_training_tokens": 20 * 20, "lr": 0.01, "lr_warm_up_steps": 0, "amp_dtype": None,
                              "lr_cool_down_steps": 0, "log_frequency": 1, "auxk_coefficient": 0.1,
                              "dead_threshold": 30, "n_checkpoints": 2, "exp_result_path": str(path)}  # fmt: skip
    jumprelu = cfg.act_fn == "jumprelu"
    lorsa = initialize(cfg, batches, **({"init_log_jumprelu_threshold_value": -2.0} if jumprelu else {}))
    Trainer(TrainerConfig(**(wanted | settings))).fit(lorsa, batches, wandb_logger=Log())
    return lorsa, {step: row["losses/mse_loss"] for step, row in reports.items()}  # type: ignore[return-value]


@pytest.mark.parametrize("variant", ["adjacent", "halves"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_twenty_steps_lower_the_loss_and_a_resumed_run_is_the_same(tmp_path: Path, act_fn: str, variant: str) -> None:
    cfg = lorsa_config(variant, act_fn=act_fn, norm_activation="dataset-wise")
    batches = stream(cfg, 20)
    whole, losses = fit(tmp_path / "whole", cfg, batches)
    values = list(losses.values())
    assert len(values) == 20
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    middle = saved_steps(tmp_path / "whole")[min(saved_steps(tmp_path / "whole"))]
    step = int(middle.name.removeprefix("step_"))
    assert 0 < step < 20
    resumed, rest = fit(tmp_path / "resumed", cfg, batches[step:], from_pretrained_path=str(middle))
    assert list(rest.values()) == values[step:]
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items() if t is not None)
