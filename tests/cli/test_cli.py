from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ggl_audit import __version__
from ggl_audit.cli import app
from ggl_audit.inputs.images import digits

SMALL = [
    "--device=cpu",
    "--set=attack.evaluations=100",
    "--set=attack.steps=4",
    "--set=evidence.matching_trials=10",
    "--set=evidence.reconstruction_trials=2",
    "--set=evidence.control_trials=1",
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result) -> str:
    """The one message of a refused input."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


@pytest.fixture
def spec(samples: Path) -> Path:
    return samples / "digits_sparsified.yaml"


def test_an_audit_writes_its_reports_and_exits_by_the_gate(spec: Path, tmp_path: Path) -> None:
    html, data = tmp_path / "r.html", tmp_path / "r.json"
    result = call("run", spec, *SMALL, "-o", html, "-o", data)
    grade = json.loads(data.read_text())["verdict"]["grade"]
    assert html.read_text().startswith("<!doctype html>")
    assert result.exit_code == {"A": 0, "B": 0, "C": 1, "D": 1, "F": 1, "inconclusive": 3}[grade]
    assert "Remedy" in result.stdout
    assert "candidate matching" in result.stderr


PUBLIC_LABEL = "--set=evidence.public=[label]"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--set=evidence.matching_trials=80"], 1),
        (["--set=evidence.matching_trials=80", "--exit-zero"], 0),
        (["--set=evidence.matching_trials=80", "--fail-on=F", PUBLIC_LABEL], 0),
        (["--set=evidence.matching_trials=80", "--fail-on=F"], 1),
        (["--set=evidence.matching_trials=0"], 3),
        (["--set=evidence.matching_trials=0", "--exit-zero"], 3),
    ],
)
def test_the_exit_codes(samples: Path, flags: list[str], code: int) -> None:
    result = call("run", samples / "digits_noise.yaml", *SMALL, *flags, "-q")
    assert result.exit_code == code, result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
    assert result.stderr == ""


def test_flags_alone_declare_an_audit(samples: Path) -> None:
    result = call(
        "run",
        "--model", f"{samples / 'models.py'}:small_cnn",
        "--weights", samples / "weights" / "round_0.safetensors",
        "--shape", "1,16,16",
        "--set", "model.input.mean=[0.5]",
        "--set", "model.input.std=[0.5]",
        "--gradient", samples / "captures" / "dp.safetensors",
        "--defense", "clip:bound=1+noise:std=1",
        "--set",
        "guarantee={unit: sample, reduction: sum, rounds: 1, sampling_rate: 1, delta: 1.0e-5}",
        "--prior", "digits",
        "--reference", "digits",
        *SMALL,
    )  # fmt: skip
    assert result.exit_code in (0, 1, 3), result.output
    assert "epsilon 4.38" in result.stdout


@pytest.mark.parametrize(
    "command",
    [["run"], ["check"], ["capture", "--image=none.png"], ["prior", "train", "--data=digits"]],
    ids=lambda command: command[0],
)
def test_no_command_computes_with_more_threads_than_there_are(
    spec: Path, tmp_path: Path, command: list[str]
) -> None:
    place = tmp_path / "prior" if command[0] == "prior" else spec
    message = refused(call(*command, place, "--threads", 10**6))
    assert "--threads 1000000, but this process may use" in message


WARNS = """
import warnings
from models import small_cnn as quiet
def small_cnn():
    warnings.warn("the building takes long")
    model = quiet()
    model.register_forward_pre_hook(lambda *_: warnings.warn("the forward pass takes long"))
    return model
