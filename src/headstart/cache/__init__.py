"""Factors that depend on weights alone, kept between runs."""

from headstart.cache.factors import FactorCache, open_cache
from headstart.cache.folder import cache_folder, factors_folder, size_limit
from headstart.cache.keys import arithmetic, cacheable, description, layer_key

__all__ = [
    "FactorCache",
    "arithmetic",
    "cache_folder",
    "cacheable",
    "description",
    "factors_folder",
    "layer_key",
    "open_cache",
    "size_limit",
]
