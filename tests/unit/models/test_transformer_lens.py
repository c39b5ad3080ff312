"""TransformerLens against the Hugging Face backend: the same activations, logits and errors, from the same files."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lm_saes.errors import ConfigError, DataError
from lm_saes.models.attention_weights import attention_weights
from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.huggingface import HuggingFaceLanguageModel
from lm_saes.models.load import load_language_model
from lm_saes.models.transformer_lens import TransformerLensLanguageModel

from ..random_model import CONFIGS, PARALLEL, TOKENS, save

MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
BOTH_READ = ["llama", "gemma2", "gpt2", "gpt_neox", "gpt_neox sequential"]
Backends = tuple[HuggingFaceLanguageModel, TransformerLensLanguageModel]


def config_for(directory: Path, **settings: Any) -> LanguageModelConfig:
    defaults = {"model_name": str(directory), "dtype": torch.float32, "local_files_only": True}
    return LanguageModelConfig(**{**defaults, **settings})


def load(directory: Path, **settings: Any) -> Backends:
    here = load_language_model(config_for(directory, backend="huggingface", **settings))
    lens = load_language_model(config_for(directory, backend="transformer_lens", **settings))
    assert type(here) is HuggingFaceLanguageModel and type(lens) is TransformerLensLanguageModel
    return here, lens


@pytest.fixture(scope="module", params=BOTH_READ)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / request.param
    save(directory, CONFIGS[request.param]())
    return directory


@pytest.fixture(scope="module")
def backends(directory: Path) -> Backends:
    return load(directory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save(directory, CONFIGS["llama"]())
    return directory


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_every_name_of_the_other_backend_gives_the_same_activations(backends: Backends) -> None:
    here, lens = backends
    names = here._hook_points.names
    assert len(names) >= 3 * 7 + 1
    wanted, found = here.activations(TOKENS, names), lens.activations(TOKENS, names)
    assert list(found) == names
    for name in names:
        same(found[name], wanted[name])
        assert found[name].is_contiguous() and not found[name].requires_grad
        assert lens.width(name) == here.width(name)


def test_logits(backends: Backends) -> None:
    here, lens = backends
    wanted, found = here.logits(TOKENS, MASK), lens.logits(TOKENS, MASK)
    same(found, wanted)
    assert not found.requires_grad


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
def test_replacements_reach_the_same_things(backends: Backends) -> None:
    here, lens = backends
    plain = here.logits(TOKENS)
    noise = torch.Generator()

    def disturb(x: Tensor) -> Tensor:
        return x * 0.5 + torch.randn(x.shape, generator=noise.manual_seed(4)).to(x)

    for name in here._hook_points.names:
        wanted, found = (model.logits(TOKENS, replace={name: disturb}) for model in backends)
        assert not torch.allclose(wanted, plain, atol=1e-2), name
        same(found, wanted)
        same(lens.logits(TOKENS, replace={name: lambda x: x.clone()}), plain)


def test_what_a_replacement_may_be(llama: Path) -> None:
    _, lens = load(llama)
    last = "blocks.2.hook_resid_post"
    same(lens.logits(TOKENS, replace={last: lambda x: x.double()}), lens.logits(TOKENS))
    with pytest.raises(ConfigError, match=r"'blocks.1.hook_mlp_out': the replacement has shape \(2, 3, 32\)"):
        lens.logits(TOKENS, replace={"blocks.1.hook_mlp_out": lambda x: x[:, :3]})
    with pytest.raises(ConfigError, match=r"'blocks.7.hook_mlp_out' does not exist"):
        lens.logits(TOKENS, replace={"blocks.7.hook_mlp_out": lambda x: x})


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
def test_the_mlp_is_that_of_the_other_backend(backends: Backends) -> None:
    here, lens = backends
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    for name in ("ln2.hook_normalized", "hook_resid_mid"):
        if f"blocks.1.{name}" in here._hook_points.names:
            points = (f"blocks.1.{name}", "blocks.1.hook_mlp_out")
            same(lens.mlp(1, *points)(x), here.mlp(1, *points)(x))
    after_norm = here._mlp_parts(1).inputs[-1]
    same(
        lens.mlp(1, "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_out")(x),
        here.mlp(1, after_norm, here._mlp_parts(1).outputs[1])(x),
    )
    with pytest.raises(ConfigError, match=r"hook_point_in='blocks.0.ln2.hook_normalized' does not stand in front of"):
        lens.mlp(1, "blocks.0.ln2.hook_normalized", "blocks.1.hook_mlp_out")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_weights_are_shared_and_readable_as_in_the_other_backend(kind: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[kind]())
    here, lens = load(tmp_path)
    wanted, found = attention_weights(here, 1), attention_weights(lens, 1)
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "input_w"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    plain = lens.logits(TOKENS)
    embedding = lens._model.get_input_embeddings().weight
    embedding.mul_(2)
    assert not torch.allclose(lens.logits(TOKENS), plain, atol=1e-2)


def test_forward_stops_at_the_last_hook_point(llama: Path) -> None:
    _, lens = load(llama)
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        calls[name] = 0
        return lambda module, args: calls.update({name: calls[name] + 1})

    block = lens._bridge.blocks[1]
    for name, module in (("mlp", block.mlp), ("next", lens._bridge.blocks[2]), ("unembed", lens._bridge.unembed)):
        module.register_forward_pre_hook(count(name))
    lens.activations(TOKENS, ["blocks.1.hook_resid_mid", "blocks.0.hook_resid_post"])
    assert calls == {"mlp": 0, "next": 0, "unembed": 0}
    lens.activations(TOKENS, ["blocks.1.hook_mlp_out"])
    assert calls == {"mlp": 1, "next": 0, "unembed": 0}


def test_hooks_are_removed(llama: Path) -> None:
    _, lens = load(llama)
    name = "blocks.1.hook_resid_post"
    for _ in range(2):
        lens.activations(TOKENS, [name])
        lens.logits(TOKENS, replace={name: torch.zeros_like})
        lens.mlp(1, "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")(torch.ones(2, 32))
        with pytest.raises(ConfigError):
            lens.logits(TOKENS, replace={name: lambda x: x[:1]})
    assert not any(point.fwd_hooks for point in lens._bridge.hook_dict.values())


def test_names_within_the_mlp_and_the_attention(llama: Path) -> None:
    here, lens = load(llama)
    gate = "model.layers.1.mlp.gate_proj"
    same(lens.activations(TOKENS, ["blocks.1.mlp.hook_pre"])["blocks.1.mlp.hook_pre"],
         here.activations(TOKENS, [gate])[gate])  # fmt: skip
    query = "model.layers.1.self_attn.q_proj"
    same(lens.activations(TOKENS, ["blocks.1.attn.hook_q"])["blocks.1.attn.hook_q"],
         here.activations(TOKENS, [query])[query])  # fmt: skip
    assert lens.width("blocks.1.mlp.hook_pre") == 48


def test_hook_point_errors(llama: Path) -> None:
    _, lens = load(llama)
    lens.check_hook_points(["blocks.0.hook_resid_post", "blocks.2.mlp.hook_post"])
    with pytest.raises(ConfigError, match=r"'blocks.0.resid_post' does not exist .* near names: blocks.0.hook_resid"):
        lens.check_hook_points(["blocks.0.hook_resid_post", "blocks.0.resid_post"])
    with pytest.raises(ConfigError, match=r"use one such as blocks.2.hook_resid_post"):
        lens.check_hook_points(["?"])
    with pytest.raises(ConfigError, match=r"'blocks.0.hook_mlp_in' is switched off"):
        lens.check_hook_points(["blocks.0.hook_mlp_in"])
    with pytest.raises(ConfigError, match=r"'blocks.0.attn.hook_pattern': activations of shape"):
        lens.activations(TOKENS, ["blocks.0.attn.hook_pattern"])
    with pytest.raises(ConfigError, match=r"hook_points is empty"):
        lens.activations(TOKENS, [])
    with pytest.raises(DataError, match=r"pad contexts on the right"):
        lens.activations(TOKENS, ["blocks.0.hook_resid_post"], MASK.flip(1))


def test_parallel_blocks_have_no_resid_mid(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[PARALLEL]())
    with pytest.raises(ConfigError, match=r"'blocks.1.hook_resid_mid' does not exist"):
        load(tmp_path)[1].check_hook_points(["blocks.1.hook_resid_mid"])


def test_half_precision_stays_half_precision(llama: Path) -> None:
    here, lens = load(llama, dtype=torch.bfloat16)
    names = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"]
    wanted, found = here.activations(TOKENS, names), lens.activations(TOKENS, names)
    for name in names:
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name], wanted[name], rtol=0.05, atol=0.05 * float(wanted[name].abs().max()))


def test_tokens_are_those_of_the_other_backend(llama: Path) -> None:
    here, lens = load(llama)
    assert lens.tokenize(["a", "b"]) == here.tokenize(["a", "b"]) == [[2], [3]]
    assert lens.decode_tokens([2, 3]) == here.decode_tokens([2, 3])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "d_model", "n_layers", "vocab_size", "max_length"):
        assert getattr(lens, name) == getattr(here, name)


def test_provenance_and_label(llama: Path) -> None:
    here, lens = load(llama, model_name="some/label", model_from_pretrained_path=str(llama))
    assert lens.provenance() == here.provenance() | {
        "backend": "transformer_lens",
        "transformer_lens": lens.provenance()["transformer_lens"],
    }
    assert lens.provenance()["model_name"] == "some/label"


def test_models_that_transformer_lens_does_not_know(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model: Any = transformers.AutoModelForCausalLM.from_pretrained

    class Unheard(transformers.LlamaForCausalLM):
        pass

    def load_unheard(*args: Any, **options: Any) -> Any:
        model, report = load_model(*args, **options)
        model.__class__ = Unheard
        return model, report

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_unheard)
    with pytest.raises(ConfigError, match=r"cannot run Unheard .*; use backend='huggingface'") as failure:
        load_language_model(config_for(llama, backend="transformer_lens"))
    assert "\n" not in str(failure.value)


def test_a_missing_package_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "transformer_lens"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(
        ConfigError, match=r"needs the package transformer-lens.*pip install 'lm-saes\[transf"
    ) as failure:
        load_language_model(config_for(llama, backend="transformer_lens"))
    assert "\n" not in str(failure.value)


def test_flash_attention_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"use_flash_attn=True: TransformerLens computes attention itself"):
        load_language_model(config_for(llama, backend="transformer_lens", use_flash_attn=True))
