"""Entry point: the group of commands, and the one place where errors become exit codes.

Commands are imported when they run, so that ``planner --version`` and ``planner --help`` stay
fast. The exit codes are those of :mod:`planner.errors`.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from planner import __version__
from planner.cli.failures import exit_code_of, silence_stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "plan": "Find the best layout of a model on a cluster, with a certificate.",
    "evaluate": "Price layouts that you name: flags for one, JSON lines for many.",
    "verify": "Recheck a plan without the solver; exit code 6 when it does not hold.",
    "validate": "Compare predictions with measured runs in a CSV file.",
    "calibrate": "Fit a device, stack or link to measured runs, products or collectives.",
    "export": "Turn a plan into the flags of its target.",
    "catalog": "Show models, clusters, nodes, devices, links and stacks that ship.",
    "discover": "Write a cluster file from saved outputs of nvidia-smi, ibstat, SLURM.",
    "schema": "Print the JSON Schema of a document.",
}
"""Command and its line in ``planner --help``."""


class LazyGroup(typer.core.TyperGroup):
    """A group that imports a command's module only to run it or to print its own help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import ``planner.cli.commands.<name>`` and build its command."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            module = importlib.import_module(f"planner.cli.commands.{cmd_name}")
            command = typer.main.get_command(module.app)
            command.name = cmd_name
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; a typo gets its nearest names."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from planner.errors import InputError, did_you_mean

            raise InputError(f"no such command {name!r}", hint=did_you_mean(name, list(COMMANDS)))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="planner",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"planner {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """The best provable way to run a model on a cluster.

    MODEL, CLUSTER and JOB are names from the catalogue, files (YAML or JSON; a Hugging Face
    config.json as it is), or '-' for standard input.
    """


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        result = app(args=args, standalone_mode=False, prog_name="planner")
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        return exit_code_of(error)
    return result if isinstance(result, int) else 0


def main() -> None:
    """Console script."""
    # A command is one short computation over long-lived tables: collect cycles rarely.
    gc.set_threshold(200_000, 20, 20)
    code = run()
    silence_stdout()
    sys.exit(code)
