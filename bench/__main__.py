"""``python -m bench`` runs all of them; ``python -m bench spectral layers`` some."""

from __future__ import annotations

import importlib
import sys

ALL = ("spectral", "gradient", "lora_da", "memory", "sketch", "layers", "differences", "bfloat16", "inilora")

for name in sys.argv[1:] or ALL:
    if name not in ALL:
        sys.exit(f"no benchmark {name!r}; there are {', '.join(ALL)}")
    importlib.import_module(f"bench.{name}").main()
