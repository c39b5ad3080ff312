"""Which implementation of the sparse products is chosen, and that all of them ask."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lm_saes.errors import ConfigError
from lm_saes.latents import kernels
from lm_saes.latents.kernels import plain

needs_triton = pytest.mark.usefixtures("triton")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LM_SAES_KERNELS", raising=False)


@needs_triton
def test_triton_is_chosen_for_cuda_alone() -> None:
    assert kernels.implementation("cuda").__name__ == "lm_saes.latents.kernels.cuda"
    assert kernels.implementation("cpu") is plain
    assert kernels.implementation("mps") is plain


@needs_triton
@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name != "implementation"])
def test_both_implementations_have_every_function(name: str) -> None:
    assert callable(getattr(plain, name))
    assert callable(getattr(kernels.implementation("cuda"), name))


def test_the_environment_turns_triton_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_SAES_KERNELS", "plain")
    assert kernels.implementation("cuda") is plain


def test_the_environment_may_say_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_SAES_KERNELS", "triton")
    with pytest.raises(ConfigError, match=r"^LM_SAES_KERNELS=triton: is neither 'plain' nor unset; unset it"):
        kernels.implementation("cpu")


def test_without_triton_cuda_takes_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", asked.append)
    kernels._has_triton.cache_clear()
    try:
        for _ in range(3):
            assert kernels.implementation("cuda") is plain
    finally:
        kernels._has_triton.cache_clear()
    assert asked == ["triton"]


def test_each_function_asks_for_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def implementation(device_type: str) -> Any:
        asked.append(device_type)
        return SimpleNamespace(**{name: lambda *arguments, name=name: (name, *arguments) for name in kernels.__all__})

    monkeypatch.setattr(kernels, "implementation", implementation)
    x: Any = torch.ones(2, 2, device="meta")
    assert kernels.gather_sum(x, x, x, x)[0] == "gather_sum"
    assert kernels.row_dot(x, x, x, x, x)[0] == "row_dot"
    assert kernels.transpose(x, 3)[0] == "transpose"
    assert kernels.top_of_product(x, None, x, 3)[0] == "top_of_product"
    assert kernels.sparse_adam(x, x, x, x, x, 1.0, 0.9, 0.9, 0.1, 1) is None
    assert asked == ["meta"] * 5


def test_the_kernels_need_no_package_but_torch() -> None:
    missing = ("pydantic", "safetensors", "rich", "yaml", "transformers", "triton")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nfrom lm_saes.latents import kernels\n"
    subprocess.run([sys.executable, "-c", code + "print(kernels.implementation('cuda'))"], check=True)
