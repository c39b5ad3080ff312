"""Running ahead, peeking, and going on exactly where a stream was left, for every kind of source and target."""

import gc
import json
import pkgutil
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.config import build
from lm_saes.data.activity import Activity
from lm_saes.data.batch import Batch
from lm_saes.data.factory import ActivationFactory
from lm_saes.data.factory_config import ActivationFactoryConfig
from lm_saes.data.stream import ActivationStream
from lm_saes.data.text import TextDataset
from lm_saes.data.writer import ActivationWriter, ActivationWriterConfig
from lm_saes.errors import CheckpointError, DataError

Make = Callable[..., ActivationStream]
TEXT = {"type": "dataset", "name": "n"}
OTHER = {"type": "dataset", "name": "m", "sample_weights": 2.0, "pack": False, "epochs": 2}
ROWS = {"type": "activations", "path": "rows", "epochs": 2}
MORE_ROWS = ROWS | {"sample_weights": 1.5}
CONTEXTS = {"type": "activations", "path": "contexts", "epochs": 3}
ONE_D: dict[str, Any] = {"target": "activations-1d", "hook_points": ["a", "b"]}
TWO_D: dict[str, Any] = {"target": "activations-2d", "hook_points": ["a"], "batch_size": 4}
WITH_TEXT: dict[str, Any] = {"context_size": 8, "model_batch_size": 3}

CASES: dict[str, dict[str, Any]] = {
    "tokens": {"sources": [TEXT | {"epochs": 2}], "target": "tokens", "context_size": 8, "batch_size": 3},
    "mixed tokens": {"sources": [TEXT, OTHER], "target": "tokens", "context_size": 8, "batch_size": 3},
    "contexts": {"sources": [TEXT], **TWO_D, **WITH_TEXT},
    "contexts and cached contexts": {"sources": [OTHER, CONTEXTS], **TWO_D, **WITH_TEXT},
    "cached contexts": {"sources": [CONTEXTS], **TWO_D, "buffer_shuffle": {}},
    "rows": {"sources": [TEXT], **ONE_D, **WITH_TEXT},
    "mixed rows": {"sources": [TEXT, OTHER, MORE_ROWS], **ONE_D, **WITH_TEXT},
    "shuffled rows": {"sources": [TEXT, OTHER], **ONE_D, **WITH_TEXT, "buffer_size": 40},
    "everything shuffled": {"sources": [TEXT, OTHER, MORE_ROWS, CONTEXTS], **ONE_D, **WITH_TEXT, "buffer_size": 40},
    "cached rows": {"sources": [ROWS], **ONE_D},
    "cached rows in a permutation": {"sources": [ROWS], **ONE_D, "buffer_size": 1000},
    "cached rows through a buffer": {"sources": [ROWS], **ONE_D, "buffer_size": 30},
    "rows of cached contexts": {"sources": [CONTEXTS, MORE_ROWS], **ONE_D, "buffer_shuffle": {"perm_seed": 2}},
}


@pytest.fixture
def make(make_model: Any, counting: Callable[..., TextDataset], tmp_path: Path) -> Make:
    """Streams over two datasets and two caches; the model's activations depend on the company in a model batch."""
    tokens = torch.arange(3000, 3096)
    rows: Batch = {"tokens": tokens, "a": tokens[:, None] * torch.ones(4), "b": tokens[:, None] * torch.ones(2)}
    contexts: Batch = {name: x.reshape(12, 8, *x.shape[1:]) for name, x in rows.items()}
    contexts["mask"] = contexts["tokens"] % 5 > 0
    for name, batch, chunk in (("rows", rows, 20), ("contexts", contexts, 5)):
        cfg = ActivationWriterConfig(cache_dir=tmp_path / name, hook_points=["a", "b"], n_samples_per_chunk=chunk)
        ActivationWriter(cfg).process([batch])
    datasets = {"n": counting(20, 9), "m": counting(16, 5, 1000)}

    def stream(case: str, workers: int = 3, seed: int = 0, model: Any = None, **changes: Any) -> ActivationStream:
        settings = {"batch_size": 10, **CASES[case], "num_workers": workers, **changes}
        settings["sources"] = [
            source | ({"path": tmp_path / source["path"]} if "path" in source else {}) for source in settings["sources"]
        ]
        cfg = build(ActivationFactoryConfig, settings)
        return ActivationFactory(cfg, seed).process(model or make_model(company=1000.0), datasets)

    return stream


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert list(left) == list(right)
        for key, x in left.items():
            assert torch.equal(x, right[key]) if isinstance(x, Tensor) else x == right[key]


