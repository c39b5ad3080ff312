"""The commands from Python, end to end, on a tiny random Llama and a text file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes import (
    EvaluateSAESettings,
    GenerateActivationsSettings,
    SparseAutoEncoder,
    TrainSAESettings,
    evaluate_sae,
    generate_activations,
    train_sae,
)
from lm_saes.config import build
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.runners import evaluate_from_config, generate_from_config, train_from_config
from lm_saes.training.checkpoint import saved_steps

from ...tiny_run import HOOK, KINDS, make_place, reading, training, training_of

FILES = {
    "config.json", "sae_weights.safetensors", "settings.json", "metrics.jsonl", "provenance.json", "evaluation.json",
    "latents.json", "report.html", "manifest.json", "checkpoints",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def train(data: dict[str, Any]) -> SparseAutoEncoder:
    sae = train_sae(build(TrainSAESettings, data))
    assert isinstance(sae, SparseAutoEncoder)
    return sae


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, SparseAutoEncoder]:
    run = place / "trained"
    return run, train(training(place, run))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in row.items() if n not in ("time", "details/tokens_per_second")} for row in lines]


# --- training --------------------------------------------------------------------------------------------------------


def test_a_run_directory_has_every_file(trained: tuple[Path, SparseAutoEncoder], place: Path) -> None:
    run, sae = trained
    assert {path.name for path in run.iterdir()} == FILES
    assert list(saved_steps(run)) == [6, 12]
    assert [row["step"] for row in rows(run)] == [4, 8, 12]
    stored = SparseAutoEncoder.from_pretrained(run, fold_activation_scale=False)
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), sae.parameters(), strict=True))
    assert build(TrainSAESettings, read(run / "settings.json")).to_json() == read(run / "settings.json")
    provenance = read(run / "provenance.json")
    assert {"lm_saes", "torch", "transformers", "model", "data", "tokens", "metrics"} <= set(provenance)
    assert provenance["name"] and "series" in provenance
    assert provenance["tokens"] == 12 * 64 and provenance["model"] and provenance["data"]
    assert "<html" in (run / "report.html").read_text(encoding="utf-8").lower()


def test_the_evaluation_is_of_the_trained_dictionary(trained: tuple[Path, SparseAutoEncoder], place: Path) -> None:
    run, _ = trained
    evaluation = read(run / "evaluation.json")
    names = ("loss_original", "loss_reconstructed", "loss_ablated", "loss_ratio", "loss_recovered", "kl")
    downstream = {f"metrics/downstream_{name}" for name in names}
    assert downstream | {"metrics/explained_variance", "metrics/l0"} <= set(evaluation)
    assert evaluation["metrics/l0"] == pytest.approx(4, abs=0.5)
    # the last row has the same evaluation, under eval/ where training has the name already
    last = rows(run)[-1]
    assert (
        last["eval/explained_variance"]
        == evaluation["metrics/explained_variance"]
        != last["metrics/explained_variance"]
    )
    assert last["metrics/downstream_kl"] == evaluation["metrics/downstream_kl"]
    again = evaluate_sae(EvaluateSAESettings(sae=run))
    numbers = {name: evaluation[name] for name in again}
    assert again == pytest.approx(numbers, rel=1e-4)  # folded weights round differently


def test_a_run_is_not_overwritten(trained: tuple[Path, SparseAutoEncoder], place: Path) -> None:
    run, _ = trained
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"trainer.exp_result_path='.*trained': holds a run already; .*resume"):
        train(training(place, run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(place: Path, tmp_path: Path, act_fn: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data: dict[str, Any] = training(place, tmp_path / name, steps=6) | {"seed": seed}
        data["sae"]["act_fn"] = act_fn
        del data["eval"]
        torch.manual_seed(len(name) + seed)
        train(data)
    a, b, c = (load_file(tmp_path / name / "sae_weights.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a) and rows(tmp_path / "a") == rows(tmp_path / "b")
    assert not torch.equal(a["W_E"], c["W_E"]) and rows(tmp_path / "a") != rows(tmp_path / "c")


def test_a_run_that_failed_is_resumed_bit_for_bit(
    trained: tuple[Path, SparseAutoEncoder], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = trained
    with monkeypatch.context() as patch:
        patch.setattr("lm_saes.runs.evaluate.HeldOut.__call__", lambda self, sae: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(training(place, tmp_path, eval_frequency=9))
    assert list(saved_steps(tmp_path)) == [6] and [row["step"] for row in rows(tmp_path)] == [4, 8]
    train(training(place, tmp_path) | {"resume": True})
    one, two = load_file(whole / "sae_weights.safetensors"), load_file(tmp_path / "sae_weights.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(tmp_path) == rows(whole)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_text_that_is_too_short_ends_early_and_is_evaluated_as_it_is_then(place: Path, tmp_path: Path) -> None:
    train(training(place, tmp_path, steps=1000, eval_frequency=5))
    (last, *_) = reversed(list(saved_steps(tmp_path)))
    assert 12 < last < 1000 and last % 5 != 0
    evaluated = [row["eval/explained_variance"] for row in rows(tmp_path) if "eval/explained_variance" in row]
    evaluation = read(tmp_path / "evaluation.json")["metrics/explained_variance"]
    assert evaluation != evaluated[-1]  # which was of the weights some steps before
    again = evaluate_sae(EvaluateSAESettings(sae=tmp_path))["metrics/explained_variance"]
    assert evaluation == pytest.approx(again, rel=1e-4)


def test_resuming_what_is_not_there(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        train(training(place, tmp_path) | {"resume": True})


def test_held_out_documents_are_evaluated_on_and_not_trained_on(place: Path, tmp_path: Path) -> None:
    # every fifth document is held out, and only those say "word3 word3 ..."
    lines = (place / "text.txt").read_text().splitlines()
    apart = [
        " ".join(["word3"] * 12) if i % 5 == 4 else line.replace("word3 ", "word4 ") for i, line in enumerate(lines)
    ]
    (tmp_path / "text.txt").write_text("\n".join(apart) + "\n")
    data = training(place, tmp_path / "run", steps=1000)
    data["datasets"]["words"]["dataset_name_or_path"] = str(tmp_path / "text.txt")
    train(data)
    # 96 of 120 documents of 12 words; BOS tokens do not count, and less than a batch is left over
    assert 96 * 12 - 64 <= read(tmp_path / "run" / "provenance.json")["tokens"] <= 96 * 12
    snippets = re.findall(r"word\d+", (tmp_path / "run" / "latents.json").read_text())
    assert set(snippets) == {"word3"}


def test_a_transcoder_of_an_mlp(place: Path, tmp_path: Path) -> None:
    hooks = ["blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"]
    data = training(place, tmp_path, steps=8) | {"activation_factory": reading(place, hooks)["activation_factory"]}
    data["sae"] |= {"hook_point_in": hooks[0], "hook_point_out": hooks[1]}
    sae = train(data)
    assert sae.cfg.associated_hook_points == hooks
    assert sae.dataset_average_activation_norm is not None and set(sae.dataset_average_activation_norm) == set(hooks)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    evaluation = read(tmp_path / "evaluation.json")
    assert evaluation["metrics/downstream_loss_ablated"] != evaluation["metrics/downstream_loss_original"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_can_be_repeated_from_the_settings_that_it_saved(place: Path, tmp_path: Path, kind: str) -> None:
    train_from_config(training_of(kind, place, tmp_path / "first"))
    saved = read(tmp_path / "first" / "settings.json")
    saved["trainer"]["exp_result_path"] = str(tmp_path / "again")
    train_from_config(saved)
    one, two = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("first", "again"))
    assert one and all(torch.equal(one[name], two[name]) for name in one)
    again = read(tmp_path / "again" / "settings.json")
    assert again == saved


def test_a_start_that_does_not_fit_the_kind_is_told_before_anything_is_loaded_or_written(tmp_path: Path) -> None:
    data = training_of("molt", tmp_path / "no model here", tmp_path / "run")
    data["initializer"] = {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 2}
    message = r"^initialize_W_D_with_active_subspace=True has no effect: .*'molt' has no one decoder matrix; remove it$"
    with pytest.raises(ConfigError, match=message):
        train_from_config(data)
    assert not (tmp_path / "run").exists()


# --- generating ------------------------------------------------------------------------------------------------------


def test_activations_are_kept_and_trained_on(place: Path, tmp_path: Path) -> None:
    data = reading(place, [HOOK]) | {
        "writer": {"cache_dir": str(tmp_path / "cache"), "hook_points": [HOOK], "total_generating_tokens": 400}
    }
    data["activation_factory"] |= {"target": "activations-2d", "batch_size": 4}
    del data["activation_factory"]["buffer_size"]
    cache = generate_activations(build(GenerateActivationsSettings, data))
    assert cache == tmp_path / "cache" and (cache / "index.json").exists()
    assert generate_from_config(data) == cache  # the same settings: kept as it is

    run = training(place, tmp_path / "run", steps=10)
    del run["model"], run["datasets"], run["eval"]
    run["activation_factory"] = {
        "sources": [{"type": "activations", "path": str(cache), "epochs": 3}], "target": "activations-1d",
        "hook_points": [HOOK], "batch_size": 64,
    }  # fmt: skip
    assert train_from_config(run) == tmp_path / "run" / "report.html"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES - {"evaluation.json", "latents.json"}
    with pytest.raises(ConfigError, match="eval: needs a language model"):
        evaluate_from_config({"sae": str(tmp_path / "run")})


def test_evaluating_a_dictionary_with_settings_of_ones_own(
    trained: tuple[Path, SparseAutoEncoder], place: Path, tmp_path: Path
) -> None:
    trained[1].save_pretrained(tmp_path)
    data = training(place, tmp_path)
    given = {"sae": str(tmp_path), "model": data["model"], "datasets": data["datasets"], "eval": data["eval"]}
    again = evaluate_from_config(given)
    evaluation = read(trained[0] / "evaluation.json")
    assert again == pytest.approx({name: evaluation[name] for name in again}, rel=1e-4)
    assert not (tmp_path / "report.html").exists()  # not a run: nothing is added to it


# --- mistakes --------------------------------------------------------------------------------------------------------


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"trainer": {"learning_rate": 1.0}}, r"trainer: unknown key 'learning_rate' in TrainerConfig"),
    ({"trainer": {"total_training_token": 1}}, r"did you mean 'total_training_tokens'"),
    ({"trainer": {"lr": -1.0}}, r"trainer: lr=-1.0: must not be negative"),
    ({"trainer": {"lr_warm_up_steps": 1.5}}, r"lr_warm_up_steps=1.5: give a fraction"),
    ({"trainer": {"clip_grad_norm": "much"}}, r"trainer.clip_grad_norm: .*number.*'much'"),
    (
        {"trainer": {"sparsity_loss_type": "l7"}},
        r"sparsity_loss_type='l7': not a sparsity loss; use one of power, tanh",
    ),
    ({"trainer": {"total_training_tokens": 0}}, r"trainer.total_training_tokens: must be greater than 0 \(got 0\)"),
    ({"sae": {"top_k": 65}}, r"sae: act_fn='topk': top_k=65 exceeds the 64 latents available"),
    ({"sae": {"act_fn": "gelu"}}, r"sae: act_fn='gelu' is not an activation function here; use one of"),
    ({"sae": {"jumprelu_threshold_window": 1.0}}, r"sae: jumprelu_threshold_window=1.0 has no effect"),
    (
        {"sae": {"hook_point_in": "blocks.1.hook_mlp_out"}},
        r"hook_points: the dictionary also needs \['blocks.1.hook_mlp_out'",
    ),
    ({"activation_factory": {"target": "tokens"}}, r"activation_factory"),
    ({"activation_factory": {"context_size": None}}, r"activation_factory: context_size is missing"),
    ({"datasets": {"words": {"held_out_fraction": 0.0}}}, r"eval: no dataset keeps documents apart; set datasets"),
    ({"model": None}, r"model: missing; a source of type 'dataset' is read by a language model"),
    (
        {"data_parallel_size": 65},
        r"data_parallel_size=65: more processes than the 64 rows of activation_factory.batch_size",
    ),
    ({"loggers": ["email"]}, r"loggers.0: must be 'console' or 'tensorboard' \(got 'email'\)"),
    ({"device_type": "tpu"}, r"device_type: must be 'cpu' or 'cuda' \(got 'tpu'\)"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = training(tmp_path, tmp_path / "run")
    for key, value in change.items():
        if key == "datasets":
            data["datasets"]["words"] |= value["words"]
        else:
            data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message) as caught:
        build(TrainSAESettings, data)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_is_not_described(place: Path, tmp_path: Path) -> None:
    data = training(place, tmp_path / "run")
    data["activation_factory"]["sources"][0]["name"] = "others"
    with pytest.raises(ConfigError, match=r"sources.0.name='others': no dataset .*; datasets has \['words'\]"):
        train(data)


def test_a_kind_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sae.sae_type='vae': not a dictionary kind; use one of"):
        train_from_config({"sae": {"sae_type": "vae"}})
