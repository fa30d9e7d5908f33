"""What must come out where the answer is known, for every scenario at several seeds.

One table. `grades` are those that the image may get in a scenario, and the label too where nothing
else is said of it; `found` are ids that its findings must hold,
and `named` are words that the verdict's reason or a finding must hold. Where the private image is
not `held`, the audit has only what an auditor of somebody else's capture has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ggl_audit.audit import run_audit
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.case import Case
from ggl_audit.defenses import Context, build_pipeline
from ggl_audit.experiments import cause
from ggl_audit.inputs.images import digits, write_image
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.messages import Said
from ggl_audit.report.model import Report
from ggl_audit.spec import AttackSpec, DefenseSpec, Spec
from tests.conftest import Counter, plain_gradient
from tests.known_answers.models import tiny_cnn

HERE = Path(__file__).parent
SEEDS = range(5)
SEEDS_OF_A_SEARCH = range(3)

LEAKS = ("C", "D", "F")
TAKEN = ("D", "F")
SAFE = ("A", "B")
NOTHING_SAID = ("inconclusive",)

SEARCHED = {
    "attack.evaluations": 480,
    "attack.method": "ggl",
    "attack.optimizer": "cma",
    "evidence.matching_trials": 60,
    "evidence.reconstruction_trials": 8,
    "evidence.control_trials": 2,
}
WELL_SEARCHED = {
    **SEARCHED,
    "attack.optimizer": AttackSpec().optimizer,
    "evidence.reconstruction_trials": 10,
}
MATCHED = {
    **SEARCHED,
    "attack.evaluations": 13,
    "evidence.matching_trials": 200,
}
CHECKED = {
    **MATCHED,
    "evidence.matching_trials": 20,
    "evidence.reconstruction_trials": 0,
    "evidence.public": ["label"],
}

Steps = list[dict[str, Any]]
Change = Callable[[Gradient], Gradient]


def noise(std: float, **more: Any) -> dict[str, Any]:
    return {"name": "noise", "std": std, **more}


def clip(bound: float) -> dict[str, Any]:
    return {"name": "clip", "bound": bound}


SPARSIFY = {"name": "sparsify", "fraction": 0.9}
SIGN = {"name": "sign"}
QUANTIZE = {"name": "quantize", "bits": 4}
DP = [clip(1.0), noise(1.0)]
STRONG_DP = [clip(1.0), noise(5.0)]
OTHER_DOMAIN = {
    "factory": f"{HERE / 'models.py'}:OtherDomain",
    "latent": {"shape": [48]},
    "labels": "index",
}
BROKEN = {"factory": f"{HERE / 'models.py'}:Broken", "latent": {"shape": [4]}}
PROMISE = {"unit": "sample", "reduction": "mean", "rounds": 1, "sampling_rate": 1, "delta": 1e-5}


def swapped(gradient: Gradient) -> Gradient:
    return {**gradient, "2.weight": gradient["4.weight"], "4.weight": gradient["2.weight"]}


def reordered(gradient: Gradient) -> Gradient:
    return {**gradient, "2.weight": gradient["2.weight"].flip(0)}


def replaced_by_noise(gradient: Gradient) -> Gradient:
    norm = torch.stack([tensor.norm() for tensor in gradient.values()]).norm()
    random = {name: torch.randn_like(tensor) for name, tensor in gradient.items()}
    size = torch.stack([tensor.norm() for tensor in random.values()]).norm()
    return {name: tensor * norm / size for name, tensor in random.items()}


def scaled_by_layer(gradient: Gradient) -> Gradient:
    return {n: t * (i + 1) for i, (n, t) in enumerate(gradient.items())}


def own_code(mistake: str, batch_size: int = 1) -> dict[str, Any]:
    """A client that sends the mean of a batch; its noise is on the mean."""
    kwargs = {"bound": 0.2, "std": 0.2 / batch_size, "mistake": mistake}
    step = f"{HERE / 'clients.py'}:step"
    return {"step": step, "kwargs": kwargs, "batch_size": batch_size}


@dataclass(frozen=True)
class Scenario:
    """One line of the table.

    Attributes:
        name: what it is.
        defense: declared.
        grades: one of these must come out for the image.
        label: one of these must come out for the label; the same unless given.
        found: ids of findings that there must be.
        named: words in the reason or the findings.
        weights: declared.
        client: what the client did differently from the declaration: model keys of the spec.
        applied: the defense that the client applied, if not the declared one.
        before: changes the client's gradient before its defense.
        after: changes what it sends.
        held: whether the auditor holds the private image.
        truth: which image the auditor holds, counted from the right one.
        budget: how much is run.
        spec: more keys of the spec.
    """

    name: str
    defense: Steps
    grades: tuple[str, ...]
    found: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    weights: str = "round_0"
    client: dict[str, Any] = field(default_factory=dict)
    applied: Steps | None = None
    before: Change | None = None
    after: Change | None = None
    held: bool = False
    truth: int = 0
    budget: dict[str, Any] = field(default_factory=lambda: SEARCHED)
    spec: dict[str, Any] = field(default_factory=dict)
    label: tuple[str, ...] = ()


TABLE = [
    # What leaks.
    Scenario("sent as it is", [], TAKEN, ("GGL001", "GGL002", "GGL003"), budget=WELL_SEARCHED),
    Scenario("sparsified", [SPARSIFY], TAKEN, ("GGL001", "GGL002"), budget=WELL_SEARCHED),
    Scenario("one bit", [SIGN], LEAKS, ("GGL002",)),
    Scenario("clipped and quantized", [clip(0.1), QUANTIZE], LEAKS, ("GGL002",)),
    Scenario("little noise", [noise(0.02)], LEAKS, ("GGL002",)),
    Scenario("little Laplace noise", [noise(0.02, distribution="laplace")], LEAKS, ("GGL002",)),
    Scenario("noise, then one bit", [noise(0.02), SIGN], LEAKS, ("GGL002",)),
    Scenario("noise, then a clip", [noise(0.02), clip(1.0)], LEAKS, ("GGL002",)),
    Scenario("noise, then sparsified", [noise(0.02), SPARSIFY], LEAKS, ("GGL002",)),
    Scenario("weak DP", [clip(1.0), noise(0.02)], LEAKS, ("GGL002",)),
    Scenario("trained, held", [], LEAKS, ("GGL002",), weights="trained", held=True),
    Scenario("batch norm in train mode", [], LEAKS, ("GGL002",), weights="bn_train"),
    Scenario("batch norm in eval mode", [], LEAKS, ("GGL002",), weights="bn_eval"),
    Scenario("prior of another domain", [], LEAKS, ("GGL002",), spec={"prior": OTHER_DOMAIN}),
    Scenario(
        "broken prior",
        [],
        ("C",),
        ("GGL002", "GGL003", "GGL007"),
        spec={"prior": BROKEN},
        held=True,
        label=TAKEN,
    ),
    Scenario(
        "no reference",
        [],
        TAKEN,
        ("GGL001",),
        budget=WELL_SEARCHED,
        spec={"evidence.reference": None},
    ),
    Scenario(
        "a loss a hundred times the declared one, in noise that hides it",
        [clip(1.0), noise(0.1)],
        ("inconclusive", "C"),
        budget=MATCHED,
        spec={"model.loss": {"scale": 0.01}},
        label=("inconclusive", *LEAKS),
    ),
    Scenario(
        "own code that sends a hundredth",
        [],
        NOTHING_SAID,
        named=("own code contradicts",),
        held=True,
        budget={**MATCHED, "evidence.reconstruction_trials": 0},
        spec={"client": {"step": f"{HERE / 'clients.py'}:hundredth"}},
        label=TAKEN,
    ),
    # What holds nothing, or next to it.
    Scenario("strong DP", STRONG_DP, SAFE, budget=MATCHED),
    Scenario(
        "strong DP, ended early",
        STRONG_DP,
        SAFE,
        budget=MATCHED,
        spec={"evidence.stop_early": True},
    ),
    Scenario("noise in place of DP", STRONG_DP, SAFE, before=replaced_by_noise, budget=MATCHED),
    Scenario(
        "strong DP, no reference",
        STRONG_DP,
        NOTHING_SAID,
        named=("samples of the prior",),
        budget=MATCHED,
        spec={"evidence.reference": None},
    ),
    Scenario(
        "strong noise without a clip",
        [noise(5.0)],
        NOTHING_SAID,
        named=("belongs to the declared model",),
        budget={**MATCHED, "attack.evaluations": 200},
        label=("inconclusive", "C"),
    ),
    Scenario(
        "noise in place of a gradient",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("unlike the canaries",),
        after=replaced_by_noise,
    ),
    Scenario(
        "noise in place of a noisy gradient",
        [noise(0.02)],
        NOTHING_SAID,
        ("GGL005",),
        ("unlike the canaries",),
        before=replaced_by_noise,
    ),
    # Captures that are not what was declared.
    Scenario("swapped layers", [], NOTHING_SAID, ("GGL005",), ("swapped",), after=swapped),
    Scenario("reordered", [], NOTHING_SAID, ("GGL005",), ("order or layout",), after=reordered),
    Scenario(
        "another model",
        [SPARSIFY],
        NOTHING_SAID,
        ("GGL005",),
        ("another model or round",),
        client={"weights": "other"},
    ),
    Scenario(
        "another round",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("another model or round",),
        client={"weights": "trained"},
    ),
    Scenario(
        "wrong normalization",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("normalized with mean [0.0]",),
        client={"input": {"shape": [1, 16, 16], "mean": [0.0], "std": [1.0]}},
    ),
    Scenario(
        "half the declared loss",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("model.loss.scale 0.5 would fit",),
        client={"loss": {"scale": 0.5}},
        budget=CHECKED,
    ),
    Scenario(
        "train in place of eval mode",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("mode",),
        weights="bn_eval",
        client={"mode": "train"},
    ),
    Scenario(
        "eval in place of train mode",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("mode",),
        weights="bn_train",
        client={"mode": "eval"},
    ),
    Scenario(
        "another image's",
        [],
        NOTHING_SAID,
        ("GGL005",),
        ("the private image",),
        held=True,
        truth=40,
        budget=CHECKED,
    ),
    # Mistakes in what the client sent, seen in the capture.
    Scenario(
        "noise left out", DP, NOTHING_SAID, ("GGL005",), ("noise",), applied=DP[:1], budget=CHECKED
    ),
    Scenario(
        "a tenth of the noise",
        DP,
        NOTHING_SAID,
        ("GGL005",),
        ("noise",),
        applied=[clip(1.0), noise(0.1)],
        budget=CHECKED,
    ),
    Scenario(
        "noise before the clip",
        DP,
        NOTHING_SAID,
        ("GGL005",),
        ("noise",),
        applied=DP[::-1],
        budget=CHECKED,
    ),
    Scenario(
        "clip left out",
        [clip(0.5)],
        NOTHING_SAID,
        ("GGL005",),
        ("clip",),
        applied=[],
        budget=CHECKED,
    ),
    Scenario(
        "fewer zeros",
        [SPARSIFY],
        NOTHING_SAID,
        ("GGL005",),
        ("zero",),
        applied=[{"name": "sparsify", "fraction": 0.8}],
        budget=CHECKED,
    ),
    Scenario(
        "more levels",
        [QUANTIZE],
        NOTHING_SAID,
        ("GGL005",),
        ("levels",),
        applied=[{"name": "quantize", "bits": 6}],
        budget=CHECKED,
    ),
    Scenario(
        "signs of several sizes",
        [SIGN],
        NOTHING_SAID,
        ("GGL005",),
        ("magnitudes",),
        after=scaled_by_layer,
        budget=CHECKED,
    ),
    # Mistakes in the client's own code, seen on canaries.
    *(
        Scenario(
            f"own code: {mistake}, batches of {batch_size}",
            [clip(0.2), noise(0.2 / batch_size)],
            ("inconclusive", "C"),
            ("GGL006",),
            ("mu is at least",),
            budget={**CHECKED, "evidence.matching_trials": trials},
            spec={"client": own_code(mistake, batch_size), "guarantee": PROMISE},
        )
        for mistake, batch_size, trials in (
            ("no noise", 1, 20),
            ("no noise", 4, 20),
            ("a tenth of the noise", 1, 20),
            ("a tenth of the noise", 4, 20),
            ("noise before clip", 1, 20),
            ("batch clipped", 4, 200),
        )
    ),
    *(
        Scenario(
            f"own code: right, batches of {batch_size}",
            [clip(0.2), noise(0.2 / batch_size)],
            grades,
            budget={**MATCHED, "evidence.reconstruction_trials": 0},
            spec={"client": own_code("none", batch_size), "guarantee": PROMISE, **public},
            # At a noise multiplier of 1 a classifier tells the label, and the last layer a little.
            label=("C", "D"),
        )
        for batch_size, grades, public in (
            (1, SAFE, {}),
            (4, NOTHING_SAID, {"evidence.public": ["label"]}),
        )
    ),
    Scenario(
        "an epsilon that the noise does not give",
        DP,
        NOTHING_SAID,
        ("GGL006",),
        ("claimed",),
        budget={**MATCHED, "evidence.reconstruction_trials": 0},
        spec={"guarantee": {**PROMISE, "epsilon": 1.0}},
        label=("C",),
    ),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights at round 0, after training, and of another model; with and without batch norm."""
    folder = tmp_path_factory.mktemp("weights")
    seen = digits("prior")

    def save(name: str, seed: int, batch_norm: bool, steps: int) -> None:
        torch.manual_seed(seed)
        model = tiny_cnn(batch_norm)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            chosen = torch.randint(len(seen), (64,))
            optimizer.zero_grad()
            images = (seen.images[chosen] - 0.5) / 0.5
            F.cross_entropy(model(images), seen.labels[chosen]).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / f"{name}.safetensors")

    save("round_0", 0, False, 0)
    save("other", 1, False, 0)
    save("trained", 0, False, 300)
    save("bn", 0, True, 30)
    return folder


