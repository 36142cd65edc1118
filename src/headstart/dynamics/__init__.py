"""The scaling theory of low-rank fine-tuning, measured: on the toy model of its paper, over widths, and in training.

"Beyond Zero Initialization" argues from networks of infinite width. Here are its own experiment
(:mod:`headstart.dynamics.toy`), the exponents of its claims (:mod:`headstart.dynamics.exponents`), and the same
quantities of a real model while it trains (:mod:`headstart.dynamics.monitor`).
"""
