"""The settings of a stream, and that its rows are the model's activations."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from lm_saes.config import build
from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.factory import ActivationFactory
from lm_saes.data.factory_config import ActivationFactoryConfig
from lm_saes.data.stream import ActivationStream
from lm_saes.data.text import TextDataset
from lm_saes.data.writer import ActivationWriter, ActivationWriterConfig
from lm_saes.errors import ConfigError
from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.load import load_language_model

Counting = Callable[..., TextDataset]
DATASET = {"type": "dataset", "name": "n"}


def config(**settings: Any) -> ActivationFactoryConfig:
    defaults: dict[str, Any] = {
        "sources": [DATASET],
        "target": "activations-1d",
        "hook_points": ["a"],
        "batch_size": 6,
        "context_size": 8,
        "model_batch_size": 3,
        "num_workers": 0,
    }
    return build(ActivationFactoryConfig, {k: v for k, v in {**defaults, **settings}.items() if v is not None})


def stream_of(model: LanguageModel, dataset: TextDataset, seed: int = 0, **settings: Any) -> ActivationStream:
    return ActivationFactory(config(**settings), seed).process(model, {"n": dataset})


def write_cache(path: Path, tokens: range, dtype: str = "float32", context: int | None = None) -> Path:
    flat = torch.tensor(list(tokens))
    shape = (-1, context) if context else (-1,)
    x = flat[:, None] + torch.zeros(4)
    batch: Batch = {"tokens": flat.reshape(shape), "a": x.reshape(*shape, 4)}
    cfg = ActivationWriterConfig.model_validate(
        {"cache_dir": path, "hook_points": ["a"], "dtype": dtype, "n_samples_per_chunk": 16}
    )
    return ActivationWriter(cfg).process([batch])


def cached(path: Path, **settings: Any) -> dict[str, Any]:
    return {"type": "activations", "path": str(path), **settings}


def only_cached(*sources: dict[str, Any], **settings: Any) -> ActivationFactoryConfig:
    return config(**{"sources": list(sources), "context_size": None, "model_batch_size": None, **settings})


def tokens_of(stream: ActivationStream) -> list[int]:
    return [token for batch in stream for token in batch["tokens"].flatten().tolist()]


def test_single_tokens_are_those_that_count_with_their_activations(make_model: Any, counting: Counting) -> None:
    model = make_model()
    batches = list(stream_of(model, counting(6, 10), hook_points=["a", "b"]))
    # 60 tokens, a BOS before each of 6 documents (one of them where a context starts anyway), cut by 7.
    assert [batch["tokens"].tolist() for batch in batches[:2]] == [list(range(10, 16)), list(range(16, 22))]
    assert torch.cat([batch["tokens"] for batch in batches]).tolist() == list(range(10, 70))
    first = batches[0]
    assert set(first) == {"tokens", "a", "b"}
    assert (first["a"].dtype, first["b"].shape) == (torch.float32, (6, 2))
    # Token 10 is at position 1 of its context, 17 at position 1 of the next one.
    torch.testing.assert_close(first["a"][:, 0], torch.tensor([10.01, 11.02, 12.03, 13.04, 14.05, 15.06]))
    torch.testing.assert_close(batches[1]["a"][:3, 3], torch.tensor([16.07, 17.01, 18.02]))
    check_batch(first, {"a": 4, "b": 2})
    assert [tokens.shape for tokens, _ in model.calls] == [(3, 8), (3, 8), (3, 8)]


def test_attention_is_masked_only_where_there_is_padding(make_model: Any, counting: Counting) -> None:
    model = make_model()
    list(stream_of(model, counting(2, 9), model_batch_size=2))  # 10 .. 16 | 17 18 BOS 19 .. 22 | 23 .. 27 and padding
    (_, first), (_, second) = model.calls
    assert first is None
    assert second.int().tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    padded = make_model()
    list(stream_of(padded, counting(2, 3), sources=[DATASET | {"pack": False}], model_batch_size=2, batch_size=2))
    assert padded.calls[0][1].int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2


def test_shuffling_loses_nothing_and_gives_nothing_twice(number_model: LanguageModel, counting: Counting) -> None:
    plain = list(stream_of(number_model, counting(12, 9), hook_points=["a", "b"]))
    mixed = list(stream_of(number_model, counting(12, 9), hook_points=["a", "b"], buffer_size=24))

    def rows(batches: list[Batch]) -> Counter[tuple[float, ...]]:
        return Counter(
            tuple(row) for batch in batches for row in torch.cat([batch["tokens"][:, None], batch["a"]], 1).tolist()
        )

    assert rows(mixed) == rows(plain)
    assert sum(rows(plain).values()) == 108
    order = [token for batch in mixed for token in batch["tokens"].tolist()]
    assert order != sorted(order)
    assert all(torch.equal(batch["a"][:, 0], batch["b"][:, 1]) for batch in mixed)


def test_seeds_fix_the_order(number_model: LanguageModel, counting: Counting) -> None:
    def order(seed: int, perm_seed: int | None = None, device: str | None = None) -> list[int]:
        shuffle = {"perm_seed": perm_seed, "generator_device": device}
        return tokens_of(stream_of(number_model, counting(12, 9), seed, buffer_size=24, buffer_shuffle=shuffle))

    assert order(0) == order(0) == order(0, device="cpu")
    assert order(0) != order(1)
    assert order(0, perm_seed=7) == order(1, perm_seed=7) != order(0)


def test_contexts_come_with_masks_and_origins(number_model: LanguageModel, counting: Counting) -> None:
    batches = list(stream_of(number_model, counting(5, 7), target="activations-2d", batch_size=3, model_batch_size=2))
    assert [batch["a"].shape for batch in batches] == [(3, 8, 4), (2, 8, 4)]
    first = batches[0]
    assert first["tokens"][1].tolist() == [1, *range(17, 24)]
    assert first["mask"][1].tolist() == [False] + [True] * 7
    assert [meta["document"] for meta in first["meta"]] == [0, 1, 2]
    torch.testing.assert_close(first["a"][1, :2, 0], torch.tensor([1.0, 17.01]))
    check_batch(first, {"a": 4})


def test_tokens_need_no_forward_pass(make_model: Any, counting: Counting) -> None:
    model = make_model()
    settings = {"target": "tokens", "hook_points": None, "model_batch_size": None, "batch_size": 2}
    batches = list(stream_of(model, counting(5, 7), **settings))
    assert [set(batch) for batch in batches] == [{"tokens", "mask", "meta"}] * 3
    assert [batch["tokens"].shape for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    assert model.calls == []


def test_bos_can_be_counted_or_left_out(make_model: Any, counting: Counting) -> None:
    settings: dict[str, Any] = {"target": "activations-2d", "batch_size": 1}
    assert next(stream_of(make_model(), counting(1, 7), ignore_token_ids=[], **settings))["mask"].all()
    for model, prepend in [(make_model(), False), (make_model(prepend_bos=False), True)]:
        source = DATASET | {"prepend_bos": prepend}
        assert next(stream_of(model, counting(1, 8), sources=[source], **settings))["tokens"][0, 0] == 10
    zero = make_model()
    zero.bos_token_id = 0
    mask = next(stream_of(zero, counting(1, 7), **settings))["mask"]
    assert mask[0].tolist() == [False] + [True] * 7


def test_tokens_of_huge_norm_are_masked(number_model: LanguageModel, make_dataset: Any) -> None:
    dataset = make_dataset(["10 11 9000 12 13 14 15", "20 21 22 23 24 25 26"])
    settings: dict[str, Any] = {"model_batch_size": 2, "batch_size": 13}
    assert tokens_of(stream_of(number_model, dataset, **settings, max_norm_ratio=10)) == [
        *(10, 11, 12, 13, 14, 15),
        *range(20, 27),
    ]
    batch = next(stream_of(number_model, dataset, target="activations-2d", max_norm_ratio=10))
    assert batch["mask"][0].tolist() == [False, True, True, False, True, True, True, True]
    # The median of 10 .. 26 without the masked tokens is 15.07: with a ratio of 1, half the tokens stay.
    assert max(tokens_of(stream_of(number_model, dataset, model_batch_size=2, batch_size=7, max_norm_ratio=1))) == 20


def test_a_short_last_batch_is_dropped_unless_it_is_the_only_one(
    number_model: LanguageModel, counting: Counting
) -> None:
    for buffer in (None, 8):
        assert [len(b["tokens"]) for b in stream_of(number_model, counting(2, 7), buffer_size=buffer)] == [6, 6]
        assert [len(b["tokens"]) for b in stream_of(number_model, counting(1, 4), buffer_size=buffer)] == [4]


def test_dtypes(make_model: Any, counting: Counting, tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    targets: list[dict[str, Any]] = [{"buffer_size": 12}, {}, {"target": "activations-2d"}]
    for target in targets:
        assert next(stream_of(model, counting(3, 7), **target))["a"].dtype == torch.float32
        assert next(stream_of(model, counting(3, 7), override_dtype="bf16", **target))["a"].dtype == torch.bfloat16
    stream = stream_of(model, counting(3, 7), buffer_size=12, override_dtype="float64")
    next(stream)
    assert stream.state_dict()["position"]["buffer"]["rows"]["a"].dtype == torch.bfloat16
    path = write_cache(tmp_path / "c", range(100, 140))  # float32, mixed with bfloat16: nothing may be rounded
    sources = [DATASET, cached(path)]
    mixed = stream_of(model, counting(3, 7), sources=sources, override_dtype="float64", buffer_size=12)
    next(mixed)
    assert mixed.state_dict()["position"]["buffer"]["rows"]["a"].dtype == torch.float32


def test_sources_are_mixed_by_weight(number_model: LanguageModel, counting: Counting) -> None:
    datasets = {"n": counting(900, 7, 10), "m": counting(400, 7, 6400)}
    sources = [DATASET | {"sample_weights": 3.0}, {"type": "dataset", "name": "m"}]
    cfg = config(sources=sources, target="tokens", hook_points=None, model_batch_size=None, batch_size=1)

    def origins(seed: int) -> list[str]:
        stream = ActivationFactory(cfg, seed).process(number_model, datasets)
        return [batch["meta"][0]["source"] for batch in stream]

    order = origins(0)
    assert Counter(order) == {"n": 900, "m": 400}  # each to its end
    until = order[:1000]
    assert 0.21 < until.count("m") / 1000 < 0.29
    assert order == origins(0) != origins(1)


def test_text_and_caches_mix(number_model: LanguageModel, counting: Counting, tmp_path: Path) -> None:
    sources = [DATASET, cached(write_cache(tmp_path / "c", range(5000, 5210)), sample_weights=0.5)]
    for settings in ({}, {"buffer_size": 50}):
        stream = stream_of(number_model, counting(30, 7), sources=sources, batch_size=10, **settings)
        batches = list(stream)
        tokens = [token for batch in batches for token in batch["tokens"].tolist()]
        assert sorted(tokens) == [*range(10, 220), *range(5000, 5210)]
        assert all(torch.equal(batch["a"][:, 0].floor(), batch["tokens"].float()) for batch in batches)
    two = write_cache(tmp_path / "d", range(5000, 5064), context=8)
    stream = stream_of(number_model, counting(5, 7), sources=[DATASET, cached(two)], target="activations-2d")
    batches = list(stream)
    assert sum(len(batch["tokens"]) for batch in batches) == 5 + 8
    assert sum(meta == {} for batch in batches for meta in batch.get("meta", [{}] * len(batch["tokens"]))) == 8


def test_caches_alone(tmp_path: Path) -> None:
    one, two = (write_cache(tmp_path / name, tokens) for name, tokens in [("c", range(40)), ("d", range(100, 140))])
    plain = ActivationFactory(only_cached(cached(one), batch_size=10)).process()
    assert tokens_of(plain) == list(range(40))
    for settings in ({"buffer_size": 20}, {"buffer_size": 1000}, {"buffer_shuffle": {"perm_seed": 1}}):
        stream = ActivationFactory(only_cached(cached(one, epochs=2), cached(two), batch_size=10, **settings)).process()
        batches = list(stream)
        tokens = [token for batch in batches for token in batch["tokens"].tolist()]
        assert sorted(tokens) == sorted([*range(40), *range(40), *range(100, 140)])
        assert tokens != sorted(tokens)
        assert all(torch.equal(batch["a"][:, 1], batch["tokens"].float()) for batch in batches)


def test_an_epoch_of_a_cache_that_fits_is_one_permutation(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c", range(64))  # four shards
    for settings in ({"buffer_size": 64}, {"buffer_shuffle": {}}):
        tokens = tokens_of(ActivationFactory(only_cached(cached(path, epochs=2), batch_size=16, **settings)).process())
        assert sorted(tokens[:64]) == sorted(tokens[64:]) == list(range(64))
        assert tokens[:64] != tokens[64:]
        assert len({token // 16 for token in tokens[:16]}) == 4  # the first batch has rows of every shard
    shards = tokens_of(ActivationFactory(only_cached(cached(path), batch_size=16, buffer_size=32)).process())
    assert len({token // 16 for token in shards[:16]}) < 4


def test_contexts_of_a_cache_in_random_order(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c", range(320), context=8)
    cfg = only_cached(cached(path), target="activations-2d", batch_size=6, buffer_shuffle={"perm_seed": 0})
    batches = list(ActivationFactory(cfg).process())
    firsts = [int(first) for batch in batches for first in batch["tokens"][:, 0]]
    assert sorted(firsts) == list(range(0, 320, 8)) != firsts
    assert [len(batch["tokens"]) for batch in batches] == [6] * 6 + [4]  # although shards have 16 contexts
    assert all(batch["mask"].all() and "meta" not in batch for batch in batches)


def test_a_cache_too_large_for_memory_asks_for_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_cache(tmp_path / "c", range(64))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 1024}[name])
    with pytest.raises(ConfigError, match=r"buffer_size=None with buffer_shuffle: the caches need .* set buffer_size"):
        ActivationFactory(only_cached(cached(path), buffer_shuffle={})).process()
    assert len(tokens_of(ActivationFactory(only_cached(cached(path), buffer_size=16)).process())) == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_size": None}, "context_size is missing"),
        ({"hook_points": None}, "hook_points is empty"),
        ({"hook_points": ["a", "a"]}, "names a hook point twice"),
        ({"buffer_shuffle": {}}, "buffer_shuffle needs buffer_size"),
        ({"buffer_size": 5}, "buffer_size=5 is below batch_size=6"),
        ({"target": "activations-2d", "buffer_size": 50}, "buffer_size=50 has no effect"),
        ({"target": "activations-2d", "buffer_shuffle": {}}, "contexts from a dataset are not shuffled"),
        ({"target": "tokens", "model_batch_size": None}, "hook_points=['a'] has no effect"),
        ({"target": "tokens", "hook_points": None}, "model_batch_size=3 has no effect"),
        ({"sources": [DATASET | {"sample_weights": 2}]}, "sample_weights=2.0 has no effect: there is only one source"),
        ({"sources": [cached(Path("c"))], "model_batch_size": None}, "context_size=8 has no effect"),
        (
            {"sources": [cached(Path("c"))], "model_batch_size": None, "context_size": None, "max_norm_ratio": 3},
            "max_norm_ratio=3.0 has no effect",
        ),
        (
            {
                "sources": [DATASET, cached(Path("c"))],
                "target": "tokens",
                "hook_points": None,
                "model_batch_size": None,
            },
            "target='tokens' reads datasets only",
        ),
        ({"sources": []}, "sources"),
        ({"sources": [DATASET | {"prepend_boss": True}]}, "did you mean 'prepend_bos'"),
    ],
)
def test_settings_that_cannot_work_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert message in str(caught.value)


def test_what_process_needs_is_said(number_model: LanguageModel, counting: Counting, tmp_path: Path) -> None:
    dataset = counting(2, 7)
    with pytest.raises(ConfigError, match="needs a language model"):
        ActivationFactory(config()).process(None, {"n": dataset})
    with pytest.raises(ConfigError, match=r"sources.0.name='n' is not among the datasets given \('m'\)"):
        ActivationFactory(config()).process(number_model, {"m": dataset})
    with pytest.raises(ConfigError, match="hook point 'z' does not exist"):
        stream_of(number_model, dataset, hook_points=["z"])
    with pytest.raises(ConfigError, match="context_size=65 exceeds the model's max_length=64"):
        stream_of(number_model, dataset, context_size=65)
    narrow = ActivationWriterConfig(cache_dir=tmp_path / "c", hook_points=["a"])
    ActivationWriter(narrow).process([{"tokens": torch.arange(3), "a": torch.ones(3, 5)}])
    with pytest.raises(ConfigError, match="hook point 'a' has width 5, another source has 4"):
        stream_of(number_model, dataset, sources=[DATASET, cached(tmp_path / "c")])
    with pytest.raises(ValidationError):
        ActivationFactoryConfig.model_validate({"sources": [DATASET], "target": "x", "batch_size": 1})


def test_settings_survive_being_saved() -> None:
    cfg = config(override_dtype="bf16", buffer_size=100, buffer_shuffle={"perm_seed": 3}, ignore_token_ids=[0])
    assert ActivationFactoryConfig.model_validate(cfg.to_json()) == cfg


@pytest.fixture
def llama(tmp_path: Path) -> LanguageModel:
    """A small random Llama whose tokenizer knows the numbers; its BOS has the id 0."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {str(i): i for i in range(3, 200)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return load_language_model(LanguageModelConfig(model_name=str(tmp_path), dtype=torch.float32))