def model_keys(scenario: Scenario, weights: Path) -> dict[str, Any]:
    batch_norm = scenario.weights.startswith("bn")
    name = "bn" if batch_norm else scenario.weights
    return {
        "factory": f"{HERE / 'models.py'}:tiny_cnn",
        "kwargs": {"batch_norm": batch_norm},
        "weights": str(weights / f"{name}.safetensors"),
        "input": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
        "mode": "train" if scenario.weights == "bn_train" else "eval",
    }


def run(
    scenario: Scenario, seed: int, sample: Callable[..., Spec], weights: Path, folder: Path
) -> Report:
    """Makes the client's capture with a plain backward pass, and audits it as declared."""
    private = digits("private")
    image, label = private.images[3 * seed], int(private.labels[3 * seed])
    declared = model_keys(scenario, weights)
    done = {**declared, **scenario.client}
    if "weights" in scenario.client:
        done["weights"] = str(weights / f"{scenario.client['weights']}.safetensors")

    torch.manual_seed(seed)
    client = load_model(sample("undefended", model=done), torch.device("cpu"))
    gradient = plain_gradient(client, image, label)
    if scenario.before:
        gradient = scenario.before(gradient)
    steps = scenario.defense if scenario.applied is None else scenario.applied
    pipeline = build_pipeline([DefenseSpec.model_validate(step) for step in steps])
    sent = pipeline.apply(gradient, Context(torch.Generator().manual_seed(seed)))
    if scenario.after:
        sent = scenario.after(sent)
    save_file({name: t.contiguous() for name, t in sent.items()}, folder / "sent.safetensors")
    held = private.images[3 * seed + scenario.truth]
    write_image(folder / "held.png", held)

    keys = {
        **scenario.budget,
        "seed": seed,
        "model": declared,
        "defense": scenario.defense,
        "capture.gradient": str(folder / "sent.safetensors"),
        "evidence.truth": str(folder / "held.png") if scenario.held else None,
        **scenario.spec,
    }
    return run_audit(sample("undefended", **keys), Counter())


