"""Checks sizes by axis name and names the tensor, the axis and both sizes when they disagree."""

from torch import Tensor

from xattn.errors import ShapeError


def sizes(expected: dict[str, int] | None = None, /, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Reads axis sizes from named tensors and raises if an axis has two sizes.

    Args:
        expected: sizes already known, by axis letter.
        tensors: name=(tensor, pattern), pattern an einops-like list of axis letters; "1" takes any size of one.
    Returns:
        the size of each axis letter.
    Raises:
        ShapeError: a tensor has another number of axes than its pattern, or an axis disagrees.

    >>> import torch
    >>> sizes(q=(torch.zeros(2, 3), "b i"), k=(torch.zeros(2, 5), "b j"))
    {'b': 2, 'i': 3, 'j': 5}
    """
    seen = {axis: (size, "the spec") for axis, size in (expected or {}).items()}
    for name, (tensor, pattern) in tensors.items():
        axes = pattern.split()
        if tensor.ndim != len(axes):
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; it needs {len(axes)} axes: {pattern}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis in seen and seen[axis][0] != size:
                was, where = seen[axis]
                raise ShapeError(f"axis '{axis}' of {name} is {size}, but {was} in {where}; {name} is ({pattern})")
            seen.setdefault(axis, (size, name))
    return {axis: size for axis, (size, _) in seen.items()}
