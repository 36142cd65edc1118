"""What is made once and can be made again: claimed, made, published whole, believed only with its checksum."""

from headstart.store.entries import DamagedEntryError, Entry
from headstart.store.store import Store

__all__ = ["DamagedEntryError", "Entry", "Store"]
