"""A LoRA's matrices, under diffusers' names -> a check that they fit a student."""

from collections.abc import Mapping

from torch import Tensor, nn

PREFIX = "transformer."
SIDES = {".lora_A.weight": 1, ".lora_B.weight": 0}  # {matrix: its dimension of the layer's width, in or out}


def check_lora_fits(tensors: Mapping[str, Tensor], student: nn.Module) -> None:
    """Raise ValueError for a LoRA of layers that a student lacks, or of another width.

    diffusers would raise an error of hundreds of lines, or ignore the layers.
    """
    weights = dict(student.named_parameters())
    for name, matrix in tensors.items():
        for side, dimension in SIDES.items():
            if not name.startswith(PREFIX) or not name.endswith(side):
                continue
            layer = name.removeprefix(PREFIX).removesuffix(side)
            weight = weights.get(f"{layer}.weight", weights.get(f"{layer}.base_layer.weight"))
            if weight is None:
                raise ValueError(
                    f"the LoRA changes {layer}, which the student lacks. Choose a LoRA of this student."
                )
            if matrix.ndim < 2:
                raise ValueError(
                    f"the LoRA has {name} of shape {tuple(matrix.shape)}, expected a matrix. Download it again."
                )
            found = matrix.shape[dimension]
            # Quantised weights and convolutions store their sizes in another way.
            if weight.ndim == matrix.ndim == 2 and found != weight.shape[dimension]:
                raise ValueError(
                    f"the LoRA is for a width of {found}, the student has {weight.shape[dimension]} in {layer}. "
                    "Choose a LoRA that was trained on this student or on its base."
                )