def test_rows_are_the_hidden_states_of_a_real_model(llama: LanguageModel, make_dataset: Any, tmp_path: Path) -> None:
    """The shuffled rows are the hidden states of the packed text, computed here without any part of the package."""
    documents = [[3 + i % 190 for i in range(n, n + 11)] for n in range(0, 220, 11)]
    dataset = make_dataset([" ".join(map(str, document)) for document in documents])
    hook_points = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    settings: dict[str, Any] = {"hook_points": hook_points, "batch_size": 10, "model_batch_size": 4, "num_workers": 2}
    batches = list(stream_of(llama, dataset, buffer_size=40, **settings))
    found = {
        name: torch.cat([torch.cat([batch["tokens"][:, None], batch[name]], 1) for batch in batches])
        for name in hook_points
    }

    text = [token for document in documents for token in [0, *document]]
    contexts: list[list[int]] = []
    while text:
        if text[0] == 0:
            text.pop(0)
        contexts.append([0, *text[:7]])
        text = text[7:]
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = []
    for context in contexts:
        tokens = torch.tensor([context])
        with torch.no_grad():
            hidden = reference(input_ids=tokens, output_hidden_states=True).hidden_states[1][0]
        expected.append(torch.cat([tokens[0, :, None], hidden], 1)[tokens[0] != 0])
    assert len(found[hook_points[0]]) == 220
    torch.testing.assert_close(in_order(found[hook_points[0]]), in_order(torch.cat(expected)), rtol=1e-4, atol=1e-5)
    assert found[hook_points[1]].shape == (220, 9)
    assert all(not batch[name].is_inference() for batch in batches for name in hook_points)  # autograd may save them


def in_order(rows: Tensor) -> Tensor:
    """Rows sorted by token, then by their first activation."""
    return torch.tensor(sorted(rows.tolist()))


def test_a_real_model_going_on(llama: LanguageModel, make_dataset: Any) -> None:
    dataset = make_dataset([" ".join(str(3 + i % 190) for i in range(n, n + 11)) for n in range(0, 220, 11)])
    settings: dict[str, Any] = {
        "hook_points": ["blocks.1.hook_resid_post"],
        "batch_size": 10,
        "model_batch_size": 4,
        "num_workers": 2,
    }
    for buffer_size in (None, 40):
        first = stream_of(llama, dataset, buffer_size=buffer_size, **settings)
        for _ in range(5):
            next(first)
        state = first.state_dict()
        rest = list(first)
        second = stream_of(llama, dataset, buffer_size=buffer_size, **settings)
        second.load_state_dict(state)
        pairs = list(zip(rest, second, strict=True))
        assert len(pairs) == 17
        assert all(torch.equal(one[key], two[key]) for one, two in pairs for key in one)
