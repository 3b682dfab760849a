"""Rows: how far each row of a batch has come, and where the tokens of the next call stand because of it.

Numbers a row are kept on the host, so that decoding never waits for the device; letters: n slots of one call.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from xattn.ops.layout import Layout
from xattn.shapes import sizes


@dataclass(kw_only=True, eq=False)
class Chunk:
    """One call's tokens. start: the rows before it; end: after it (both on the host).

    layout: positions and documents of its slots. alike: all rows are, one document, no empty slot.
    """

    layout: Layout
    start: "Rows"
    end: "Rows"
    alike: bool

    @property
    def n(self) -> int:
        """Slots of the call."""
        return self.layout.n

    def tokens_before_last(self, slots: int) -> Tensor:
        """Tokens (b,) that each row has had before the call's last slots, on the host."""
        if bool((self.end.count_b - self.start.count_b == self.n).all()):
            return self.end.count_b - slots
        return self.end.count_b - (self.layout.pos_bn[:, self.n - slots :] >= 0).sum(dim=1).cpu()

    @cached_property
    def tokens_bn(self) -> Tensor:
        """Tokens each row has had once each slot is read, (b n)."""
        return self.start.count_b.to(self.layout.pos_bn.device)[:, None] + (self.layout.pos_bn >= 0).cumsum(dim=1)


class Rows:
    """Per row: tokens read, the next position, the document's number and id, whether the last slot was empty.

    high_b: the next position at its farthest in this document, which crop does not turn back.
    """

    def __init__(self, batch: int) -> None:
        zero = torch.zeros(batch, dtype=torch.long)
        self.count_b, self.next_b, self.high_b, self.doc_b = (zero.clone() for _ in range(4))
        # an id that no document has, so that a first id starts one
        self.id_b = torch.full_like(zero, torch.iinfo(torch.long).min)
        self.gap_b = torch.zeros(batch, dtype=torch.bool)
        self.packed = False

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.count_b)

    @property
    def longest(self) -> int:
        """Tokens of the row that has most."""
        return int(self.count_b.max())

    @property
    def reach(self) -> int:
        """The farthest next position of any row."""
        return int(self.next_b.max())

    @property
    def alike(self) -> bool:
        """Whether all rows are at one place of their only document."""
        return not self.packed and bool((self.count_b == self.count_b[0]).all())

    def tick(self) -> None:
        """Each row has read one more token of its document, in place."""
        self.count_b += 1
        self.next_b += 1
        self.gap_b.fill_(False)
        torch.maximum(self.high_b, self.next_b, out=self.high_b)

    def clone(self) -> "Rows":
        """A copy that shares nothing."""
        return self.take(torch.arange(self.batch))

    def take(self, index: Tensor) -> "Rows":
        """The rows at index (b',)."""
        index, taken = index.cpu(), Rows(len(index))
        for name, value in vars(self).items():
            setattr(taken, name, value[index] if isinstance(value, Tensor) else value)
        return taken

    def read(self, n: int, *, device: torch.device, mask: Tensor | None, doc_ids: Tensor | None) -> Chunk:
        """The next n slots. Without doc_ids a row's document goes on; with them, a run of ids goes on where the last id
        is its own and no empty slot lies between.

        Raises:
            ShapeError: as `Layout.build`.
        """
        given = {name: (t, "b n") for name, t in (("mask", mask), ("doc_ids", doc_ids)) if t is not None}
        sizes({"b": self.batch, "n": n}, **given)
        if mask is not None and mask.dtype == torch.bool and bool(mask.all()):
            mask = None
        end = self.clone()
        if mask is None and doc_ids is None:
            end.count_b += n
            end.next_b += n
            end.gap_b.fill_(False)
            layout = self._go_on(n, device)
        else:
            layout = self._build(n, device, mask, doc_ids, end)
        end.high_b = torch.where(end.doc_b == self.doc_b, torch.maximum(self.high_b, end.next_b), end.next_b)
        alike = mask is None and doc_ids is None and self.alike
        return Chunk(layout=layout, start=self, end=end, alike=alike)

    def _go_on(self, n: int, device: torch.device) -> Layout:
        """n more tokens of the document that each row is in."""
        if self.alike:
            first = int(self.next_b[0])
            if first == 0:
                return Layout.plain(n, device)
            return Layout(torch.arange(first, first + n, device=device)[None], kind="runs")
        pos_bn = self.next_b.to(device)[:, None] + torch.arange(n, device=device)
        doc_bn = self.doc_b.to(device)[:, None].expand(-1, n) if self.packed else None
        return Layout(pos_bn, doc_bn, kind="runs")

    def _build(self, n: int, device: torch.device, mask: Tensor | None, doc_ids: Tensor | None, end: "Rows") -> Layout:
        """The layout of a padded or packed chunk, and what it makes of `end`."""
        alone = Layout.build(n, device=device, mask_bn=mask, doc_ids_bn=doc_ids)
        pos_bn = alone.pos_bn.cpu()
        token_bn = pos_bn >= 0
        some_b, first_b1 = token_bn.any(dim=1), token_bn.long().argmax(dim=1, keepdim=True)
        last_b1 = n - 1 - token_bn.flip(1).long().argmax(dim=1, keepdim=True)
        end.packed = self.packed or doc_ids is not None
        end.count_b += token_bn.sum(dim=1)
        if doc_ids is None:
            pos_bn = torch.where(token_bn, pos_bn + self.next_b[:, None], -1)
            doc_bn = self.doc_b[:, None].expand(-1, n)
        else:
            run_bn, ids_bn = alone.doc_bn.cpu(), doc_ids.cpu()
            begun_b = self.count_b > 0
            same_b = begun_b & ~self.gap_b & token_bn[:, 0] & (ids_bn[:, 0] == self.id_b)
            # runs of this chunk, counted from the document that the row is in
            doc_bn = self.doc_b[:, None] + run_bn - run_bn.gather(1, first_b1) + (begun_b & ~same_b).long()[:, None]
            goes_on_bn = token_bn & same_b[:, None] & (doc_bn == self.doc_b[:, None])
            pos_bn = torch.where(goes_on_bn, pos_bn + self.next_b[:, None], pos_bn)
            end.doc_b = torch.where(some_b, doc_bn.gather(1, last_b1)[:, 0], self.doc_b)
            end.id_b = torch.where(some_b, ids_bn.gather(1, last_b1)[:, 0], self.id_b)
        end.next_b = torch.where(some_b, pos_bn.gather(1, last_b1)[:, 0] + 1, self.next_b)
        end.gap_b = torch.where(some_b, ~token_bn[:, -1], True)
        return Layout(pos_bn.to(device), doc_bn.to(device) if end.packed else None, kind="runs")
