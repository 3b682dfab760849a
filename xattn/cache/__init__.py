"""Caches: where the keys and values of earlier tokens live, and what each layer kind keeps of them."""

from xattn.cache.cache import Cache
from xattn.cache.static import StaticCache

__all__ = ["Cache", "StaticCache"]
