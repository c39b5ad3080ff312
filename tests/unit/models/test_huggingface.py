"""A tiny Llama with a tokenizer, saved to disk and loaded through the public way."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lm_saes import machine
from lm_saes.errors import ConfigError, DataError
from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.huggingface import HuggingFaceLanguageModel
from lm_saes.models.load import load_language_model

TEXTS = ["the cat sat on the mat", "a dog: naïve, 日本 and 🙂", "the dog saw\nthe cat"]
TOKENS = torch.randint(3, 100, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 1 + [0] * 7])


def save_tokenizer(directory: Path, kind: str = "byte-level", **special: str) -> Any:
    if kind == "byte-level":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        raw = Tokenizer(models.BPE(byte_fallback=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            limit_alphabet=20,
        )
    raw.train_from_iterator(TEXTS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_model(directory: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory)
    save_tokenizer(directory, bos_token="<s>", eos_token="</s>")
    return directory


def config_for(directory: Path, **settings: Any) -> LanguageModelConfig:
    return LanguageModelConfig(**{"model_name": str(directory), "dtype": torch.float32, **settings})


@pytest.fixture(scope="module")
def model(directory: Path) -> HuggingFaceLanguageModel:
    model = load_language_model(config_for(directory))
    assert isinstance(model, HuggingFaceLanguageModel)
    return model


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    )


def count_calls(model: HuggingFaceLanguageModel, path: str) -> list[int]:
    calls: list[int] = []
    model._model.get_submodule(path).register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def test_sizes(model: HuggingFaceLanguageModel) -> None:
    assert (model.d_model, model.n_layers, model.vocab_size) == (32, 3, 600)
    assert model.max_length == 64  # the model's own limit is below the default 2048
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model._model.config._attn_implementation == "sdpa"


def test_activations_are_the_hidden_states(model: HuggingFaceLanguageModel, reference: Any) -> None:
    names = ["blocks.2.hook_resid_pre", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "model.layers.1.mlp"]
    found = model.activations(TOKENS, names)
    hidden = reference(TOKENS, output_hidden_states=True).hidden_states
    assert list(found) == names
    torch.testing.assert_close(found["blocks.0.hook_resid_pre"], hidden[0])
    torch.testing.assert_close(found["blocks.1.hook_resid_post"], hidden[2])
    torch.testing.assert_close(found["blocks.2.hook_resid_pre"], hidden[2])
    mlp = model.activations(TOKENS, ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"]
    assert torch.equal(found["model.layers.1.mlp"], mlp)


def test_activations_are_ordinary_tensors_of_their_own(model: HuggingFaceLanguageModel) -> None:
    names = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"]  # one and the same tensor within the model
    post, pre = model.activations(TOKENS, names).values()
    assert torch.equal(post, pre)
    post.zero_()
    assert pre.abs().sum() > 0
    weight = torch.ones(32, requires_grad=True)
    (pre * weight).sum().backward()
    assert weight.grad is not None and not pre.requires_grad


def test_modules_that_work_in_place_do_not_spoil_activations(model: HuggingFaceLanguageModel) -> None:
    want = model.activations(TOKENS, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]

    def double_in_place(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].mul_(2)

    with model._model.model.layers[2].register_forward_pre_hook(double_in_place):
        found = model.activations(TOKENS, ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"])
    torch.testing.assert_close(found["blocks.1.hook_resid_post"], want)


def test_forward_stops_at_the_last_hook_point(directory: Path) -> None:
    model = HuggingFaceLanguageModel(config_for(directory))
    later = {
        path: count_calls(model, path) for path in ("model.layers.1.mlp", "model.layers.2", "model.norm", "lm_head")
    }
    model.activations(TOKENS, ["blocks.1.hook_resid_mid", "blocks.0.hook_resid_post"])
    assert not any(later.values())
    model.activations(TOKENS, ["blocks.2.hook_resid_post"])
    assert {path: len(calls) for path, calls in later.items()} == {
        "model.layers.1.mlp": 1,
        "model.layers.2": 1,
        "model.norm": 0,
        "lm_head": 0,
    }


def test_hooks_are_removed(model: HuggingFaceLanguageModel) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model._model.modules())

    before = hooks()
    model.activations(TOKENS, ["blocks.1.ln2.hook_normalized", "blocks.1.hook_resid_mid"])
    model.logits(TOKENS, replace={"blocks.1.hook_resid_mid": torch.zeros_like})
    for broken in (
        ["blocks.1.hook_resid_post", "blocks.9.hook_resid_post"],
        ["blocks.0.hook_resid_post", "model.layers"],
    ):
        with pytest.raises(ConfigError):
            model.activations(TOKENS, broken)
    assert hooks() == before


def test_right_padding_changes_no_valid_position(model: HuggingFaceLanguageModel, reference: Any) -> None:
    name = "blocks.2.hook_resid_post"
    padded = torch.where(MASK.bool(), TOKENS, model.pad_token_id)
    found = model.activations(padded, [name], MASK)[name]
    logits = model.logits(padded, MASK)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = model.activations(TOKENS[row : row + 1, :length], [name])[name]
        torch.testing.assert_close(found[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)
    masked = reference(padded, attention_mask=MASK).logits
    torch.testing.assert_close(logits[MASK.bool()], masked[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_logits_and_replacements(model: HuggingFaceLanguageModel, reference: Any) -> None:
    plain = model.logits(TOKENS)
    torch.testing.assert_close(plain, reference(TOKENS).logits)
    last = "blocks.2.hook_resid_post"
    assert torch.equal(model.logits(TOKENS, replace={last: lambda x: x.clone(), "hook_embed": lambda x: x}), plain)
    zeros = model.logits(TOKENS, replace={last: torch.zeros_like})
    torch.testing.assert_close(zeros, torch.zeros_like(zeros))  # without biases nothing is left
    doubled = model.logits(TOKENS, replace={"model.layers.1": lambda x: 2 * x})
    hidden = reference(TOKENS, output_hidden_states=True).hidden_states
    inner = reference.model
    position = inner.rotary_emb(hidden[2], torch.arange(8)[None])
    by_hand = reference.lm_head(inner.norm(inner.layers[2](2 * hidden[2], position_embeddings=position)))
    torch.testing.assert_close(doubled, by_hand)


def test_width(model: HuggingFaceLanguageModel) -> None:
    assert model.width("blocks.0.hook_resid_post") == 32
    assert model.width("blocks.0.attn.hook_z") == 32
    assert model.width("model.layers.2.mlp.up_proj") == 48
    assert model.width("lm_head") == 600


def test_hook_point_errors(model: HuggingFaceLanguageModel) -> None:
    model.check_hook_points(["blocks.0.hook_resid_post", "model.layers.2.mlp"])
    with pytest.raises(ConfigError, match=r"near names: blocks.0.hook_resid_post"):
        model.check_hook_points(["blocks.0.hook_resid_post", "blocks.0.resid_post"])
    with pytest.raises(ConfigError, match=r"hook_points is empty"):
        model.activations(TOKENS, [])
    with pytest.raises(ConfigError, match=r"'model.rotary_emb': activations of shape"):
        model.activations(TOKENS, ["model.rotary_emb"])
    with pytest.raises(ConfigError, match=r"hook point model.layers: the module does not run"):
        model.activations(TOKENS, ["blocks.0.hook_resid_pre", "model.layers"])
    with pytest.raises(ConfigError, match=r"returns BaseModelOutputWithPast, not a tensor"):
        model.activations(TOKENS, ["model"])


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (TOKENS[0], None, r"must be int64 \[batch, seq\]"),
        (TOKENS.float(), None, "must be int64"),
        (TOKENS[:0], None, "not empty"),
        (TOKENS + 599, None, r"has 0 to 599"),
        (-TOKENS, None, r"has 0 to 599"),
        (TOKENS.repeat(1, 9), None, "72 tokens a context exceed the 64"),
        (TOKENS, MASK[:, 1:], r"must be that of tokens, \(3, 8\)"),
        (TOKENS, MASK.flip(1), "pad contexts on the right"),
        (TOKENS, torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).repeat(3, 1), "pad contexts on the right"),
        (TOKENS, torch.zeros(3, 8), "pad contexts on the right"),
    ],
)
def test_wrong_input(model: HuggingFaceLanguageModel, tokens: torch.Tensor, mask: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.activations(tokens, ["blocks.0.hook_resid_post"], mask)
    with pytest.raises(DataError, match=message):
        model.logits(tokens, mask)


def test_tokenize_adds_nothing(model: HuggingFaceLanguageModel) -> None:
    ids = model.tokenize(TEXTS)
    assert len(ids) == 3 and all(isinstance(token, int) and token > 1 for text in ids for token in text)
    assert model.tokenize([]) == []


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_decoded_tokens_join_to_the_text(kind: str, directory: Path, tmp_path: Path) -> None:
    save_model(tmp_path)
    save_tokenizer(tmp_path, kind, bos_token="<s>", eos_token="</s>")
    model = HuggingFaceLanguageModel(config_for(tmp_path))
    text = "the cat\nsaw 🙂🙂, 日本 naïve dog"
    text = text if kind == "byte-level" else text.replace("\n", " ")
    ids = model.tokenize([text])[0]
    pieces = model.decode_tokens(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert any(piece.startswith(" ") for piece in pieces) and "🙂" in "".join(pieces)
    assert model.decode_tokens([model.bos_token_id, *ids])[0] == "<s>"
    assert model.decode_tokens([]) == []


def test_parts_of_characters_do_not_break_decoding(model: HuggingFaceLanguageModel) -> None:
    letter = model.tokenize(["𐍈"])[0]
    the = model.tokenize(["the cat"])[0]
    assert len(letter) == 4
    assert model.decode_tokens(letter) == ["", "", "", "𐍈"]
    assert "".join(model.decode_tokens(letter[2:] + the)).endswith("the cat")
    assert "".join(model.decode_tokens(the + letter[:2])).startswith("the cat")
    assert model.decode_tokens(letter[:1]) == ["\ufffd"]
    many = model.decode_tokens(letter[1:2] * 9 + the)
    assert len(many) == 9 + len(the) and "".join(many).endswith("the cat")
    assert many[:5] == ["", "", "", "\ufffd" * 4, ""]  # bytes that no character needs are not held back for ever


def test_special_tokens(directory: Path, tmp_path: Path) -> None:
    model = HuggingFaceLanguageModel(config_for(directory))
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (0, 1, 1)  # 0 is a token, not "none"
    model = HuggingFaceLanguageModel(config_for(directory, bos_token_id=7, eos_token_id=0))
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (7, 0, 0)
    model = HuggingFaceLanguageModel(config_for(directory, bos_token_id=0, pad_token_id=0, eos_token_id=5))
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (0, 5, 0)
    with pytest.raises(ConfigError, match=r"bos_token_id=600 is not a token .* set it to 0 to 599"):
        HuggingFaceLanguageModel(config_for(directory, bos_token_id=600))

    save_model(tmp_path)
    save_tokenizer(tmp_path, eos_token="</s>")
    model = HuggingFaceLanguageModel(config_for(tmp_path))
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (1, 1, 1)
    tokenizer = save_tokenizer(tmp_path, eos_token="</s>")
    tokenizer.add_tokens([f"<{i}>" for i in range(600)])
    tokenizer.pad_token = "<599>"  # an id that the model has no embedding for
    tokenizer.save_pretrained(tmp_path)
    model = HuggingFaceLanguageModel(config_for(tmp_path))
    assert tokenizer.pad_token_id >= 600 and model.pad_token_id == 1
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"has neither BOS nor EOS; set bos_token_id"):
        HuggingFaceLanguageModel(config_for(tmp_path))
    model = HuggingFaceLanguageModel(config_for(tmp_path, bos_token_id=4))
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (4, None, 0)


def test_dtype(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capability, dtype in (({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capability=capability: capability)
        assert machine.automatic_dtype(cpu) == dtype
        model = HuggingFaceLanguageModel(config_for(directory, dtype=None))
        assert model.dtype == dtype
        assert (
            model.activations(TOKENS, ["blocks.1.ln1.hook_normalized"])["blocks.1.ln1.hook_normalized"].dtype == dtype
        )


def test_provenance(directory: Path, model: HuggingFaceLanguageModel) -> None:
    provenance = model.provenance()
    assert provenance["sha256"] == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["model_name"] == str(directory) and provenance["dtype"] == "float32"
    assert provenance["transformers"] == transformers.__version__


def test_path_is_loaded_instead_of_the_name(directory: Path) -> None:
    cfg = LanguageModelConfig(model_name="some/label", model_from_pretrained_path=str(directory), dtype=torch.float32)
    model = load_language_model(cfg)
    assert model.provenance()["model_name"] == "some/label" and model.provenance()["path"] == str(directory)


def test_what_cannot_be_loaded_is_one_line(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'nobody/nothing': the tokenizer cannot be loaded .*local_files_only"
    ) as failure:
        load_language_model(
            LanguageModelConfig(model_name="nobody/nothing", local_files_only=True, cache_dir=str(tmp_path))
        )
    assert "\n" not in str(failure.value)
    save_tokenizer(tmp_path, eos_token="</s>")
    with pytest.raises(ConfigError, match=r"the model cannot be loaded"):
        load_language_model(config_for(tmp_path))
    with pytest.raises(ConfigError, match=r"check the directory and gguf_file"):
        load_language_model(config_for(directory, gguf_file="none.gguf"))
    with pytest.raises(ConfigError, match=r"device='tpu9' is not available here"):
        load_language_model(config_for(directory, device="tpu9"))
    with pytest.raises(ConfigError, match=r"use_flash_attn=True needs a CUDA device"):
        load_language_model(config_for(directory, use_flash_attn=True))


def test_missing_weights_are_refused_not_invented(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path)
    save_tokenizer(tmp_path, eos_token="</s>")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"1 weights are missing from the files, first 'model.layers.1.mlp.up_proj.weight'"
    ):
        load_language_model(config_for(tmp_path))