@pytest.mark.parametrize(
    ("scenario", "seed"),
    [
        pytest.param(scenario, seed, id=f"{scenario.name}-seed{seed}")
        for scenario in TABLE
        for seed in (SEEDS_OF_A_SEARCH if scenario.budget in (SEARCHED, WELL_SEARCHED) else SEEDS)
    ],
)
def test_the_known_answer_comes_out(
    scenario: Scenario, seed: int, sample: Callable[..., Spec], weights: Path, tmp_path: Path
) -> None:
    report = run(scenario, seed, sample, weights, tmp_path)
    ids = [finding.id for finding in report.findings]
    image, label = report.verdict.of("image"), report.verdict.of("label")
    said = [image.reason, *(f"{f.title}. {f.detail}" for f in report.findings)]
    assert image.grade in scenario.grades, (report.verdict, ids)
    if label.public:
        assert label.grade is None
    else:
        assert label.grade in (scenario.label or scenario.grades), (report.verdict, ids)
    passes = image.grade in SAFE and label.grade in (None, *SAFE)
    assert (report.verdict.exit_code == 0) == passes
    assert set(scenario.found) <= set(ids), said
    for words in scenario.named:
        assert any(words in text for text in said), said
    # A client that breaks its promise does not send what was declared either.
    if not {"GGL005", "GGL006"} & set(scenario.found):
        assert "GGL005" not in ids
    if "GGL006" not in scenario.found:
        assert "GGL006" not in ids


