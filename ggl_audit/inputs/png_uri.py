"""Pictures as text: PNG in a data URI, for reports and ledgers."""

from __future__ import annotations

import base64
import io
from typing import Annotated

import torch
from PIL import Image
from pydantic import AfterValidator

from ggl_audit.errors import AuditError, ReasonError
from ggl_audit.inputs.images import decode_picture, to_picture
from ggl_audit.messages import Message

PNG_URI = "data:image/png;base64,"

NO_PNG = Message(
    "report/no-png",
    "not a PNG in a data URI",
    advice="Give a `report.json` as `ggl-audit run -o report.json` wrote it.",
)


def png_uri(image: torch.Tensor) -> str:
    """Encodes (channels, height, width) in [0, 1] as an 8-bit PNG in a data URI."""
    buffer = io.BytesIO()
    to_picture(image).save(buffer, format="PNG")
    return PNG_URI + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(uri: str) -> Image.Image:
    """Decodes what :func:`png_uri` encoded.

    Raises:
        ValueError: it is not such a URI.
        AuditError: the picture is broken, or larger than any of a report.
    """
    if not uri.startswith(PNG_URI):
        raise ValueError("not a PNG data URI")
    return decode_picture(base64.b64decode(uri[len(PNG_URI) :], validate=True), ("PNG",))


def _decodable(uri: str) -> str:
    try:
        picture(uri)
    except (ValueError, AuditError):
        raise ReasonError(NO_PNG()) from None
    return uri


PngUri = Annotated[str, AfterValidator(_decodable)]
"""A PNG in a data URI, which can be decoded."""
