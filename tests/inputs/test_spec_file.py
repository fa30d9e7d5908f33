from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ggl_audit.cli.init import TEMPLATE
from ggl_audit.errors import AuditError, InputError, SpecError
from ggl_audit.inputs.spec_file import parse_defense, parse_override, read_spec

GOOD = """\
version: 1
model:
  factory: models.py:net
  input: {shape: [1, 8, 8]}
capture: {gradient: g.safetensors}
defense:
  - {name: sparsify, fraction: 0.9}
  - {name: noise, std: 0.1}
prior: {bundled: digits}
evidence:
  reference: {bundled: digits}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "audit.yaml"
    path.write_text(text)
    return path


def test_paths_start_at_the_folder_of_the_spec(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, GOOD))
    assert spec.resolve(spec.capture.gradient) == tmp_path / "g.safetensors"


def test_every_field_can_be_overridden(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    spec = read_spec(path, [("defense.1.std", 0.5), ("seed", 7), ("attack.evaluations", 99)])
    assert spec.defense[1].model_extra == {"std": 0.5}
    assert (spec.seed, spec.attack.evaluations) == (7, 99)


def test_without_a_file_the_flags_are_enough() -> None:
    overrides = [
        ("model.factory", "m:f"),
        ("model.input.shape", [1, 8, 8]),
        ("capture.gradient", "g.pt"),
        ("prior", {"bundled": "digits"}),
        ("evidence.reference", {"bundled": "digits"}),
    ]
    assert read_spec(None, overrides).model.factory == "m:f"


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("  factory:", "  factroy:", 3, ["model.factroy", "unknown key", "'factory'"]),
        ("prior: {bundled", "prior: {bundeld", 9, ["prior.bundeld", "'bundled'"]),
        (
            "capture: {gradient",
            "capture: {kind: update, gradient",
            5,
            ["capture", "update", "local"],
        ),
        ("shape: [1, 8, 8]", "shape: [1, 8]", 4, ["model.input.shape", "missing"]),
        ("shape: [1, 8, 8]", "shape: [1, 8, 8], std: [0]", 4, ["std", "greater than 0"]),
        ("version: 1", "version: 2", 1, ["version", "1"]),
        ("evidence:", "attack: {evaluations: 5}\nevidence:", 10, ["attack", "at least 13"]),
        ("evidence:", "evidnce: {}\nevidence:", 10, ["unknown key", "'evidence'"]),
    ],
)
def test_a_wrong_key_is_named_with_its_line(
    tmp_path: Path, before: str, after: str, line: int, words: list[str]
) -> None:
    path = written(tmp_path, GOOD.replace(before, after, 1))
    with pytest.raises(SpecError) as error:
        read_spec(path)
    message = str(error.value)
    assert f"audit.yaml:{line}:" in message
    for word in words:
        assert word in message


def test_an_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="command line: seed"):
        read_spec(written(tmp_path, GOOD), [("seed", -1)])


@pytest.mark.parametrize(
    ("key", "words"), [("defense.5.std", "the list has 2"), ("seed.x", "is a value")]
)
def test_an_override_of_nothing_is_an_error(tmp_path: Path, key: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_spec(written(tmp_path, GOOD + "seed: 3\n"), [(key, 1)])


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2", "a: &x [*x", "\x00", "a: !!python/object:os {}"]
)
def test_what_is_not_a_spec_is_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(AuditError):
        read_spec(written(tmp_path, text))


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_spec(tmp_path / "none.yaml")


def test_the_init_template_is_a_valid_spec(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, TEMPLATE))
    assert [step.name for step in spec.defense] == ["clip", "noise"]


def test_the_defense_flag() -> None:
    assert parse_defense("clip:bound=1+noise:std=0.1") == [
        {"name": "clip", "bound": 1},
        {"name": "noise", "std": 0.1},
    ]
    assert parse_defense("sparsify:fraction=0.9,scope=global") == [
        {"name": "sparsify", "fraction": 0.9, "scope": "global"}
    ]
    assert parse_defense("sign") == [{"name": "sign"}]
    assert parse_defense("none") == []
    with pytest.raises(AuditError, match="has no value"):
        parse_defense("clip:bound")


def test_the_set_flag_reads_yaml() -> None:
    assert parse_override("model.input.mean=[0.1, 0.2]") == ("model.input.mean", [0.1, 0.2])
    with pytest.raises(AuditError, match="path=value"):
        parse_override("seed")


def test_the_sample_specs_are_what_yaml_says(samples: Path) -> None:
    for path in samples.glob("*.yaml"):
        spec = read_spec(path)
        assert spec.model.factory == yaml.safe_load(path.read_text())["model"]["factory"]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "defense: []\n")
    with pytest.raises(InputError, match=r"audit\.yaml:12: the key 'defense' stands here twice"):
        read_spec(path)
    path = written(tmp_path, GOOD.replace("fraction: 0.9", "fraction: 0.9, fraction: 0.1"))
    with pytest.raises(InputError, match="'fraction' stands here twice"):
        read_spec(path)


@pytest.mark.parametrize("value", ["2020-99-99", "[", "!!binary x"])
def test_a_value_that_is_not_yaml_is_one_message(value: str) -> None:
    with pytest.raises(AuditError, match="is not a YAML value"):
        parse_override(f"seed={value}")
    with pytest.raises(AuditError, match="is not a YAML value"):
        parse_defense(f"noise:std={value}")


@pytest.mark.parametrize("value", ["!!binary '/+8='", "&x [*x]"])
def test_what_the_report_could_not_repeat_is_refused_at_once(tmp_path: Path, value: str) -> None:
    text = GOOD.replace("input:", f"kwargs: {{a: {value}}}\n  input:")
    with pytest.raises(AuditError):
        read_spec(written(tmp_path, text))


OWN = """\
version: 1
model:
  factory: models.py:net
  weights: w.safetensors
  input: {shape: [1, 8, 8]}
