"""Makes what `pneumonia.yaml` starts from: a hospital's radiograph and its classifier's weights.

`make pneumonia NPZ=PATH/pneumoniamnist.npz` runs it, and then `ggl-audit capture`. The classifier
is trained for an epoch on the train part; the radiograph is the first normal one of the val part.
The data are PneumoniaMNIST of MedMNIST v2 (Yang et al., Scientific Data 2023; Kermany et al., Cell
2018), CC BY 4.0.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from models import radiograph_cnn
from safetensors.torch import save_file

from ggl_audit.inputs.images import ImageSet, read_image_set, write_image
from ggl_audit.spec import ImageSetSpec

HERE = Path(__file__).parent
CLASSES = ("normal", "pneumonia")
STEPS = 60
IMAGES_A_CLASS = 32


def main(npz: Path) -> None:
    """Writes the files and says how well the classifier does on the test part."""
    train, val, test = (part(npz, split) for split in ("train", "val", "test"))
    write_image(HERE / "captures" / "radiograph.png", val.images[val.labels == 0][0])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = radiograph_cnn().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    members = [torch.nonzero(train.labels == label)[:, 0] for label in range(len(CLASSES))]
    for _ in range(STEPS):
        chosen = torch.cat([m[torch.randint(len(m), (IMAGES_A_CLASS,))] for m in members])
        optimizer.zero_grad()
        logits = model((train.images[chosen].double() - 0.5) / 0.5)
        F.cross_entropy(logits, train.labels[chosen]).backward()
        optimizer.step()
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    save_file(weights, HERE / "weights" / "pneumonia.safetensors")
    with torch.no_grad():
        guesses = model((test.images.double() - 0.5) / 0.5).argmax(dim=1)
    for label, name in enumerate(CLASSES):
        right = (guesses[test.labels == label] == label).double().mean()
        print(f"accuracy on the test part, {name}: {right:.1%}")  # noqa: T201


def part(npz: Path, split: str) -> ImageSet:
    """One part of the file, images in [0, 1]."""
    declared = ImageSetSpec.model_validate({"npz": npz.absolute(), "split": split})
    return read_image_set(declared, Path(), ("npz",), "reference")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
