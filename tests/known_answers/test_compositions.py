"""Random compositions of defenses: a right capture is not accused, and no ceiling is too low.

What the likelihood identifies is compared with plain cosine similarity, with and without the
replica: a statistic that these beat is not the best one, and must not earn a pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import take
from ggl_audit.case.loading import load_client
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.client.randomness import client_contexts
from ggl_audit.defenses import Pipeline, SecureAggregation
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.identification import draw_trials, match
from ggl_audit.inputs.images import digits
from ggl_audit.spec import Spec

HERE = Path(__file__).parent
TRIALS, CANDIDATES, COMPOSITIONS = 8, 12, 12

STEPS: dict[str, dict[str, list[Any]]] = {
    "clip": {"bound": [0.05, 0.5, 5.0], "scope": ["global", "layer"]},
    "noise": {"std": [0.001, 0.01, 0.05], "distribution": ["gaussian", "laplace"]},
    "sparsify": {"fraction": [0.5, 0.9, 0.99], "scope": ["layer", "global"]},
    "random_k": {"fraction": [0.5, 0.9], "scope": ["layer", "global"]},
    "threshold": {"least": [0.001, 0.01]},
    "quantize": {"bits": [1, 4, 8], "scope": ["layer", "global"]},
    "qsgd": {"levels": [1, 4, 64], "norm": ["l2", "max"], "scope": ["layer", "global"]},
    "terngrad": {"clip": [None, 2.5]},
    "sign": {"scale": ["none", "mean", "layer_mean"]},
    "float_format": {"format": ["float16", "float8_e4m3"], "scale": ["none", "tensor"]},
    "soteria": {"fraction": [0.6]},
    "encryption": {"key_holder": ["the clients"]},
}
AGGREGATIONS: dict[str, dict[str, list[Any]]] = {
    "secure_aggregation": {"clients": [1, 3]},
    "sec_adam": {"clients": [1, 3]},
}


def drawn(random: np.random.Generator, table: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    def one(values: list[Any]) -> Any:
        return values[int(random.integers(len(values)))]

    name = one([*table])
    return {"name": name, **{key: one(values) for key, values in table[name].items()}}


def composition(random: np.random.Generator) -> Spec:
    steps: list[dict[str, Any]] = []
    if random.random() < 0.2:
        steps.append({"name": "federated_dropout", "kept": 0.5})
    if random.random() < 0.15:
        steps.append({"name": "clip", "bound": 0.1, "unit": "sample"})
    steps += [drawn(random, STEPS) for _ in range(int(random.integers(1, 3)))]
    if random.random() < 0.35:
        steps.append(drawn(random, AGGREGATIONS))
        if random.random() < 0.5:
            steps.append(drawn(random, STEPS))
    capture: dict[str, Any] = {"gradient": "none.safetensors"}
    if random.random() < 0.25:
        capture["batch_size"] = 3
    if random.random() < 0.15:
        capture |= {"kind": "update", "local": {"lr": 0.5, "epochs": 2, "batch_size": 2}}
    model = {
        "factory": f"{HERE / 'models.py'}:tiny_cnn",
        "input": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
    }
    return Spec.model_validate(
        {
            "version": 1,
            "model": model,
            "capture": capture,
            "defense": steps,
            "prior": {"bundled": "digits"},
        }
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_right_capture_is_accused_and_no_ceiling_is_too_low(seed: int) -> None:
    random = np.random.default_rng(seed)
    reference, device = digits("reference"), torch.device("cpu")
    compared = 0
    for _ in range(COMPOSITIONS):
        spec = composition(random)
        defense, model = load_client(spec, device)
        clients = defense.aggregation.clients
        members = model.batch_size * clients
        trials = draw_trials(reference, TRIALS, CANDIDATES, random, members - 1)
        matching = Matching(model, defense)
        sent = DeclaredClient(matching.clients, defense, reference).send(
            *trials.members, client_contexts(seed, "clients", device, range(len(trials)))
        )
        hidden = False
        for index in range(TRIALS):
            one = take(sent, index)
            checks = defense.checks.verify(one)
            if members == 1 and defense.randomness.leaves_only_noise():
                image = trials.canaries[index]
                checks.append(check_truth(matching, defense, one, image, reference.images))
            assert all(check.outcome != "contradicts" for check in checks), (str(defense), checks)
            hidden = hidden or any(check.outcome == "hidden" for check in checks)
        if hidden or not defense.likelihood.is_known():
            continue
        compared += 1
        plain = Pipeline([SecureAggregation(clients=clients)] if clients > 1 else [])
        lots = random.random(len(trials))
        with_likelihood = match(matching, trials, sent, lots).count(1)
        for other in (Matching(model, plain, "cosine"), Matching(model, defense, "cosine")):
            assert with_likelihood >= match(other, trials, sent, lots).count(1) - 1, str(defense)
    assert compared > 0