capture: {gradient: g.safetensors}
defense:
  - {factory: own.py:Own}
client: {step: client.py:step}
prior: {trained: prior}
evidence:
  reference: {folder: pictures}
  truth: t.png
"""
PATHS = {
    "model.factory": ("models.py:net", ":net"),
    "model.weights": ("w.safetensors", ""),
    "capture.gradient": ("g.safetensors", ""),
    "defense.0.factory": ("own.py:Own", ":Own"),
    "client.step": ("client.py:step", ":step"),
    "prior.trained": ("prior}", ""),
    "evidence.reference.folder": ("pictures", ""),
    "evidence.truth": ("t.png", ""),
}


@pytest.fixture
def spec_folder(tmp_path: Path) -> Path:
    """A folder for a spec, beside which lies what it must not reach."""
    (tmp_path / "outside.py").write_text("")
    (tmp_path / "outside").mkdir()
    (tmp_path / "spec").mkdir()
    return tmp_path / "spec"


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("way", ["up", "absolute", "up and down", "link"])
def test_a_path_in_a_spec_stays_in_its_folder(spec_folder: Path, key: str, way: str) -> None:
    before, end = PATHS[key]
    (spec_folder / "link.py").symlink_to(spec_folder.parent / "outside.py")
    path = {
        "up": "../outside.py",
        "absolute": str(spec_folder.parent / "outside.py"),
        "up and down": "../spec/../outside.py",
        "link": "link.py",
    }[way]
    brace = "}" if before.endswith("}") else ""
    text = OWN.replace(before, path + end + brace)
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if path in row)
    with pytest.raises(SpecError) as error:
        read_spec(written(spec_folder, text))
    message = str(error.value)
    assert re.search(rf"audit\.yaml:{line}: {re.escape(key)}(\.0)?: ", message)
    assert "leads out of the folder of the spec" in message
    flag = {
        "model.factory": "--model",
        "model.weights": "--weights",
        "capture.gradient": "--gradient",
        "prior.trained": "--prior",
        "evidence.reference.folder": "--reference",
        "evidence.truth": "--truth",
    }.get(key, f"--set {key}=PATH")
    assert flag in message
    given = read_spec(written(spec_folder, text), [(key, path + end)])
    assert given.folder == spec_folder


def test_paths_below_the_folder_are_read(spec_folder: Path) -> None:
    (spec_folder / "real.safetensors").write_bytes(b"")
    (spec_folder / "w.safetensors").symlink_to("real.safetensors")
    text = OWN.replace("g.safetensors", "captures/../g.safetensors")
    assert read_spec(written(spec_folder, text)).model.weights == Path("w.safetensors")
    assert read_spec(written(spec_folder, OWN.replace("t.png", str(spec_folder / "t.png"))))


def test_a_linked_folder_holds_its_own_spec(spec_folder: Path) -> None:
    written(spec_folder, OWN)
    (spec_folder.parent / "linked").symlink_to(spec_folder)
    spec = read_spec(spec_folder.parent / "linked" / "audit.yaml")
    assert spec.folder == spec_folder.parent / "linked"


def test_a_link_in_a_prior_of_a_spec_stays_in_its_folder(spec_folder: Path) -> None:
    (spec_folder / "prior").mkdir()
    path = written(spec_folder, OWN)
    read_spec(path)
    (spec_folder / "prior" / "card.yaml").symlink_to(spec_folder.parent / "outside.py")
    with pytest.raises(SpecError, match=r"audit\.yaml:10: prior\.trained: .* leads out"):
        read_spec(path)


def test_an_override_of_one_key_does_not_free_the_others(spec_folder: Path) -> None:
    path = written(spec_folder, OWN.replace("w.safetensors", "../w.safetensors"))
    with pytest.raises(SpecError, match=r"model\.weights"):
        read_spec(path, [("model.factory", "/elsewhere.py:net"), ("model.kwargs.a", 1)])
