"""The command `lm-saes`. Importing this module must stay fast: what is heavy loads when a command runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lm_saes.errors import Interrupted, LMSaesError, OtherProcessError

app = typer.Typer(
    name="lm-saes",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The settings: a .toml, .yaml or .json file.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=VALUE",
        help="Change one setting of the file; may be repeated. VALUE is JSON, or else taken as text; "
        "a number in the path is a position in a list.",
    ),
]


class Command(StrEnum):
    train = "train"
    generate = "generate"
    evaluate = "evaluate"


_RANK = os.environ.get("RANK", "0")
"""Which of the processes this is that torchrun has started."""
_STARTED_TOGETHER = "RANK" in os.environ and "WORLD_SIZE" in os.environ
_SETTINGS_OF = {
    Command.train: "TrainSAESettings",
    Command.generate: "GenerateActivationsSettings",
    Command.evaluate: "EvaluateSAESettings",
}


@app.callback(invoke_without_command=True)
def lm_saes(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    """Train sparse autoencoders on the activations of language models.

    A run is described by one CONFIG file (TOML, YAML or JSON), which says which model, which text, which
    dictionary and how to train it. See every setting with: lm-saes settings

    \b
    Examples:
      lm-saes train examples/quickstart.toml
      lm-saes train run.toml --set trainer.lr=2e-4 --set sae.top_k=64
      lm-saes train run.toml --resume
      lm-saes evaluate evaluate.toml
    """
    if version:
        from lm_saes import __version__

        typer.echo(f"lm-saes {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    config: Config,
    overrides: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run's directory.")
    ] = False,
) -> None:
    """Train a dictionary, evaluate it and write a report.

    The trained dictionary, its metrics, checkpoints and report.html go to trainer.exp_result_path.

    \b
    Examples:
      lm-saes train run.toml
      lm-saes train run.toml --set trainer.total_training_tokens=1e8 --set seed=1
      lm-saes train run.toml --resume
      torchrun --nproc-per-node 4 -m lm_saes train run.toml --set model_parallel_size=4
    """
    with _mistakes_in_one_line():
        data = _read(config, overrides)
        from lm_saes import runners

        report = runners.train_from_config(data, resume=resume)
        if _RANK == "0":
            typer.echo(f"report: {report}")


@app.command()
def generate(config: Config, overrides: Set = None) -> None:
    """Run the model over text once and keep its activations on disk.

    Training can then pass over them several times: name the directory as a source of type "activations".

    \b
    Example:
      lm-saes generate generate.toml
    """
    with _mistakes_in_one_line():
        data = _read(config, overrides)
        from lm_saes import runners

        typer.echo(f"activations: {runners.generate_from_config(data)}")


@app.command()
def evaluate(config: Config, overrides: Set = None) -> None:
    """Measure a trained dictionary on held-out text.

    Prints the results as JSON.

    \b
    Example:
      lm-saes evaluate evaluate.toml > results.json
    """
    with _mistakes_in_one_line():
        data = _read(config, overrides)
        import json

        from lm_saes import runners

        typer.echo(json.dumps(runners.evaluate_from_config(data), indent=2))


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's directory, a checkpoint's, or a saved dictionary's.")
    ],
) -> None:
    """Compare every file that was saved with its size and hash in manifest.json.

    Prints a line for each file that is missing, torn or altered. Exit code: 0 if there is none, else 2.

    \b
    Examples:
      lm-saes verify results/quickstart
      lm-saes verify results/quickstart/checkpoints/step_733
    """
    with _mistakes_in_one_line():
        from lm_saes.training.verify import verify as look

        wrong, n_files, n_directories = look(directory)
        for line in wrong:
            typer.echo(line)
        if wrong:
            raise SystemExit(2)
        where = "1 directory" if n_directories == 1 else f"{n_directories} directories"
        typer.echo(f"{directory}: {n_files} files in {where} are as they were saved")


@app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's directory, a checkpoint's, or a saved dictionary's.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to write it, instead of DIR/sae_weights.safetensors."),
    ] = None,
) -> None:
    """Make one file of weights from those that a run over several processes has saved in parts.

    It is the file that one process would have saved. Memory for the whole dictionary is not needed.

    \b
    Examples:
      lm-saes export results/run
      lm-saes export results/run/checkpoints/step_733 --out shared/sae_weights.safetensors
    """
    with _mistakes_in_one_line():
        from lm_saes.dictionaries.merge import export as write

        typer.echo(f"weights: {write(directory, out)}")


@app.command()
def settings(
    command: Annotated[
        Command, typer.Argument(metavar="COMMAND", help="The command whose settings to print.")
    ] = Command.train,
    kind: Annotated[
        str | None,
        typer.Option("--kind", metavar="KIND", help="A kind of dictionary, such as clt."),
    ] = None,
) -> None:
    """Print every setting with its type, default and meaning.

    \b
    Examples:
      lm-saes settings
      lm-saes settings train --kind clt
      lm-saes settings evaluate
      lm-saes settings train | grep -A2 trainer.lr
    """
    with _mistakes_in_one_line():
        import shutil
        import textwrap

        from lm_saes import runners
        from lm_saes.errors import ConfigError
        from lm_saes.runs.listing import known_settings

        if kind is not None and command != Command.train:
            raise ConfigError(f"--kind {kind}: only train has settings of a kind; remove it")
        listed = getattr(runners, _SETTINGS_OF[command]) if kind is None else runners.train_settings_class(kind)
        width = min(shutil.get_terminal_size().columns, 120)
        for path, kind, default, description in known_settings(listed):
            typer.echo(f"{path}: {kind}" + (" (required)" if default == "required" else f" = {default}"))
            if description:
                typer.echo(textwrap.fill(description, width, initial_indent="    ", subsequent_indent="    "))


def main() -> None:
    """Run the command and end the process: 0 done, 1 a bug (with traceback), 2 a user's mistake, 128 + n signal n."""
    _begin_to_log()
    try:
        try:
            code = app(prog_name="lm-saes", standalone_mode=False)
        except typer.TyperException as error:
            _fail(f"{error.format_message().replace('Value error, ', '')} (see lm-saes --help)", error.exit_code)
        sys.exit(code)
    except SystemExit as end:
        if _STARTED_TOGETHER and (end.code is None or isinstance(end.code, int)):
            from lm_saes.parallel.launch import leave

            leave(end.code or 0)
        raise


