"""Snippets: the best peaks of distinct contexts, whatever the batches, cut where the text ends."""

import pytest
import torch
from torch import Tensor

from lm_saes.evaluation import examples
from lm_saes.evaluation.examples import LatentExample, SnippetCollector


def collect(
    acts_BSF: Tensor,
    mask_BS: Tensor | None = None,
    size: int = 100,
    snippets: int = 5,
    context: int = 2,
    shown: int = 100,
) -> list[LatentExample]:
    """Examples of latents with these activations; token id = 100 * context + position, decoded as its number."""
    n_contexts, length, d_sae = acts_BSF.shape
    tokens = 100 * torch.arange(n_contexts)[:, None] + torch.arange(length)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask_BS is None else mask_BS
    collector = SnippetCollector(torch.arange(d_sae), d_sae, snippets, context)
    for acts, ids, valid in zip(acts_BSF.split(size), tokens.split(size), mask.split(size), strict=True):
        flat = acts.flatten(0, 1)
        rows, latents = (flat > 0).nonzero(as_tuple=True)
        collector.add((rows, latents, flat[rows, latents]), ids, valid)
    frequency = (acts_BSF[mask] > 0).double().mean(0)
    return collector.examples(frequency, shown, lambda ids: [str(token) for token in ids])


def snippets_of(latent: int, found: list[LatentExample]) -> list[tuple[list[int], list[float], int]]:
    item = next(item for item in found if item["latent"] == latent)
    return [([int(token) for token in s["tokens"]], s["activations"], s["peak"]) for s in item["snippets"]]


PEAKS = torch.tensor(
    [[0, 1, 7, 0, 6, 0], [9, 2, 0, 0, 0, 0], [0, 0, 0, 0, 3, 4], [0, 0, 8, 8, 5, 0], [0, 0, 0, 0, 0, 0]],
    dtype=torch.float32,
)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_snippets_are_the_best_peaks_of_distinct_contexts(size: int):
    other = torch.zeros(5, 6)
    other[4, 0] = 5.5
    found = collect(torch.stack([PEAKS, other], dim=-1), size=size)
    best_first = [
        ([100, 101, 102], [9, 2, 0], 0),  # cut at the left end of its context
        ([300, 301, 302, 303, 304], [0, 0, 8, 8, 5], 2),  # of equal peaks the first
        ([0, 1, 2, 3, 4], [0, 1, 7, 0, 6], 2),  # its second peak, 6, is in the same context
        ([203, 204, 205], [0, 3, 4], 2),
    ]
    assert snippets_of(0, found) == best_first
    assert snippets_of(1, found) == [([400, 401, 402], [5.5, 0, 0], 0)]
    assert (found[0]["latent"], found[0]["max_activation"], found[0]["frequency"]) == (0, 9, 0.3333)
    assert snippets_of(0, collect(PEAKS[..., None], size=size, snippets=2)) == best_first[:2]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_of_equal_contexts_the_first_are_kept(size: int):
    found = collect(torch.ones(3, 1, 1), size=size, snippets=2)
    assert snippets_of(0, found) == [([0], [1], 0), ([100], [1], 0)]


def test_snippets_show_no_padding_and_no_masked_activation():
    acts = torch.tensor([[9, 0, 5, 9, 1, 9, 9]], dtype=torch.float32)[..., None]
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0]], dtype=torch.bool)
    # The masked first token (BOS) is shown as context; what stands after the last valid token is padding.
    assert snippets_of(0, collect(acts, mask, context=4)) == [([0, 1, 2, 3, 4], [0, 0, 5, 0, 1], 2)]


def test_a_latent_that_fires_only_on_masked_tokens_has_no_snippet():
    acts = torch.tensor([[0.0, 3.0], [0.0, 0.0]])[..., None]
    mask = torch.tensor([[True, False], [True, True]])
    assert collect(acts, mask) == []


def rising(n: int) -> Tensor:
    """Latent i is active on i + 1 of n tokens of one context, strongest on the last."""
    return (torch.arange(1.0, n + 1)[:, None] - torch.arange(n - 1, -1, -1.0)).relu()[None]


def test_latents_are_shown_at_even_ranks_of_frequency():
    found = collect(rising(10), shown=4)
    assert [(item["latent"], item["frequency"]) for item in found] == [(9, 1.0), (6, 0.7), (3, 0.4), (0, 0.1)]
    assert [item["latent"] for item in collect(rising(10), shown=50)] == list(range(9, -1, -1))
    assert collect(rising(10), shown=0) == []


def test_a_wide_dictionary_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examples, "MAX_TRACKED_LATENTS", 3)
    found = collect(rising(8), context=0)
    assert [(item["latent"], item["frequency"]) for item in found] == [(6, 0.875), (3, 0.5), (0, 0.125)]
    assert snippets_of(3, found) == [([7], [4], 0)]
