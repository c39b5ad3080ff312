"""What the model loses: identity recovers all, zeros nothing, anything else as a plain loop finds."""

import math
from typing import cast

import pytest
import torch

from lm_saes import SparseAutoEncoder
from lm_saes.data.batch import Batch
from lm_saes.evaluation.downstream import DownstreamLoss
from lm_saes.evaluation.evaluator import EvalConfig, Evaluator, numbers
from lm_saes.evaluation.examples import LatentExample
from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.load import load_language_model

from ...tiny_run import make_place
from .by_hand import HOOK, dictionary, identity

SAME_AS_HOOK = "blocks.1.hook_resid_pre"


@torch.no_grad()
def measure(sae: SparseAutoEncoder, model: LanguageModel, contexts: Batch) -> DownstreamLoss:
    downstream = DownstreamLoss(sae.eval(), model)
    downstream.add(contexts["tokens"], contexts["mask"])
    return downstream


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A random Llama of two layers with a tokenizer of a few words."""
    place = make_place(tmp_path_factory.mktemp("tiny-llama"))
    return load_language_model(
        LanguageModelConfig(model_name=str(place / "model"), dtype=torch.float32, local_files_only=True)
    )


@pytest.fixture(scope="module")
def contexts(model: LanguageModel) -> Batch:
    tokens = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.bos_token_id
    mask = tokens != model.bos_token_id
    mask[1, 5:] = False  # padding
    mask[2, 4] = False  # a token that is ignored
    mask[3] = False
    mask[3, 8] = True  # a lone valid token: nothing to predict
    return {**model.activations(tokens, [HOOK, SAME_AS_HOOK]), "tokens": tokens, "mask": mask}


@pytest.mark.parametrize("hook_out", [HOOK, SAME_AS_HOOK])
def test_identity_recovers_all_of_the_loss(model: LanguageModel, contexts: Batch, hook_out: str):
    result = measure(identity(16, hook_out), model, contexts).metrics()
    assert result["metrics/downstream_loss_recovered"] == 1.0
    assert result["metrics/downstream_loss_ratio"] == 1.0
    assert result["metrics/downstream_kl"] == 0.0
    assert result["metrics/downstream_loss_ablated"] != result["metrics/downstream_loss_original"]


def test_zeros_recover_nothing(model: LanguageModel, contexts: Batch):
    result = measure(dictionary(torch.zeros(16, 32), torch.zeros(32, 16)), model, contexts).metrics()
    assert result["metrics/downstream_loss_recovered"] == 0.0
    assert math.isnan(result["metrics/downstream_loss_ratio"])
    assert result["metrics/downstream_kl"] > 0.01


@pytest.mark.parametrize("tokens_per_forward", [1, 1024])
def test_downstream_losses_equal_a_plain_loop(
    model: LanguageModel, contexts: Batch, tokens_per_forward: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lm_saes.machine.TOKENS_PER_FORWARD", tokens_per_forward)
    g = torch.Generator().manual_seed(2)
    sae = dictionary(torch.randn(16, 32, generator=g), 0.1 * torch.randn(32, 16, generator=g))
    downstream = measure(sae, model, contexts)

    sums = {"original": 0.0, "reconstructed": 0.0, "ablated": 0.0, "kl": 0.0}
    n = 0
    for tokens, mask, x in zip(contexts["tokens"], contexts["mask"], contexts[HOOK], strict=True):
        y_hat, zeroed = x.clone(), x.clone()
        for t in range(9):
            if mask[t]:
                y_hat[t] = (x[t] @ sae.W_E).relu() @ sae.W_D
                zeroed[t] = 0
        log_p, log_q, log_zero = (
            model.logits(tokens[None], replace={HOOK: lambda _, new=new: new[None]})[0].log_softmax(-1)
            for new in (x, y_hat, zeroed)
        )
        for t in range(8):
            if mask[t] and mask[t + 1]:
                n += 1
                sums["original"] -= log_p[t, tokens[t + 1]].item()
                sums["reconstructed"] -= log_q[t, tokens[t + 1]].item()
                sums["ablated"] -= log_zero[t, tokens[t + 1]].item()
                sums["kl"] += (log_p[t].exp() * (log_p[t] - log_q[t])).sum().item()
    original, reconstructed, ablated = (sums[name] / n for name in ("original", "reconstructed", "ablated"))
    # Context 0 has 7 pairs of valid neighbours, context 1 has 3, context 2 (gap at 4) 2 + 3.
    assert downstream.n_positions == n == 7 + 3 + 5
    assert downstream.metrics() == pytest.approx(
        {
            "metrics/downstream_loss_original": original,
            "metrics/downstream_loss_reconstructed": reconstructed,
            "metrics/downstream_loss_ablated": ablated,
            "metrics/downstream_loss_ratio": (ablated - original) / (ablated - reconstructed),
            "metrics/downstream_loss_recovered": (ablated - reconstructed) / (ablated - original),
            "metrics/downstream_kl": sums["kl"] / n,
        },
        rel=1e-4,  # float32 log-softmax sums in another order
    )


def test_nothing_to_predict_gives_nan(model: LanguageModel, contexts: Batch):
    downstream = DownstreamLoss(identity(16).eval(), model)
    downstream.add(contexts["tokens"][3:], contexts["mask"][3:])
    assert all(math.isnan(value) for value in downstream.metrics().values())


def test_the_evaluator_measures_its_first_tokens(model: LanguageModel, contexts: Batch):
    sae = dictionary(torch.eye(16), torch.eye(16)).eval()
    whole = Evaluator(EvalConfig()).evaluate(sae, [contexts], model)
    assert whole["details/n_downstream_positions"] == 7 + 3 + 5
    assert numbers(whole).items() >= measure(sae, model, contexts).metrics().items()
    off = Evaluator(EvalConfig(downstream_tokens=0)).evaluate(sae, [contexts], model)
    assert "metrics/downstream_kl" not in off
    assert "metrics/downstream_kl" not in Evaluator(EvalConfig()).evaluate(sae, [contexts])
    for size in (1, 4):
        stream = [{name: value[i : i + size] for name, value in contexts.items()} for i in range(0, 4, size)]
        part = Evaluator(EvalConfig(downstream_tokens=10)).evaluate(sae, stream, model)
        # Ten valid tokens: the eight of context 0, then two of context 1, which make one pair.
        assert part["details/n_downstream_positions"] == 7 + 1
        assert part["details/n_evaluated_tokens"] == contexts["mask"].sum()


def test_snippets_hold_the_text_of_tokens(model: LanguageModel, contexts: Batch):
    cfg = EvalConfig(n_latents=1, n_snippets=1, snippet_context=20)
    result = Evaluator(cfg).evaluate(identity(16).eval(), [contexts], model)
    snippet = cast(list[LatentExample], result["latents"])[0]["snippets"][0]
    up_to_last_valid = zip(contexts["tokens"], [9, 5, 9, 9], strict=True)
    assert snippet["tokens"] in [model.decode_tokens(row[:n].tolist()) for row, n in up_to_last_valid]
