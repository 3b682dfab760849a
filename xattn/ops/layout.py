"""Layout: which token of which document sits in each slot of a batch. Everything about masks follows from it.

Letters: n slots of one sequence; b is 1 where all rows are alike.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from xattn.errors import ShapeError
from xattn.shapes import sizes


class Layout:
    """Positions (b n) int64, -1 an empty slot, and documents (b n) or None.

    kind says what a back-end may rely on:
        plain:  row after row is 0, 1, ... n - 1, one document
        runs:   neighbouring slots of one document hold neighbouring positions (packing, padding)
        free:   positions in any order
    """

    def __init__(self, pos_bn: Tensor, doc_bn: Tensor | None = None, *, kind: str = "free") -> None:
        self.pos_bn, self.doc_bn, self.kind = pos_bn, doc_bn, kind
        self._memo: dict[Hashable, Any] = {}

    @classmethod
    def plain(cls, n: int, device: torch.device | str | None = None) -> "Layout":
        """n tokens of one document, no padding."""
        return cls(torch.arange(n, device=device)[None], kind="plain")

    @classmethod
    def build(
        cls, n: int, *, device: torch.device, mask_bn: Tensor | None = None, doc_ids_bn: Tensor | None = None
    ) -> "Layout":
        """The layout of a batch from a padding mask (True = token) and document ids; both optional.

        A document is a run of equal ids; an id that comes back later is another document. Positions start at 0 in each
        document and at the first token of a padded row.

        Raises:
            ShapeError: sizes that disagree, a mask that is not bool, or with holes between tokens of a row.
        """
        given = {name: (t, "b n") for name, t in (("mask", mask_bn), ("doc_ids", doc_ids_bn)) if t is not None}
        sizes({"n": n}, **given)
        if not given:
            return cls.plain(n, device)
        if mask_bn is not None and mask_bn.dtype != torch.bool:
            raise ShapeError(f"mask has dtype {mask_bn.dtype}; it must be bool, True where there is a token")
        slot_1n = torch.arange(n, device=device)[None]
        # a run starts wherever the id, or being a token at all, differs from the slot before
        keys = [t for t in (doc_ids_bn, mask_bn) if t is not None]
        starts = torch.zeros_like(keys[0], dtype=torch.bool)
        starts[:, 0] = True
        for key in keys:
            starts[:, 1:] |= key[:, 1:] != key[:, :-1]
        first_bn = torch.where(starts, slot_1n, 0).cummax(dim=1).values
        pos_bn = slot_1n - first_bn
        if mask_bn is not None:
            pos_bn = torch.where(mask_bn, pos_bn, -1)
        if doc_ids_bn is None:
            runs = (starts & mask_bn).sum(dim=1)
            if bool((runs > 1).any()):
                raise ShapeError(
                    f"mask row {int(runs.argmax())} has tokens in {int(runs.max())} separate runs; pad left or right only, "
                    "or pass doc_ids for packed documents"
                )
            return cls(pos_bn, kind="runs")
        return cls(pos_bn, starts.long().cumsum(dim=1), kind="runs")

    @property
    def order_bn(self) -> Tensor | None:
        """Slots from the earliest position to the latest, where slots do not already stand so in each document."""
        return self.pos_bn.argsort(dim=1, stable=True) if self.kind == "free" else None

    @property
    def n(self) -> int:
        """Number of slots."""
        return self.pos_bn.shape[1]

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Something that depends on the layout and the key alone, made once for all layers of a forward pass."""
        if torch.compiler.is_compiling():
            # the compiler merges equal work by itself, and cannot hash a spec
            return make()
        # what inference mode makes cannot be trained with
        key = (torch.is_inference_mode_enabled(), key)
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
