"""Makes what the sample captures are made from: the private picture and the model's weights.

`make samples` runs it, and then `ggl-audit capture` for every spec. The model is the client's at
round 0, and after training on the public digits. The same version of PyTorch on the same kind of
machine gives the same files, bit for bit.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from models import small_cnn
from safetensors.torch import save_file

from ggl_audit.inputs.images import digits, write_image

HERE = Path(__file__).parent
PRIVATE_LABEL = 2
STEPS = 1500


def main() -> None:
    """Writes the files and says how well the trained model classifies the private digits."""
    private = digits("private")
    chosen = private.images[private.labels == PRIVATE_LABEL][0]
    write_image(HERE / "captures" / "private.png", chosen)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_cnn().double()
    save(model, "round_0.safetensors")
    seen = digits("prior")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(seen), (64,))
        images = (seen.images[chosen].double() - 0.5) / 0.5
        optimizer.zero_grad()
        F.cross_entropy(model(images), seen.labels[chosen]).backward()
        optimizer.step()
    save(model, "trained.safetensors")
    with torch.no_grad():
        guesses = model((private.images.double() - 0.5) / 0.5).argmax(dim=1)
    accuracy = (guesses == private.labels).double().mean()
    print(f"accuracy on the private digits: {accuracy:.1%}")  # noqa: T201


def save(model: torch.nn.Module, name: str) -> None:
    """Writes the weights in single precision."""
    save_file(
        {key: value.float() for key, value in model.state_dict().items()}, HERE / "weights" / name
    )


if __name__ == "__main__":
    main()
