"""``ggl-audit schema``: JSON Schema of the spec and of the report."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer


class Document(str, Enum):
    """What has a schema."""

    SPEC = "spec"
    REPORT = "report"


def schema(document: Annotated[Document, typer.Argument(help="Which one.")]) -> None:
    """Print the JSON Schema of the spec or of report.json."""
    if document is Document.SPEC:
        from ggl_audit.defenses import with_known_defenses
        from ggl_audit.spec import Spec

        typer.echo(json.dumps(with_known_defenses(Spec.model_json_schema()), indent=2))
    else:
        from ggl_audit.report.model import Report

        typer.echo(json.dumps(Report.model_json_schema(mode="serialization"), indent=2))
