"""The memory that was declared is what every experiment works within."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.matching import Matching
from ggl_audit.attacks.suite import choose_attacks
from ggl_audit.audit import plan_experiments, run_audit
from ggl_audit.case.preparation import prepare
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.experiments.candidate_matching import CandidateMatching
from ggl_audit.experiments.experiment import Plan
from ggl_audit.experiments.forecast import predict_seconds
from ggl_audit.spec import Spec
from tests.conftest import Counter

MIB = 3
"""No default of anything."""

FEW = {
    "memory": MIB,
    "evidence__matching_trials": 12,
    "evidence__reconstruction_trials": 2,
    "evidence__control_trials": 1,
    "evidence__truth": None,
    "attack__steps": 2,
    "attack__evaluations": 60,
}

CLIENT = f"{Path(__file__).parent / 'known_answers' / 'clients.py'}:step"

AUDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "defended": ("sparsified", {}),
    "searched by derivatives": ("undefended", {"attack__optimizer": "adam"}),
    "a batch": ("undefended", {"capture__batch_size": 3}),
    "the client's own code": (
        "dp",
        {
            "client": {"step": CLIENT, "kwargs": {"bound": 1.0, "std": 1.0}, "batch_size": 2},
            "guarantee": {
                "unit": "sample",
                "reduction": "mean",
                "rounds": 1,
                "sampling_rate": 1,
                "delta": 1e-5,
            },
        },
    ),
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int]]:
    """Who was given how much, filled in while an audit runs."""
    found: set[tuple[str, int]] = set()

    def note(place: Any, name: str, called: str) -> None:
        original = getattr(place, name)
        signature = inspect.signature(original)

        def noted(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            found.add((called, given.arguments["memory"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, noted)

    note(ClientGradients, "__init__", "clients")
    note(Matching, "__init__", "matching")
    note(Derivatives, "__init__", "derivatives")
    return found


@pytest.mark.parametrize("name", AUDITS)
def test_no_experiment_has_a_memory_of_its_own(
    sample: Callable[..., Spec], used: set[tuple[str, int]], name: str
) -> None:
    sample_name, keys = AUDITS[name]
    spec = sample(sample_name, **FEW, **keys)
    run_audit(spec, Counter())
    case = prepare(spec)
    experiments = plan_experiments(case)
    plans = {one.name: one.plan() for one in experiments}
    predict_seconds(case, experiments[0].suite, plans)
    assert {memory for _, memory in used} == {MIB * 2**20}, used
    assert {who for who, _ in used} >= {"clients", "matching"}


def test_canaries_are_matched_as_many_at_a_time_as_fit(sample: Callable[..., Spec]) -> None:
    sizes = []
    for memory in (1, 256):
        case = prepare(sample("undefended", **{**FEW, "memory": memory}))
        plan = CandidateMatching(case, choose_attacks(case)).plan()
        assert isinstance(plan, Plan)
        sizes.append(plan.together)
    held = 3 * 4 * case.model.size
    assert sizes == [2**20 // held, 25]
