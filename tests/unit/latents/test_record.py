"""Squared lengths are made in float32, whatever autocast says."""

import torch

from lm_saes.latents.record import squared_length


def test_squared_length_is_that_of_float32_under_autocast() -> None:
    v_ND = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        length_N = squared_length(v_ND)
    length_N.sum().backward()
    assert length_N.dtype == torch.float32
    assert v_ND.grad is not None
    torch.testing.assert_close(length_N.detach(), v_ND.detach().double().square().sum(1).float(), rtol=1e-6, atol=0)
    assert torch.equal(v_ND.grad, 2 * v_ND.detach())


def test_squared_length_has_the_bits_of_vecdot() -> None:
    v_ND = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights_N = torch.linspace(-1, 3, 7)
    found = []
    for lengths in (squared_length, lambda v: torch.linalg.vecdot(v, v)):
        length_N = lengths(v_ND)
        found.append((length_N.detach(), *torch.autograd.grad((length_N * weights_N).sum(), v_ND)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_squared_length_in_half_precision_is_summed_in_float32() -> None:
    v_ND = torch.full((2, 1000), 1.0, dtype=torch.bfloat16)
    assert squared_length(v_ND).tolist() == [1000.0, 1000.0]
