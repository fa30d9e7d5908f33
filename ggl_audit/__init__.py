"""ggl-audit: what a federated-learning gradient gives away, measured against controls.

From a client's training code, :func:`capture` writes a gradient and :func:`capture_update` the
update of local training, as files that an audit can read.
"""

from typing import TYPE_CHECKING

__version__ = "0.4.0"
__all__ = ["__version__", "capture", "capture_update"]

if TYPE_CHECKING:
    from ggl_audit.client.recording import capture, capture_update
else:

    def __getattr__(name: str) -> object:
        """Imports what is asked for only then, as PyTorch takes seconds (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ggl_audit.client import recording

        return getattr(recording, name)
