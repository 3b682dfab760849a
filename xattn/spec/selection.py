"""Selection: tokens decide which earlier tokens no later token needs; their votes add up to a penalty F."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from xattn.spec.part import Flag, Part, flag, part, require


@part(
    switch=Flag(
        name="attn_selective",
        type=bool,
        default=False,
        help="selective attention: one head's logits hide tokens from all later ones (causal only)",
    )
)
class Selection(Part):
    """Selective attention, parameter-free.

    F_ij = sum over queries k with j < k < i that see j of relu(sim[sim_head, k, j]); zero for the first token of a
    document. F is subtracted from every head's logits, the selecting head included. It never falls as i grows.

    selection_skip=T masks keys whose F has reached T: they stay masked, for F never falls, so kernels need not visit blocks
    of them. "bound" takes T = 2 c + ln n + 10 with c a bound on the logits: as a query's own key has F = 0 and a logit of
    at least -c, what is masked had at most e^-10 of the weight.

    Source: Leviathan et al., arXiv 2410.02703, figure 2. Differs: any head may select (the paper's is 0), documents and
    padding have their own first token, and votes count only where the pattern lets a query see the key.
    """

    family: ClassVar[str] = "selection"

    sim_head: int = flag(
        int, 0, "selective attention: the head of the layer whose logits select", gate="attn_selective",
        aliases=("attn_sim_head",),
    )

    selection_skip: float | str | None = flag(
        float, None, "selective attention: keys whose penalty has reached this are masked for good, and kernels skip blocks "
        "of them; 20 is usual, 'bound' keeps the error of a weight below 5e-5", gate="attn_selective", words=("bound",),
        inference=True, aliases=("attn_selection_skip",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        require(self.sim_head >= 0, f"sim_head={self.sim_head} must be at least 0")
        skip = self.selection_skip
        require(
            skip is None or skip == "bound" or (not isinstance(skip, str) and skip > 0),
            f"selection_skip={skip} must be above 0, or 'bound'; 20 is usual",
        )

    def threshold(self, reach: Tensor, n: int) -> Tensor:
        """The penalty at which a key is masked, for n keys and logits within (-reach, reach); like reach, a number."""
        if self.selection_skip == "bound":
            return 2 * reach + math.log(n) + 10
        return torch.full_like(reach, self.selection_skip)

    def penalty(
        self,
        sim_bhij: Tensor,
        allowed_bij: Tensor,
        pos_bi: Tensor,
        pos_bj: Tensor,
        carry_bj: Tensor | None = None,
        order_bi: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The penalty F (b i j) to subtract, and the votes (b i j) after each query, the last of which is what is carried on.

        Args:
            sim_bhij: logits after the score stage, float32 or better.
            carry_bj: votes of all earlier queries against each key; None for none.
            order_bi: the queries' slots from the earliest position to the latest; None when they stand in that order. The
                votes after each query come in this order.
        """
        own = pos_bi[:, :, None] == pos_bj[:, None, :]
        first = pos_bj[:, None, :] == 0
        votes = torch.where(allowed_bij & ~own & ~first, sim_bhij[:, self.sim_head].relu(), 0.0)
        if order_bi is not None:
            rows = order_bi[:, :, None].expand(votes.shape)
            votes = votes.gather(1, rows)
        carry_b1j = votes.new_zeros(1, 1, 1) if carry_bj is None else carry_bj[:, None]
        total = votes.cumsum(dim=1) + carry_b1j
        # shifting the inclusive sum gives the exclusive one exactly; subtracting the own vote would round
        before = torch.cat([carry_b1j.expand_as(total[:, :1]), total[:, :-1]], dim=1)
        if order_bi is not None:
            before = torch.zeros_like(before).scatter(1, rows, before)
        return before, total
