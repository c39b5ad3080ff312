"""Dictionary files: what is written, what loads, what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_saes.axes.axis import Axes, Axis
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.sae import SparseAutoEncoder
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.storage.tensors import save_tensors

from .twin import IN, OUT, THETA, assert_same, random_batch, random_sae, sae_config

WEIGHTS = "sae_weights.safetensors"
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.batch_topk_threshold"


def trained(directory: Path, **settings: Any) -> SparseAutoEncoder:
    """A random dataset-wise transcoder, saved in `directory` as before there were manifests: files may be changed."""
    sae = random_sae(sae_config(True, **({"norm_activation": "dataset-wise"} | settings)))
    sae.set_dataset_average_activation_norm({IN: 3.0, OUT: 5.0})
    sae.save_pretrained(directory)
    (directory / "manifest.json").unlink()
    return sae


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add, or (None) remove tensors of a saved dictionary."""
    tensors = load_file(directory / WEIGHTS) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, directory / WEIGHTS)


@pytest.mark.parametrize("act_fn", ["jumprelu", "batchtopk"])
def test_names_and_shapes_of_the_specification(tmp_path: Path, act_fn: str) -> None:
    sae = trained(tmp_path, act_fn=act_fn, use_glu_encoder=True)
    extra: dict[str, tuple[int, ...]] = {THETA: (24,)} if act_fn == "jumprelu" else {THRESHOLD: ()}
    want = {
        "W_E": (6, 24), "b_E": (24,), "W_E_glu": (6, 24), "b_E_glu": (24,), "W_D": (24, 6), "b_D": (6,),
        NORM + IN: (), NORM + OUT: (), **extra,
    }  # fmt: skip
    in_file = load_file(tmp_path / WEIGHTS)
    for tensors in (in_file, sae.full_state_dict()):
        assert {name: tuple(t.shape) for name, t in tensors.items()} == want
    assert {name: getattr(sae, name).shape for name in ("W_E", "W_D")} == {"W_E": (6, 24), "W_D": (24, 6)}
    assert torch.equal(in_file["W_E"], sae.W_E.detach())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_thresholds_stay_in_float32(tmp_path: Path) -> None:
    for act_fn, name in (("jumprelu", THETA), ("batchtopk", THRESHOLD)):
        sae = trained(tmp_path, act_fn=act_fn, dtype="bfloat16")
        for tensors in (sae.state_dict(), load_file(tmp_path / WEIGHTS)):
            assert tensors[name].dtype == torch.float32
            assert tensors["W_D"].dtype == torch.bfloat16
        loaded = SparseAutoEncoder.from_pretrained(tmp_path)
        assert (loaded.state_dict()[name].dtype, loaded.W_E.dtype) == (torch.float32, torch.bfloat16)


def test_the_dtype_may_be_changed_at_loading(tmp_path: Path) -> None:
    sae = trained(tmp_path)
    loaded = SparseAutoEncoder.from_pretrained(tmp_path, dtype="float64", fold_activation_scale=False)
    assert loaded.W_E.dtype == torch.float64
    assert torch.equal(loaded.W_E, sae.W_E.double())


# -- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_D": None}, "missing ['W_D']"),
        ({"b_D": None, "b_E": None}, "missing ['b_D', 'b_E']"),
        ({"W_X": torch.zeros(2)}, "unexpected ['W_X']"),
        ({NORM + OUT: None}, f"missing ['{NORM}{OUT}']"),
        ({NORM + "blocks.9.x": torch.tensor(2.0)}, f"unexpected ['{NORM}blocks.9.x']"),
    ],
)
def test_missing_and_unexpected_tensors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    trained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(CheckpointError) as error:
        SparseAutoEncoder.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert "strict_loading=False" in str(error.value)
    SparseAutoEncoder.from_pretrained(tmp_path, strict_loading=False, fold_activation_scale=False)


def test_a_tensor_of_another_shape_is_refused_even_if_not_strict(tmp_path: Path) -> None:
    trained(tmp_path)
    rewrite(tmp_path, W_D=torch.zeros(24, 7))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"W_D has shape \(24, 7\), wanted \(24, 6\)"):
            SparseAutoEncoder.from_pretrained(tmp_path, strict_loading=strict)


