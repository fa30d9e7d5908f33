"""What a client can do to a gradient before it leaves, one defense a file."""

from __future__ import annotations

from ggl_audit.defenses.ats import Ats
from ggl_audit.defenses.base import (
    FALSE_ACCUSATION,
    Aggregation,
    Context,
    DataDefense,
    Declared,
    Defense,
    Drawn,
    ModelDefense,
    Step,
)
from ggl_audit.defenses.checks import Check
from ggl_audit.defenses.clip import Clip
from ggl_audit.defenses.declaration import build_pipeline, with_known_defenses
from ggl_audit.defenses.encryption import Encryption
from ggl_audit.defenses.federated_dropout import FederatedDropout
from ggl_audit.defenses.float_format import FloatFormat
from ggl_audit.defenses.likelihood import relative_l2
from ggl_audit.defenses.mixup import Mixup
from ggl_audit.defenses.noise import Noise
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.defenses.pipeline import Pipeline
from ggl_audit.defenses.precode import Precode
from ggl_audit.defenses.qsgd import Qsgd
from ggl_audit.defenses.quantize import Quantize
from ggl_audit.defenses.random_k import RandomK
from ggl_audit.defenses.randomness import noise_norm
from ggl_audit.defenses.recipes import DPSGD, DPFedAvg, Recipe
from ggl_audit.defenses.registry import is_own, known, shipped
from ggl_audit.defenses.sec_adam import SecAdam
from ggl_audit.defenses.secure_aggregation import SecureAggregation
from ggl_audit.defenses.sensitivity import GaussianMechanism
from ggl_audit.defenses.sign import Sign
from ggl_audit.defenses.soteria import Soteria
from ggl_audit.defenses.sparsify import Sparsify
from ggl_audit.defenses.terngrad import TernGrad
from ggl_audit.defenses.threshold import Threshold

__all__ = [
    "DPSGD",
    "FALSE_ACCUSATION",
    "Aggregation",
    "Ats",
    "Check",
    "Clip",
    "Context",
    "DPFedAvg",
    "DataDefense",
    "Declared",
    "Defense",
    "Distribution",
    "Drawn",
    "Encryption",
    "FederatedDropout",
    "FloatFormat",
    "GaussianMechanism",
    "Mixup",
    "ModelDefense",
    "Noise",
    "NoiseLaw",
    "Pipeline",
    "Precode",
    "Qsgd",
    "Quantize",
    "RandomK",
    "Recipe",
    "SecAdam",
    "SecureAggregation",
    "Sign",
    "Soteria",
    "Sparsify",
    "Step",
    "TernGrad",
    "Threshold",
    "build_pipeline",
    "is_own",
    "known",
    "noise_norm",
    "relative_l2",
    "shipped",
    "with_known_defenses",
]
