"""``ggl-audit init``: a commented spec to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggl_audit.messages import Message

TEMPLATE = """\
# What is audited. Paths are relative to this file.
version: 1
model:
  factory: models.py:make_model         # file.py:callable, package:callable or torchvision:resnet18
  kwargs: {}                            # arguments of the callable
  weights: weights.safetensors          # .safetensors, .pt (weights only) or .npz, at this round
  input: {shape: [1, 28, 28], mean: [0.5], std: [0.5]}   # channels, height, width; images in [0, 1]
  loss: cross_entropy
  mode: eval                            # train: batch norm uses the statistics of the batch
capture:
  gradient: gradient.safetensors        # by parameter name
  stage: defended                       # raw: the tool applies the defense below first
  labels: infer                         # or [3], if it is known
  batch_size: 1                         # images of one client
  # kind: update                        # weights before local training minus those after, with
  # local: {lr: 0.1, epochs: 1}
defense:                                # in the client's order; `ggl-audit list defenses`
  - {name: clip, bound: 1.0}
  - {name: noise, std: 0.1}
# client: {step: client.py:step}        # the client's own code, for canaries and the DP promise
# guarantee:                            # what is claimed of it; nothing is guessed
#   {unit: sample, reduction: sum, rounds: 1, sampling_rate: 1, delta: 1.0e-5}
prior: {trained: prior}                 # a folder that `ggl-audit prior train` wrote
attack: {optimizer: gauss_newton, evaluations: 3000}
evidence:
  reference: {npz: public.npz}          # images (n, h, w[, c]) uint8, and labels
  candidates: 32                        # needs as many images of one class
  distance: pixels                      # or representation, lpips: how a picture picks
  matching_trials: 200                  # an A takes about 200
  reconstruction_trials: 20
  stop_early: false                     # true: end once the grade cannot change any more
  # public: [label]                      # questions whose answers are no secret, left out
  # truth: private.png                  # only if you hold it; of a batch all: [a.png, b.png]
gate: {fail_on: C}                      # exit 1 at this grade or a worse one
seed: 0
"""

EXISTS_ALREADY = Message(
    "spec/exists-already",
    "exists already",
    "Give another name.",
    advice="Give `ggl-audit init` another name; it overwrites nothing.",
)


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("audit.yaml"),
) -> None:
    """Write a commented spec to start from; an existing file is never overwritten."""
    from ggl_audit.basics.files import write_whole
    from ggl_audit.errors import InputError

    if path.exists():
        raise InputError(path, EXISTS_ALREADY())
    write_whole(path, TEMPLATE.encode())
    typer.echo(f"wrote {path}", err=True)