def saved(state: Any) -> Any:
    """What comes back from a checkpoint: JSON for the values, copies of the tensors, and nothing else allowed."""
    if isinstance(state, Mapping):
        assert all(isinstance(key, str) for key in state)
        return {key: saved(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else json.loads(json.dumps(state))


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_a_saved_place_gives_the_same_batches(make: Make, case: str) -> None:
    whole = list(make(case, workers=0))
    assert len(whole) > 5
    assert_same(list(make(case)), whole)
    for n in (0, 1, 2, len(whole) // 2, len(whole) - 1, len(whole)):
        first = make(case)
        used = [next(first) for _ in range(n)]
        first.peek(n % 3)  # what is prepared or peeked at is not consumed
        state = saved(first.state_dict())
        assert_same(used + list(first), whole)  # taking the state changes nothing
        second = make(case, workers=n % 2)
        second.load_state_dict(state)
        assert_same(second.peek(2), whole[n : n + 2])
        again = saved(second.state_dict())
        assert_same(list(second), whole[n:])
        third = make(case)
        third.load_state_dict(again)
        assert_same(list(third), whole[n:])


@pytest.mark.parametrize("case", ["contexts", "rows", "shuffled rows", "cached rows in a permutation"])
def test_states_are_small_unless_a_buffer_has_to_be_kept(make: Make, case: str) -> None:
    stream = make(case)
    next(stream)
    state = stream.state_dict()
    assert ("pending" in state) is (case == "shuffled rows")
    if case != "shuffled rows":
        assert len(json.dumps(state["position"])) < 300


@pytest.mark.parametrize("workers", [0, 2])
def test_peeking(make: Make, workers: int) -> None:
    whole = list(make("rows", workers=0))
    stream = make("rows", workers=workers)
    assert_same(stream.peek(3), whole[:3])
    assert_same(stream.peek(2), whole[:2])
    assert_same([next(stream)], whole[:1])
    assert_same(stream.peek(1000), whole[1:])
    assert_same(list(stream), whole[1:])
    assert stream.peek(1) == []
    assert next(stream, None) is None
    assert iter(stream) is stream


def test_runs_ahead_by_as_many_batches_as_workers(make: Make, make_model: Any) -> None:
    model = make_model()
    stream = make("contexts", workers=2, model=model, batch_size=3)
    assert model.calls == []  # nothing is made before the first batch is asked for
    next(stream)
    deadline = time.monotonic() + 5
    while len(model.calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(model.calls) == 3  # one given, two waiting
    stream.close()


def test_no_workers_means_no_thread_that_makes_batches(make: Make) -> None:
    before = set(threading.enumerate())
    stream = make("rows", workers=0)
    next(stream)
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"activations-watch"}


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_out_where_the_batch_is_asked_for(make: Make, make_model: Any, workers: int) -> None:
    class Breaks(type(make_model())):
        def activations(self, tokens: Tensor, *rest: Any) -> dict[str, Tensor]:
            if len(self.calls) == 2:
                raise ZeroDivisionError("third batch")
            return super().activations(tokens, *rest)

    stream = make("contexts", workers=workers, model=Breaks(), batch_size=3)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ZeroDivisionError, match="third batch") as caught:
        next(stream)
    assert "activations" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(ZeroDivisionError, match="third batch"):
        next(stream)


def threads() -> int:
    return sum(thread.name == "activations" for thread in threading.enumerate())


def test_closing_ends_the_thread(make: Make) -> None:
    before = threads()
    with make("shuffled rows") as stream:
        next(stream)
        assert threads() == before + 1
    assert threads() == before
    state = stream.state_dict()
    with pytest.raises(DataError, match="the stream was closed"):
        next(stream)
    whole = list(make("shuffled rows"))
    other = make("shuffled rows")
    other.load_state_dict(state)
    assert_same(list(other), whole[1:])


def test_a_forgotten_stream_ends_its_thread(make: Make) -> None:
    before = threads()
    stream = make("rows")
    next(stream)
    assert threads() == before + 1
    del stream
    gc.collect()
    assert threads() == before


def test_the_interpreter_ends_although_a_stream_is_open(make: Make, tmp_path: Path) -> None:
    stream = make("cached rows in a permutation")
    program = f"""
from lm_saes.data.factory import ActivationFactory
from lm_saes.data.factory_config import ActivationFactoryConfig
source = {{"type": "activations", "path": {str(tmp_path / "rows")!r}, "epochs": None}}
cfg = ActivationFactoryConfig.model_validate(
    {{"sources": [source], "target": "activations-1d", "hook_points": ["a"], "batch_size": 10, "buffer_size": 1000}}
)
stream = ActivationFactory(cfg).process()
print(len(next(stream)["tokens"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
    stream.close()


def test_states_of_other_streams_are_refused(make: Make) -> None:
    stream = make("rows")
    next(stream)
    state = stream.state_dict()
    with pytest.raises(CheckpointError, match="has given batches already; load its state before the first"):
        stream.load_state_dict(state)
    for changes, message in [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"batch_size": 11}, "batch_size: 10 there, 11 here"),
        ({"context_size": 9}, "context_size: 8 there, 9 here"),
        ({"sources": [TEXT | {"pack": False}]}, "sources.0.pack: True there, False here"),
        ({"sources": [TEXT | {"name": "m"}]}, "sources.0.name: 'n' there, 'm' here"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            make("rows", **changes).load_state_dict(state)
        assert message in str(caught.value)
    make("rows", workers=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="not the state of an ActivationStream: it has 'step'"):
        make("rows").load_state_dict({"step": 3})


def test_provenance_names_model_and_data(make: Make) -> None:
    provenance = make("mixed rows").provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["model"] == {"model": "numbers"}
    assert provenance["factory"]["seed"] == 0
    assert [source.get("documents") for source in provenance["sources"]] == [20, 16, None]
    assert len(provenance["sources"][2]["fingerprint"]) == 64


# --- stalls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_stalls_is_reported_with_its_stage(
    make: Make, make_model: Any, workers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model does not answer until three warnings have come, ever later; then the batch comes all the same."""
    answers = threading.Event()

    class SlowModel(make_model):  # type: ignore[misc]
        def activations(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
            answers.wait(30)
            return super().activations(*arguments, **options)

    monkeypatch.setattr("lm_saes.machine.STREAM_PATIENCE_S", 0.05)
    with make("rows", workers=workers, model=SlowModel()) as stream:
        warned = lambda: len(caplog.records) >= 3  # noqa: E731
        warner = threading.Thread(target=lambda: (_wait_for(warned), answers.set()))
        warner.start()
        assert len(next(stream)["tokens"])
        warner.join()
    waits = [float(re.findall(r"no batch for (\S+) s", record.getMessage())[0]) for record in caplog.records]
    assert waits[1] >= 2 * waits[0] * 0.99 and waits[2] >= 2 * waits[1] * 0.99
    for record in caplog.records:
        assert record.levelname == "WARNING"
        assert record.getMessage().endswith("the stream is running the language model")


@pytest.mark.parametrize(
    ("case", "blocked", "stage"),
    [
        ("shuffled rows", "lm_saes.data.text.TextDataset._values", "reading text"),
        ("shuffled rows", "lm_saes.data.contexts.ContextSource._context", "making contexts"),
        ("shuffled rows", "lm_saes.data.sources.Mixer._choose", "mixing sources"),
        ("shuffled rows", "lm_saes.data.shuffle.ShuffleBuffer.take", "shuffling"),
        ("mixed rows", "lm_saes.data.producers._flatten", "making a batch"),
        ("cached rows", "lm_saes.data.cache.ActivationCache.read", "reading cached activations"),
    ],
)
def test_every_stage_is_told(
    make: Make, case: str, blocked: str, stage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever does not return until there is a warning, the warning names it."""
    owner, _, name = blocked.rpartition(".")
    original = getattr(pkgutil.resolve_name(owner), name)

    def waits(*arguments: Any) -> Any:
        _wait_for(lambda: bool(caplog.records))
        return original(*arguments)

    monkeypatch.setattr(blocked, waits)
    monkeypatch.setattr("lm_saes.machine.STREAM_PATIENCE_S", 0.05)
    with make(case) as stream:
        next(stream)
    assert caplog.records[0].getMessage().endswith(f"the stream is {stage}")


def test_an_activity_tells_the_inner_stages_of_all_threads() -> None:
    activity, told = Activity(), threading.Event()
    assert str(activity) == "between batches"

    def other() -> None:
        with activity.doing("shuffling"):
            told.wait(30)

    with activity.doing("making a batch"), activity.doing("reading text"):
        thread = threading.Thread(target=other)
        thread.start()
        _wait_for(lambda: "shuffling" in str(activity))
        assert str(activity) == "reading text and shuffling"
        told.set()
        thread.join()
        assert str(activity) == "reading text"
    with pytest.raises(ZeroDivisionError), activity.doing("making a batch"):
        with activity.doing("shuffling"):
            assert str(activity) == "shuffling"
        assert str(activity) == "making a batch"
        raise ZeroDivisionError
    assert str(activity) == "between batches"


def test_an_activity_draws_items_as_a_stage_and_leaves_it_between_them() -> None:
    activity = Activity()
    seen: list[str] = []

    def items() -> Iterator[int]:
        for i in range(2):
            seen.append(str(activity))
            yield i

    for _ in activity.drawing("reading text", items()):
        seen.append(str(activity))
    assert seen == ["reading text", "between batches"] * 2
    assert str(activity) == "between batches"


def test_a_thread_that_never_ends_does_not_keep_the_stream_from_closing(
    make: Make, make_model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, stuck = threading.Event(), threading.Event()

    class StuckModel(make_model):  # type: ignore[misc]
        def activations(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
            if len(self.calls) >= 2:
                stuck.set()
                answers.wait(30)
            return super().activations(*arguments, **options)

    monkeypatch.setattr("lm_saes.machine.STREAM_END_S", 0.1)
    stream = make("rows", workers=9, model=StuckModel())
    next(stream)
    assert stuck.wait(30)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 10
    assert "the stream does not end; it is running the language model, and is left behind" in caplog.text
    answers.set()


def _wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)
