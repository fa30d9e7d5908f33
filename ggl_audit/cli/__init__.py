"""The command line: one file a command. Each parses, calls, renders and exits."""

from __future__ import annotations

import sys
import traceback

import typer
from typer.core import TyperGroup

from ggl_audit import __version__
from ggl_audit.cli import capture, check, init, listing, prior, report, reproduce, run, schema
from ggl_audit.cli.endings import ENDED_BY_CODE, INTERRUPTED, OWN_FAULT, end
from ggl_audit.errors import AuditError


class Commands(TyperGroup):
    """Ends with a message and the documented exit code where a command cannot go on."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except AuditError as error:
            end(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            end(INTERRUPTED())
            raise typer.Exit(3) from None
        except SystemExit:
            end(ENDED_BY_CODE())
            raise typer.Exit(3) from None


app = typer.Typer(
    name="ggl-audit",
    cls=Commands,
    help="Audits what a federated-learning gradient gives away.",
    epilog="Exit: 0 passed the gate, 1 did not, 2 bad input, 3 inconclusive or cut short.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ggl-audit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Audits what a federated-learning gradient gives away."""


app.command("run")(run.run)
app.command("check")(check.check)
app.command("capture")(capture.capture)
app.add_typer(prior.app, name="prior")
app.command("list")(listing.list_parts)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("schema")(schema.schema)
app.command("init")(init.init)


def main() -> None:
    """Runs the program; even its own faults end with a documented exit code."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        end(OWN_FAULT())
        sys.exit(3)
