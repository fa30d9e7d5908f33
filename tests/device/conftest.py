"""The device that these tests run on, and what is compared with the processor's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ggl_audit.basics.device import settle
from tests.device import pretended

NAMED = os.environ.get("GGL_AUDIT_TEST_DEVICE", "")


@pytest.fixture(scope="session")
def _registered() -> None:
    if NAMED.startswith(pretended.NAME):
        if not pretended.EXISTS:
            pytest.skip("this PyTorch cannot be given a backend in Python")
        torch.Generator = pretended.begin()  # type: ignore[assignment,misc]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what is marked ``device`` where none is named."""
    reason = "GGL_AUDIT_TEST_DEVICE names no device; test_pretended.py runs these on one"
    for item in items:
        if item.get_closest_marker("device") and not NAMED:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device(_registered: None) -> Iterator[torch.device]:
    """``GGL_AUDIT_TEST_DEVICE``: cpu, cuda, ...; pretended, or pretended32 which has no float64."""
    if NAMED.startswith(pretended.NAME):
        with pretended.Pretended(lacks_float64=NAMED.endswith("32")):
            yield torch.device(pretended.NAME)
        return
    found = torch.device(NAMED)
    settle(found)
    yield found
