"""How the program ends where a command cannot go on."""

from __future__ import annotations

import typer

from ggl_audit.errors import AuditError
from ggl_audit.messages import Message, Said

INTERRUPTED = Message(
    "inconclusive/interrupted",
    "interrupted before anything was measured",
    advice="Run it again.",
)
TRAINING_INTERRUPTED = Message(
    "inconclusive/training-interrupted",
    "interrupted; {how}",
    advice="Run it again; `prior train` goes on with `--resume`.",
)
ENDED_BY_CODE = Message(
    "inconclusive/ended-by-code",
    "the model or the prior ended the program",
    advice="Take `sys.exit` and the like out of your code.",
)
OWN_FAULT = Message(
    "inconclusive/own-fault",
    "a fault of this program; nothing can be concluded",
    advice="Report it with the traceback; it is not your input's fault.",
)


def end(why: AuditError | Said) -> None:
    """Writes why the program ends, with the code by which docs/inputs.md has it."""
    typer.echo(f"ggl-audit: {why} [{why.code}]", err=True)
