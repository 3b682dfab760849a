"""Generation: tokens one after the other, over a cache or by reading everything anew; both say the same."""

from xattn.generate.beam import beam_search
from xattn.generate.logits import FILTERS, Filter, min_p, top_k, top_p
from xattn.generate.sample import generate
from xattn.generate.static import StaticStep

__all__ = ["FILTERS", "Filter", "StaticStep", "beam_search", "generate", "min_p", "top_k", "top_p"]
