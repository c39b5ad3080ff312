"""The buffer loses nothing, gives nothing twice, mixes, and stays where it is in memory."""

import torch
from torch import Tensor

from lm_saes.data.shuffle import ShuffleBuffer


def run(n_rows: int, size: int, batch_size: int, seed: int = 0, block: int = 5) -> tuple[list[Tensor], ShuffleBuffer]:
    """Feed rows 0 .. n_rows-1 in blocks, and take batches, as the stream does."""
    buffer = ShuffleBuffer(size, batch_size, torch.float32, seed)
    taken: list[Tensor] = []
    places: set[int] = set()
    for start in range(0, n_rows, block):
        tokens = torch.arange(start, min(n_rows, start + block))
        rows = {"tokens": tokens, "a": tokens[:, None] * torch.ones(2)}
        used = 0
        while used < tokens.numel():
            while not buffer.n_free:
                taken.append(check(buffer.take()))
            used += buffer.put(rows, used)
            places |= {x.data_ptr() for x in buffer.rows.values()}
    while not buffer.n_free:
        taken.append(check(buffer.take()))
    buffer.drain()
    while (rows := buffer.take()) and rows["tokens"].numel():
        taken.append(check(rows))
    assert len(places) == 2  # one for the tokens and one for "a": allocated once
    return taken, buffer


def check(rows: dict[str, Tensor]) -> Tensor:
    assert torch.equal(rows["a"][:, 0].to(torch.int64), rows["tokens"])
    return rows["tokens"]


def test_every_row_comes_out_once() -> None:
    for n_rows, size, batch_size in [(100, 20, 4), (7, 20, 4), (20, 20, 20), (101, 7, 3), (40, 5, 5)]:
        taken, _ = run(n_rows, size, batch_size)
        assert sorted(torch.cat(taken).tolist()) == list(range(n_rows))
        assert all(batch.numel() == batch_size for batch in taken[:-1])


def test_the_order_depends_on_the_seed_alone() -> None:
    first, again, other = (torch.cat(run(100, 20, 4, seed)[0]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_are_mixed_over_the_buffer_and_not_further_ahead() -> None:
    taken, _ = run(4000, 400, 10)
    order = torch.cat(taken)
    when = torch.arange(4000)
    assert bool((order < when // 10 * 10 + 400).all())  # a row comes out no earlier than it is in
    stay = (when - order + 400).float()  # how long it was in, in rows taken
    assert 300 < stay[1000:3000].mean() < 500
    assert stay[1000:3000].std() > 100
    neighbours = (order[1:] - order[:-1]).abs() == 1
    assert neighbours.float().mean() < 0.02


def test_going_on_from_a_saved_state() -> None:
    buffer = ShuffleBuffer(12, 3, torch.bfloat16, seed=3)
    rows = {"tokens": torch.arange(40), "a": torch.randn(40, 2)}
    used = buffer.put(rows, 0)
    buffer.take()
    state = buffer.state_dict()
    other = ShuffleBuffer(12, 3, torch.bfloat16, seed=3)
    other.load_state_dict(state)
    for mine in (buffer, other):
        assert mine.put(rows, used) == 3  # changes the buffer, not the saved state
    for _ in range(4):
        one, two = buffer.take(), other.take()
        assert one["a"].dtype == torch.bfloat16
        assert torch.equal(one["tokens"], two["tokens"]) and torch.equal(one["a"], two["a"])
        buffer.put(rows, 20)
        other.put(rows, 20)
