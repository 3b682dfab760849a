"""Positions: how queries and keys meet, given the position of each in its document.

Letters: x any of q or k, r the rotated width of a head.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from einops import einsum
from torch import Tensor

from xattn.spec.part import Flag, Part, flag, part, require

ROPE_SCALINGS = ("linear", "ntk", "yarn")
# YaRN's ramp: pairs that turn fewer than 1 time over the trained length are stretched, more than 32 times are kept.
YARN_ALPHA, YARN_BETA = 1.0, 32.0
# a group that is chosen for the length to come
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class NoPositions(Part):
    """Plain dot products: the model sees order only through the pattern (NoPE)."""

    family: ClassVar[str] = "positions"
    switch: ClassVar[Flag | None] = None

    def logits(self, q_bhid: Tensor, k_bhjd: Tensor, pos_bi: Tensor, pos_bj: Tensor) -> Tensor:
        """Unscaled logits sim_bhij of queries (b h i d) at pos (b i) against keys (b h j d) at pos (b j)."""
        return einsum(q_bhid, k_bhjd, "b h i d, b h j d -> b h i j")

    def distance(self, pos_bi: Tensor, pos_bj: Tensor) -> Tensor:
        """How far each key lies behind each query, as this family counts it: (b i j), negative when ahead."""
        return pos_bi[:, :, None] - pos_bj[:, None, :]

    @property
    def unsettled(self) -> bool:
        """Whether the length to come must be known before it means anything; see `settled`."""
        return False

    def settled(self, n: int) -> "NoPositions":
        """What it is for sequences of at most n tokens, all calls of one sequence together."""
        return self

    def max_positions(self, trained: int) -> int | None:
        """Tokens of a sequence whose distances all are ones that a model trained at that length knows; None for no limit."""
        return None


def _turns(pos_bn: Tensor, frequency_p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (b 1 n p)."""
    angle = pos_bn[:, None, :, None].double() * frequency_p
    return angle.cos().to(dtype), angle.sin().to(dtype)


# Compiled, an operator of its own: the compiler would fuse this float64 arithmetic into every kernel that turns a tensor.
_turns_once = torch.library.custom_op("xattn::rotary_table", _turns, mutates_args=())


