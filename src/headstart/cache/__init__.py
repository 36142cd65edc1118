"""Factors that depend on weights alone, kept between runs."""

from headstart.cache.digests import FileDigests
from headstart.cache.folder import cache_folder, factors_folder, size_limit
from headstart.cache.keys import cacheable, description, layer_key
from headstart.cache.store import Store, open_store

__all__ = [
    "FileDigests",
    "Store",
    "cache_folder",
    "cacheable",
    "description",
    "factors_folder",
    "layer_key",
    "open_store",
    "size_limit",
]
