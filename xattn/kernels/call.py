"""What a kernel is told about a call: its structure, which is compiled in, and its numbers, which are not.

Changing a number of `Numbers` never compiles anything anew; `Parts` is the one list of what is constexpr.
"""

from typing import NamedTuple


class Parts(NamedTuple):
    """Structure: one kernel is compiled for each value of this.

    extend: 0, or Self-Extend: 1 causal, 2 both ways. select: selective attention. skip: keys whose penalty has reached a
    threshold are dead, and blocks of them are not visited. band: selection's scratch holds a band beside the diagonal (a
    window without sinks). stored: positions are read, else slot i holds token i. group: query heads that share a key head.
    exact: votes are summed in float32 throughout. even: lengths are multiples of 128, so no tile is ragged. deep: edges are
    many and simple (windows, zones, where slot i holds token i), so they are pipelined. warps: of the launch. pair: query heads
    that one program of the dQ kernel takes (they share F); slices: of dS, one a pair.
    """

    causal: bool
    window: bool
    sinks: bool
    stored: bool
    docs: bool
    softcap: bool
    alibi: bool
    extend: int
    select: bool
    skip: bool
    band: bool
    sink_logits: bool
    group: int
    d: int
    block_d: int
    exact: bool
    even: bool
    deep: bool
    block_i: int = 64
    block_j: int = 64
    warps: int = 4
    pair: int = 1
    slices: int = 1


class Numbers(NamedTuple):
    """Sizes in slots and scalars in units of log2; `first`, `blocks`, `width` describe the scratch (see scratch.py)."""

    batch: int
    heads: int
    n_i: int
    n_j: int
    window: int
    sinks: int
    near: int
    group: int
    scale: float
    cap: float
    first: int = 0
    blocks: int = 0
    width: int = 0
