"""ggl-audit: what a federated-learning gradient gives away, measured against controls."""

__version__ = "0.1.0"
