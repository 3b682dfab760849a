"""Pattern: which keys a query may see, as a function of positions and documents, never of slots or lengths."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xattn.spec.part import Flag, Part, flag, require


@dataclass(frozen=True, kw_only=True)
class Pattern(Part):
    """Causal or full, optionally within a window, optionally with the first tokens always in sight.

    The window counts keys seen, self included: 0 <= pos_i - pos_j < W, on both sides when bidirectional.
    Source: Longformer, arXiv 2004.05150; Mistral 7B, 2310.06825; sink tokens: StreamingLLM, 2309.17453.
    Differs: sink tokens keep their absolute positions.
    """

    switch: ClassVar[Flag | None] = None

    causal: bool = flag(bool, True, "each token sees itself and what came before", per_layer=False)
    sliding_window: int | None = flag(
        int, None, "keys seen by a query, itself included (both sides in an encoder)", aliases=("attn_sliding_window",)
    )
    sink_tokens: int = flag(
        int, 0, "first tokens of each document that a window never hides", gate="sliding_window",
        aliases=("attn_sink_tokens",),
    )

    def __post_init__(self) -> None:
        window = self.sliding_window
        require(
            window is None or window >= 1,
            f"sliding_window={window} must be at least 1: it counts the keys seen, self included; "
            "leave it out for full attention",
        )
        require(self.sink_tokens >= 0, f"sink_tokens={self.sink_tokens} must be at least 0")

    def allowed(
        self, pos_bi: Tensor, pos_bj: Tensor, doc_bi: Tensor | None = None, doc_bj: Tensor | None = None
    ) -> Tensor:
        """Which pairs may attend: bool (b i j). pos is int64 within the document, -1 an empty slot; doc names documents."""
        pos_bi1, pos_b1j = pos_bi[:, :, None], pos_bj[:, None, :]
        behind = pos_bi1 - pos_b1j
        allowed = (pos_bi1 >= 0) & (pos_b1j >= 0)
        if self.sliding_window is not None:
            allowed &= (behind.abs() < self.sliding_window) | (pos_b1j < self.sink_tokens)
        if self.causal:
            allowed &= behind >= 0
        if doc_bi is not None:
            allowed = allowed & (doc_bi[:, :, None] == doc_bj[:, None, :])
        return allowed