@_turns_once.register_fake
def _(pos_bn: Tensor, frequency_p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (pos_bn.shape[0], 1, pos_bn.shape[1], frequency_p.shape[0])
    return pos_bn.new_empty(shape, dtype=dtype), pos_bn.new_empty(shape, dtype=dtype)


@part(
    switch=Flag(
        name="rotary_pos_emb",
        type=bool,
        default=False,
        help="rotary positions (RoPE), half-split pairs, over the whole head unless rotary_emb_dim says less",
    )
)
class Rope(NoPositions):
    """Rotary positions: pair (x_r, x_{r + width/2}) is turned by pos * base^(-2r/width).

    Source: RoFormer, arXiv 2104.09864. linear: 2306.15595; ntk: base * s^(r/(r-2)); yarn: 2309.00071 §3.4.
    Differs: pairs are half-split as in Llama (x-transformers interleaves). YaRN's temperature multiplies the whole
    logit, so with a partial width the un-rotated part feels it too, as the paper has it.
    """

    rotary_base: float = flag(float, 10000.0, "base of the rotary wavelengths", gate="rotary_pos_emb")
    rotary_emb_dim: int | None = flag(
        int, None, "rotated width of a head, even; the rest is left as it is (default: all)", gate="rotary_pos_emb"
    )
    rope_scaling: str | None = flag(
        str,
        None,
        "stretch positions beyond the trained length: linear, ntk or yarn",
        gate="rotary_pos_emb",
        choices=ROPE_SCALINGS,
        inference=True,
    )
    rope_scaling_factor: float | None = flag(
        float, None, "how many times longer than trained", gate="rope_scaling", inference=True
    )
    rope_original_len: int | None = flag(
        int, None, "trained length in tokens (yarn; a whole model takes its max_seq_len)", gate="rope_scaling", inference=True
    )

    def __post_init__(self) -> None:
        require(
            1 < self.rotary_base < math.inf, f"rotary_base={self.rotary_base} must be finite and above 1; 10000 is usual"
        )
        width = self.rotary_emb_dim
        require(width is None or (width >= 2 and width % 2 == 0), f"rotary_emb_dim={width} must be even and at least 2")
        if self.rope_scaling is None:
            return
        factor = self.rope_scaling_factor
        require(
            factor is not None and 1 <= factor < math.inf,
            f"rope_scaling={self.rope_scaling} with rope_scaling_factor={factor}; give a finite factor of at least 1",
        )
        length = self.rope_original_len
        require(
            self.rope_scaling != "yarn" or (length is not None and length >= 1),
            f"rope_scaling=yarn with rope_original_len={length}; give the length in tokens that the weights are trained at",
        )
        require(
            self.rope_scaling == "yarn" or length is None,
            f"rope_original_len={length} has no effect: rope_scaling={self.rope_scaling} does not use it; drop it",
        )

    def max_positions(self, trained: int) -> int | None:
        return self.stretched(trained)

    def stretched(self, trained: int) -> int:
        """The trained length as rope_scaling stretches it."""
        return trained if self.rope_scaling is None else int(trained * self.rope_scaling_factor)

    @property
    def temperature(self) -> float:
        """What the logits are multiplied by: (0.1 ln s + 1)^2 for YaRN, else 1."""
        return (0.1 * math.log(self.rope_scaling_factor) + 1) ** 2 if self.rope_scaling == "yarn" else 1.0

    def frequencies(self, dim_head: int, device: torch.device) -> Tensor:
        """Radians a position for each rotated pair: float64 (width / 2)."""
        width = self.rotary_emb_dim or dim_head
        base, factor = self.rotary_base, self.rope_scaling_factor
        if self.rope_scaling == "ntk":
            # a width of 2 has one pair, at frequency base^0 = 1, which no base can slow down
            base *= factor ** (width / max(width - 2, 1))
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        freq = base**-exponent
        if self.rope_scaling == "linear":
            return freq / factor
        if self.rope_scaling == "yarn":
            turns = self.rope_original_len * freq / (2 * math.pi)
            keep = ((turns - YARN_ALPHA) / (YARN_BETA - YARN_ALPHA)).clamp(0, 1)
            return freq * (keep + (1 - keep) / factor)
        return freq

    def table(self, pos_bn: Tensor, dim_head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle, each (b 1 n width/2); the angles are formed in float64."""
        # half precision cannot hold the products' cancellations; the cast back is rotate's
        dtype = torch.promote_types(dtype, torch.float32)
        make = _turns_once if torch.compiler.is_compiling() else _turns
        return make(pos_bn, self.frequencies(dim_head, pos_bn.device), dtype)

    @staticmethod
    def rotate(x_bhnd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (b h n d) turned by the table's angles, in x's dtype; any order of axes that the table shares will do."""
        cos, sin = table
        half = cos.shape[-1]
        first, second = x_bhnd[..., :half], x_bhnd[..., half : 2 * half]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([t.to(x_bhnd.dtype) for t in turned] + [x_bhnd[..., 2 * half :]], dim=-1)

    def turn(self, x_bhnd: Tensor, pos_bn: Tensor) -> Tensor:
        """x (b h n d) rotated to positions (b n)."""
        return self.rotate(x_bhnd, self.table(pos_bn, x_bhnd.shape[-1], x_bhnd.dtype))

    def logits(self, q_bhid: Tensor, k_bhjd: Tensor, pos_bi: Tensor, pos_bj: Tensor) -> Tensor:
        sim_bhij = super().logits(self.turn(q_bhid, pos_bi), self.turn(k_bhjd, pos_bj), pos_bi, pos_bj)
        return sim_bhij * self.temperature


@part(switch="self_extend_group")
class SelfExtend(Rope):
    """Self-Extend: exact rotary distances within the neighbour window w, grouped positions (pos // G) beyond it.

    A pair at distance D < w meets at r = D; at D >= w at r = pos_i // G - pos_j // G + (w - w // G). The logits are
    replaced, never summed, under one softmax. G = 1, or a sequence no longer than w, is plain RoPE. A bidirectional
    model takes |D| and the mirrored shift for keys ahead. Choose G so that the largest r stays below the trained length L:
    n <= (L - w) * G + w, with 2-4 times that G working better than the tightest.

    G = "auto" leaves G, and w unless it is given, to `settled(n)`, once n is known: the authors' rule, with w = L / 4, the
    smallest power of two that has w + (n - w) / G < 2 L / 3, w brought down to a multiple of it. Up to L it is plain RoPE.
    (docs/study.md: w = L / 2 is a little lower in perplexity on novels, much higher on text without local structure.)

    Source: arXiv 2401.01325 §3, figure 4; the rule: README of the authors' code (they give the bound as 1/2 to 2/3 of L).
    Differs: floor division everywhere (the reference code has `/` at some sites).
    """

    self_extend_group: int | str | None = flag(
        int, None, "Self-Extend: keys beyond the neighbour window share positions in groups of this size; 'auto' chooses it, "
        "and the window, for the length to come", gate="rotary_pos_emb", words=(AUTO,), inference=True,
    )  # fmt: skip
    self_extend_window: int | None = flag(
        int, None, "Self-Extend: neighbour window, distances below it stay exact (a quarter of the trained length is usual)",
        gate="self_extend_group", inference=True,
    )
    self_extend_trained_len: int | None = flag(
        int, None, "trained length in tokens (self_extend_group=auto; a whole model takes its max_seq_len)",
        gate="self_extend_group", inference=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        group, window, trained = self.self_extend_group, self.self_extend_window, self.self_extend_trained_len
        if group == AUTO:
            self._check_auto()
            return
        require(group is not None and group >= 1, f"self_extend_group={group} must be at least 1 (1 is plain rotary)")
        require(
            window is not None and window >= 1,
            f"self_extend_group={group} with self_extend_window={window}; give a neighbour window of at least 1, "
            "a quarter of the trained length is usual, or self_extend_group=auto",
        )
        require(
            trained is None,
            f"self_extend_trained_len={trained} has no effect: self_extend_group={group} is a number; drop it, or use auto",
        )

    def _check_auto(self) -> None:
        window, trained = self.self_extend_window, self.self_extend_trained_len
        require(
            trained is not None and trained >= 4,
            f"self_extend_group=auto with self_extend_trained_len={trained}; give the length in tokens (4 or more) that the "
            "weights are trained at",
        )
        most = (2 * self.stretched(trained) - 1) // 3
        require(
            window is None or 1 <= window <= most,
            f"self_extend_window={window} leaves self_extend_group=auto no group for a trained length of {trained}; give 1 to "
            f"{most}, or none for a quarter of the trained length",
        )

    @property
    def unsettled(self) -> bool:
        return self.self_extend_group == AUTO

    @property
    def near(self) -> int:
        """The neighbour window, or for auto the widest that it may choose."""
        window = self.self_extend_window
        return self.stretched(self.self_extend_trained_len) // 4 if window is None else window

    def settled(self, n: int) -> Rope:
        """For auto the group and window of sequences of at most n tokens; plain RoPE up to the trained length.

        Differs: from the rule by whole powers of two, so that G divides w and lengths that differ little share a group.
        """
        if not self.unsettled:
            return self
        plain = {f.name: getattr(self, f.name) for f in fields(Rope)}
        trained, near = self.stretched(self.self_extend_trained_len), self.near
        if n <= trained:
            return Rope(**plain)
        least = 3 * (n - near) // (2 * trained - 3 * near) + 1
        group = 1 << (least - 1).bit_length()
        if self.self_extend_window is None and group <= near:
            near -= near % group
        return SelfExtend(**plain, self_extend_group=group, self_extend_window=near)

    @property
    def shift(self) -> int:
        """w - w // G: what joins the grouped zone to the exact one."""
        return self.self_extend_window - self.self_extend_window // self.self_extend_group

    def limits(self) -> list[int]:
        """For auto the longest sequences, ascending, for which `settled` gives plain RoPE, then each group in turn."""
        trained, near = self.stretched(self.self_extend_trained_len), self.near
        groups = [near + -(-(2 * trained - 3 * near << k) // 3) - 1 for k in range(1, 41)]
        return [trained, *(n for n in groups if n > trained)]

    def max_positions(self, trained: int) -> int | None:
        """Tokens of a sequence whose largest distance stays below the trained length: (L - w + w // G) * G.

        (L - w) * G + w where G divides w; a window of L or more leaves L. None for auto, which finds a group for any length.
        """
        if self.unsettled:
            return None
        trained, window, group = self.stretched(trained), self.self_extend_window, self.self_extend_group
        return max(trained, (trained - window + window // group) * group) if window < trained else trained

    def _refuse_unsettled(self) -> None:
        require(
            not self.unsettled,
            "self_extend_group=auto means nothing until the length to come is known; use spec.settled(length)",
        )

    def grouped(self, pos: Tensor) -> Tensor:
        """Positions counted in groups."""
        return pos.div(self.self_extend_group, rounding_mode="floor")

    def distance(self, pos_bi: Tensor, pos_bj: Tensor) -> Tensor:
        self._refuse_unsettled()
        near = super().distance(pos_bi, pos_bj)
        far = super().distance(self.grouped(pos_bi), self.grouped(pos_bj))
        return self.merge(near, near, far + self.shift, far - self.shift)

    def merge(self, distance: Tensor, near: Tensor, behind: Tensor, ahead: Tensor) -> Tensor:
        """Takes near within the window, behind for keys w or more back, ahead for keys w or more ahead."""
        window = self.self_extend_window
        return torch.where(distance >= window, behind, torch.where(distance <= -window, ahead, near))

    def logits(self, q_bhid: Tensor, k_bhjd: Tensor, pos_bi: Tensor, pos_bj: Tensor) -> Tensor:
        self._refuse_unsettled()
        far_bi, far_bj = self.grouped(pos_bi), self.grouped(pos_bj)
        near = super().logits(q_bhid, k_bhjd, pos_bi, pos_bj)
        behind = super().logits(q_bhid, k_bhjd, far_bi + self.shift, far_bj)
        ahead = super().logits(q_bhid, k_bhjd, far_bi - self.shift, far_bj)
        apart_b1ij = NoPositions.distance(self, pos_bi, pos_bj)[:, None]
        return self.merge(apart_b1ij, near, behind, ahead)
