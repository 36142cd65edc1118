"""``python -m bench`` runs those of ``ALL``; ``python -m bench spectral stream`` some, of those too that take more.

Of ``MORE``, stream writes a checkpoint of 16 GB to the folder for temporary files (``python -m bench.stream --folder``
names another); the others answer questions beside the README's table.
"""

from __future__ import annotations

import importlib
import sys

ALL = ("spectral", "gradient", "lora_da", "memory", "layers", "differences", "bfloat16", "inilora")
MORE = ("stream", "steps", "truncation", "gauges", "experts", "grpo")

if __name__ == "__main__":
    for name in sys.argv[1:] or ALL:
        if name not in ALL + MORE:
            sys.exit(f"no benchmark {name!r}; there are {', '.join(ALL + MORE)}")
        importlib.import_module(f"bench.{name}").main()