def test_files_that_are_not_there_or_torn(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SparseAutoEncoder.from_pretrained(tmp_path)
    trained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        SparseAutoEncoder.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {WEIGHTS}"):
        SparseAutoEncoder.from_pretrained(tmp_path)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    class Other(AbstractSparseAutoEncoder):
        """A kind that a saved autoencoder is not; without a config class it is not registered."""

    trained(tmp_path)
    with pytest.raises(ConfigError, match="sae_type='sae' is not a Other"):
        Other.from_pretrained(tmp_path)


def test_what_is_no_device_mesh_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^device_mesh: .* give a DeviceMesh of 'data' and 'model' \(and 'head'\)$"):
        SparseAutoEncoder.from_config(sae_config(), device_mesh=object())


def test_heads_are_a_crosscoders(monkeypatch: pytest.MonkeyPatch) -> None:
    axis = Axis()
    axis.size = 2
    monkeypatch.setattr("lm_saes.parallel.mesh.axes_of", lambda mesh: Axes(sites=axis, everywhere=axis))
    with pytest.raises(ConfigError, match=r"^device_mesh: sae_type='sae' has no heads to cut; only a crosscoder has$"):
        SparseAutoEncoder.from_config(sae_config(), device_mesh=object())


# -- old files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_old_weights_in_pt_load_as_plain_tensors(tmp_path: Path, wrapped: bool) -> None:
    sae = trained(tmp_path, act_fn="jumprelu")
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"sae": tensors, "version": "1"} if wrapped else tensors, tmp_path / "sae_weights.pt")
    data = json.loads((tmp_path / "config.json").read_text())
    del data["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    loaded = AbstractSparseAutoEncoder.from_pretrained(tmp_path)
    batch = random_batch(sae.cfg)
    with torch.no_grad():
        assert_same(loaded.reconstruct(batch), sae.eval().reconstruct(batch), 1e-5)


def test_safetensors_come_before_pt(tmp_path: Path) -> None:
    trained(tmp_path)
    torch.save({"W_D": torch.zeros(1)}, tmp_path / "sae_weights.pt")
    SparseAutoEncoder.from_pretrained(tmp_path)


def test_an_absent_running_threshold_and_a_norm_of_one_entry_load(tmp_path: Path) -> None:
    trained(tmp_path, act_fn="batchtopk")
    rewrite(tmp_path, **{THRESHOLD: None, NORM + IN: torch.tensor([4.0])})
    loaded = SparseAutoEncoder.from_pretrained(tmp_path, fold_activation_scale=False)
    assert float(loaded.get_buffer(THRESHOLD)) == 0
    assert loaded.dataset_average_activation_norm == {IN: 4.0, OUT: 5.0}


def test_settings_without_effect_in_an_old_file_do_not_stop_folding(tmp_path: Path) -> None:
    trained(tmp_path, act_fn="jumprelu")
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"top_k": 7}))
    with pytest.warns(UserWarning, match="top_k=7 has no effect"):
        loaded = SparseAutoEncoder.from_pretrained(tmp_path)
    assert loaded.cfg.norm_activation == "inference"


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, saved_by: str) -> None:
    trained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    target = tmp_path / "ran"
    content = {"W_E": torch.zeros(6, 24), "other": Bomb(target)}
    if saved_by == "torch":
        torch.save(content, tmp_path / "sae_weights.pt")
    else:
        (tmp_path / "sae_weights.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        SparseAutoEncoder.from_pretrained(tmp_path)
    assert not target.exists()


def test_a_pt_file_of_something_else_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    for content in ([torch.zeros(2)], {"W_E": "text"}):
        torch.save(content, tmp_path / "sae_weights.pt")
        with pytest.raises(CheckpointError, match="does not hold named tensors"):
            SparseAutoEncoder.from_pretrained(tmp_path)


def test_weights_can_be_read_by_whom_other_new_files_can(tmp_path: Path) -> None:
    save_tensors({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