"""


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("flag", [None, "-q", "-v"])
def test_what_libraries_warn_of_is_counted_or_shown_once(
    samples: Path, tmp_path: Path, command: str, flag: str | None
) -> None:
    shutil.copytree(samples, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models.py").rename(tmp_path / "quiet_models.py")
    (tmp_path / "models.py").write_text(WARNS.replace("from models", "from quiet_models"))
    arguments = [*SMALL, "--set=evidence.reconstruction_trials=0"] if command == "run" else []
    arguments += [] if flag is None else [flag]
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        warnings.simplefilter("always")
        result = call(command, tmp_path / "digits_undefended.yaml", *arguments)
    assert result.exit_code in (0, 1, 3), result.output
    shown = {None: 0, "-q": 0, "-v": 1}[flag]
    for text in ("the building takes long", "the forward pass takes long"):
        assert result.output.count(text) == shown
    told = re.findall(r"(\d+) warnings of libraries; -v shows them", result.stderr)
    assert len(told) == (flag is None)
    if flag == "-q":
        assert result.stderr == ""


def test_relative_flags_start_at_the_current_folder(
    samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(samples / "captures")
    result = call(
        "run", samples / "digits_sparsified.yaml", "--gradient", "sparsified.safetensors",
        "--truth", "private.png", *SMALL,
    )  # fmt: skip
    assert result.exit_code != 2, result.stderr


@pytest.fixture
def bad(samples: Path, tmp_path: Path) -> Path:
    """A folder of files, each of which is wrong in one way."""
    folder = tmp_path / "in"
    folder.mkdir()
    good = load_file(samples / "captures" / "sparsified.safetensors")
    zero = {name: torch.zeros_like(tensor) for name, tensor in good.items()}
    for name, changes in {
        "renamed": {"x": good["0.weight"].clone()},
        "reshaped": {"0.bias": torch.ones(32)},
        "integers": {"0.bias": torch.ones(16).int()},
        "nan": {"0.bias": torch.full((16,), torch.nan)},
        "zero": zero,
    }.items():
        kept = {n: t for n, t in good.items() if name != "renamed" or n != "0.weight"}
        save_file({**kept, **changes}, folder / f"{name}.safetensors")
    whole = (samples / "captures" / "sparsified.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:1000])
    torch.save({"0.weight": Path("x")}, folder / "pickle.pt")
    (folder / "gans.py").write_text(
        "from torch import nn\n"
        "def wide():\n    return nn.Sequential(nn.Linear(4, 27), nn.Unflatten(1, (3, 3, 3)))\n"
        "def broken():\n    return nn.Linear(5, 5)\n"
    )
    (folder / "empty.npz").write_bytes(b"")
    (folder / "folder.html").mkdir()
    return folder


LATENT = "latent: {shape: [4]}"

BAD_INPUTS = {
    "missing capture": ("--gradient=none.safetensors", ["none.safetensors", "no such file"]),
    "missing weights": ("--weights=none.pt", ["none.pt", "no such file"]),
    "missing truth": ("--truth=none.png", ["none.png", "no such file"]),
    "renamed": ("--gradient=BAD/renamed.safetensors", ["holds 'x'", "(16, 1, 3, 3)"]),
    "reshaped": ("--gradient=BAD/reshaped.safetensors", ["'0.bias'", "(32,)", "'2.bias'"]),
    "integers": ("--gradient=BAD/integers.safetensors", ["'0.bias' is int32"]),
    "nan": ("--gradient=BAD/nan.safetensors", ["16 values", "NaN"]),
    "zero": ("--gradient=BAD/zero.safetensors", ["every value is zero"]),
    "truncated": ("--gradient=BAD/cut.safetensors", ["truncated"]),
    "pickle": ("--gradient=BAD/pickle.pt", ["could run code"]),
    "defense": ("--defense=sparsfy:fraction=0.9", ["defense.0.name", "'sparsify'"]),
    "parameter": ("--defense=sparsify:share=0.9", ["defense.0.share", "fraction"]),
    "no parameter": ("--defense=noise", ["defense.0.std", "missing"]),
    "optimizer": ("--set=attack.optimizer=nevergrad:OldCAM", ["'OldCMA'"]),
    "budget": ("--set=attack.evaluations=5", ["attack", "at least 13"]),
    "prior": ("--prior=digit", ["prior.bundled", "'digits'"]),
    "prior folder": ("--prior=BAD", ["no card.yaml"]),
    "prior size": (
        f"--set=prior={{factory: 'BAD/gans.py:wide', {LATENT}}}",
        ["[3, 3, 3]", "[1, 16, 16]", "prior train"],
    ),
    "prior fails": (
        f"--set=prior={{factory: 'BAD/gans.py:broken', {LATENT}}}",
        ["prior", "RuntimeError"],
    ),
    "reference": ("--reference=BAD/empty.npz", ["empty.npz", "not a whole"]),
    "candidates": ("--set=evidence.candidates=200", ["evidence.candidates", "50 images"]),
    "label": ("--set=capture.labels=[10]", ["capture.labels.0", "0 to 9"]),
    "device": ("--device=tpu", ["device", "'tpu'"]),
    "no gpu": ("--device=cuda:7", ["there is no cuda:7"]),
    "grade": ("--fail-on=E", ["gate.fail_on", "'E'"]),
    "output": ("--output=report.pdf", ["unknown format '.pdf'"]),
    "output folder": ("--output=none/report.html", ["no folder none"]),
    "output is a folder": ("--output=BAD/folder.html", ["is a folder"]),
    "infinite": ("--defense=noise:std=.inf", ["defense.0.std", "finite"]),
    "set": ("--set=seed", ["path=value"]),
    "unknown key": ("--set=attack.budget=9", ["attack.budget", "unknown key"]),
    "lpips": ("--set=evidence.lpips={weights: none.pth}", ["none.pth", "no such file"]),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_bad_input_is_one_clear_message_and_exit_2(
    spec: Path, bad: Path, tmp_path: Path, what: str
) -> None:
    argument, words = BAD_INPUTS[what]
    out = tmp_path / "out.json"
    message = refused(call("run", spec, *SMALL, "-o", out, argument.replace("BAD", str(bad))))
    for word in words:
        assert word in message
    assert not out.exists()


def test_a_wrong_key_is_named_with_file_and_line(samples: Path, tmp_path: Path) -> None:
    shutil.copytree(samples, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "audit.yaml"
    text = (samples / "digits_sparsified.yaml").read_text()
    path.write_text(text.replace("sparsify", "sparsfy"))
    line = next(i for i, row in enumerate(path.read_text().splitlines(), 1) if "sparsfy" in row)
    assert f"audit.yaml:{line}: defense.0.name" in refused(call("run", path))
    path.write_text(text.replace("prior:", "priors:"))
    assert "priors: unknown key. Did you mean 'prior'" in refused(call("run", path))


def test_a_name_in_a_file_cannot_steer_the_terminal(
    samples: Path, spec: Path, tmp_path: Path
) -> None:
    good = load_file(samples / "captures" / "sparsified.safetensors")
    path = tmp_path / "x.safetensors"
    evil = "\x1b[2J\x1b]0;title\x07"
    save_file({**good, evil: torch.zeros(2)}, path)
    shown = call("check", spec, "--gradient", path).output
    save_file({evil: good.pop("0.weight"), **good}, path)
    for message in (shown, refused(call("run", spec, "--gradient", path))):
        assert "\x1b" not in message
        assert r"\x1b[2J" in message


def test_check_shows_the_parameters_and_predicts_the_cost(samples: Path) -> None:
    result = call("check", samples / "digits_sparsified.yaml", "--device=cpu")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert re.search(r"0\.weight = 16x1x3x3 [\d.]+ 89\.6% 16 0\.bias", text)
    assert "matched by name 90.0% of its values are zero" in text
    assert "label 2, inferred" in text
    assert "sparsify(fraction=0.9, scope=layer): agrees" in text
    assert re.search(r"evaluates [\d,]+ candidates, about \d+ s", text)
    contradicted = call(
        "check", samples / "digits_sparsified.yaml", "--device=cpu",
        "--gradient", samples / "captures" / "undefended.safetensors",
    )  # fmt: skip
    assert contradicted.exit_code == 3
    assert "contradicts" in contradicted.stdout


def test_capture_writes_what_run_reads(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.safetensors"
    private = samples / "captures" / "private.png"
    spec = samples / "digits_noise.yaml"
    assert call("capture", spec, "--image", private, "--label", 2, "-o", out).exit_code == 0
    assert out.read_bytes() == (samples / "captures" / "noise.safetensors").read_bytes()
    other = tmp_path / "h.safetensors"
    call("capture", spec, "--image", private, "--label", 2, "-o", other, "--seed", 1)
    assert other.read_bytes() != out.read_bytes()
    assert "the label is 10" in refused(
        call("capture", spec, "--image", private, "--label", 10, "-o", out)
    )


def test_report_shows_converts_and_compares(spec: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "r.json", tmp_path / "r.html"
    first = call("run", spec, *SMALL, "-o", data)
    assert call("report", data).stdout == first.stdout
    assert call("report", data, "-o", page).exit_code == 0
    assert page.is_file()
    assert "first" in call("report", data, data).stdout
    assert "not a report" in refused(call("report", spec))
    assert "-o converts one report" in refused(call("report", data, data, "-o", page))


def test_the_schemas_accept_the_samples_and_the_report(
    samples: Path, spec: Path, tmp_path: Path
) -> None:
    import yaml

    schema = json.loads(call("schema", "spec").stdout)
    for path in samples.glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    data = tmp_path / "r.json"
    call("run", spec, *SMALL, "-o", data)
    jsonschema.validate(json.loads(data.read_text()), json.loads(call("schema", "report").stdout))


def test_lists_name_everything_with_its_source() -> None:
    defenses = call("list", "defenses").stdout
    for name in ("clip", "noise", "quantize", "sign", "sparsify", "Abadi"):
        assert name in defenses
    assert "nevergrad:NAME" in call("list", "optimizers").stdout
    assert "digits" in call("list", "priors").stdout
    assert call("prior", "list").stdout == call("list", "priors").stdout
    assert "psnr_db" in call("prior", "show", "digits").stdout
    assert "Did you mean 'digits'" in refused(call("prior", "show", "digit"))


def test_init_writes_a_spec_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    assert call("init", path).exit_code == 0
    assert path.read_text().startswith("# What is audited")
    assert "exists already" in refused(call("init", path))


def test_a_trained_prior_can_be_audited_with(spec: Path, tmp_path: Path) -> None:
    images = digits("prior")
    import numpy as np

    np.savez(
        tmp_path / "public.npz",
        images=(images.images[:, 0] * 255).round().byte().numpy(),
        labels=images.labels.numpy(),
    )
    folder = tmp_path / "prior"
    trained = call(
        "prior", "train", folder, "--data", tmp_path / "public.npz", "--steps", 3,
        "--latent", 5, "--held-out", "none", "--device", "cpu",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert {p.name for p in folder.iterdir()} == {
        "card.yaml", "generator.safetensors", "samples.png", "seen.safetensors",
    }  # fmt: skip
    assert str(tmp_path) not in (folder / "card.yaml").read_text()
    result = call("run", spec, *SMALL, "--prior", folder)
    assert result.exit_code in (0, 1, 3), result.output
    said = " ".join(result.stdout.split())
    assert "None of the reference images is among those that prior prior was trained on" in said
    seen = call("run", spec, *SMALL, "--prior", folder, "--reference", tmp_path / "public.npz")
    assert "holds only images that prior prior was trained on" in refused(seen)


def program(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ggl_audit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell has SIGINT ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_a_partial_report(
    spec: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    out = tmp_path / "r.json"
    sets = ("--set=attack.evaluations=1000000", "--set=evidence.matching_trials=20")
    process = program("run", spec, "--device=cpu", *sets, "-o", out)
    assert process.stderr is not None
    for line in process.stderr:
        if "attack on the capture" in line:
            break
    time.sleep(2)
    process.send_signal(kind)
    try:
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, stderr
    assert "Traceback" not in stderr
    assert "cut short during the attack on the capture" in " ".join(stdout.split())
    report = json.loads(out.read_text())
    # The label was asked before, and is told; of the image nothing can be said.
    assert [one["grade"] for one in report["verdict"]["answers"]] == ["inconclusive", "F"]
    assert report["evidence"]["ceiling"]["trials"] == 20
    assert report["evidence"]["floor"] is None
    assert "cut short" in report["evidence"]["not_measured"]["floor"]
    assert report["captured"]["reconstructions"] == []
    assert "cut short" in report["captured"]["not_measured"]["reconstructions"]


def test_help_and_version_need_no_torch() -> None:
    process = program("--version")
    assert process.communicate(timeout=60)[0].strip() == f"ggl-audit {__version__}"
    code = "import sys, ggl_audit.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_fault_of_the_program_is_not_a_failed_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ggl_audit.cli

    def fault() -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(ggl_audit.cli, "app", fault)
    with pytest.raises(SystemExit) as stop:
        ggl_audit.cli.main()
    assert stop.value.code == 3
    assert "a fault of this program" in capsys.readouterr().err