@pytest.mark.parametrize("seed", SEEDS[:2], ids=lambda seed: f"seed{seed}")
@pytest.mark.parametrize("name", ["reordered", "wrong normalization"])
def test_the_default_search_gives_the_known_answer(
    name: str, seed: int, sample: Callable[..., Spec], weights: Path, tmp_path: Path
) -> None:
    scenario = next(one for one in TABLE if one.name == name)
    assert WELL_SEARCHED["attack.optimizer"] != SEARCHED["attack.optimizer"]
    searched = dataclasses.replace(scenario, budget=WELL_SEARCHED)
    report = run(searched, seed, sample, weights, tmp_path)
    said = [report.verdict.reason, *(f"{f.title}. {f.detail}" for f in report.findings)]
    assert report.verdict.grade in scenario.grades
    for words in scenario.named:
        assert any(words in text for text in said), said


def test_a_declaration_that_is_the_same_in_effect_accuses_no_capture(
    sample: Callable[..., Spec], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried, as the capture is explained less well than most canaries are."""
    asked = []

    def the_same(case: Case) -> Iterator[tuple[Said, Case]]:
        asked.append(case)
        yield Said("test/nothing", "nothing else"), case

    monkeypatch.setattr(cause, "other_models", the_same)
    scenario = next(one for one in TABLE if one.name == "sent as it is")
    scenario = dataclasses.replace(scenario, budget=SEARCHED)
    report = run(scenario, 3, sample, weights, tmp_path)
    assert asked
    assert report.captured.likeness is not None
    # So short a search may leave it between like and unlike.
    assert report.captured.likeness.outcome != "unlike"
    assert report.captured.likeness.cause is None


def test_a_broken_prior_does_not_hide_a_leak(
    sample: Callable[..., Spec], weights: Path, tmp_path: Path
) -> None:
    """By GGL alone it is a C, as the table has it; the attack on pixels needs no prior."""
    scenario = next(one for one in TABLE if one.name == "broken prior")
    budget = {
        **SEARCHED,
        "attack.method": "auto",
        "attack.evaluations": 26,
        "attack.steps": 200,
        "evidence.reconstruction_trials": 20,
    }
    report = run(dataclasses.replace(scenario, budget=budget), 0, sample, weights, tmp_path)
    assert report.verdict.of("image").grade in TAKEN
    assert report.evidence.attack == "pixels"
    assert "GGL001" in [finding.id for finding in report.findings]


def test_the_table_is_a_table() -> None:
    names = [scenario.name for scenario in TABLE]
    assert len(set(names)) == len(names) >= 24
    assert len(SEEDS) >= 5
    assert all(dataclasses.is_dataclass(scenario) for scenario in TABLE)