def _begin_to_log() -> None:
    """Of several processes the first speaks for all; another tells its errors, and what its own stream waits for."""
    others = _RANK != "0"
    told_by = f"process {_RANK}: " if others else ""
    logging.basicConfig(format=f"lm-saes: {told_by}%(message)s", handlers=[_Stderr()])
    if others:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("lm_saes.data.stalls").setLevel(logging.WARNING)
    else:
        logging.getLogger("lm_saes").setLevel(logging.INFO)


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is at the time, so that lines appear above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _read(config: Path, overrides: list[str] | None) -> dict[str, Any]:
    from lm_saes.config import apply_overrides, read_document

    return apply_overrides(read_document(config), overrides or [])


@contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    """Turn what the user can put right into one line and exit code 2; all else is a bug and keeps its traceback."""
    try:
        with _joined():
            yield
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (LMSaesError, OSError, ValueError) as error:
        message, code = _told(error)
        if _STARTED_TOGETHER:
            from lm_saes.parallel.launch import speaks_first

            if not speaks_first(error):
                raise SystemExit(code) from None
        _fail(message, code)


def _joined() -> AbstractContextManager[object]:
    """Within this, processes that torchrun has started together are a group; a mistake is told by one of them."""
    if not _STARTED_TOGETHER:
        return nullcontext()
    from lm_saes.parallel.launch import joined

    return joined()


def _told(error: LMSaesError | OSError | ValueError) -> tuple[str, int]:
    """What people are told of an error of their own, and the exit code; any other is raised."""
    match error:
        case Interrupted():
            return str(error), error.exit_code
        case LMSaesError():
            return str(error), 1 if isinstance(error, OtherProcessError) else 2
        case OSError() if error.filename:
            return f"{error.filename}: {error.strerror}", 2
        case FileNotFoundError() | FileExistsError() | PermissionError() | NotADirectoryError() | IsADirectoryError():
            return str(error), 2
        case ValueError():
            from pydantic import ValidationError

            from lm_saes.config import describe

            if isinstance(error, ValidationError):
                return describe(error), 2
    raise error


def _fail(message: str, code: int) -> NoReturn:
    print(f"lm-saes: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
