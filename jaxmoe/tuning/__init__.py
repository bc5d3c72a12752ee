"""Which of a kernel variant's tactics runs a problem: measured tables, and the autotuner.

A tactic is one way in which a native library can run a variant (its tile shapes, or its kernels);
the library has a heuristic for the choice. `tune` measures the tactics on the device that is here
and writes the winners to a cache; from then on `lookup` finds them while a function is traced.

>>> import jaxmoe
>>> from jaxmoe import benchmark, tuning
>>> tuning.tune(benchmark.get_layer("qwen3-30b-a3b"), "nvfp4", [1, 64])          # doctest: +SKIP
>>> with tuning.override("wgmma64"):                                             # doctest: +SKIP
...     y = jaxmoe.moe_mlp(x, experts, expert_ids, weights)
"""

from jaxmoe.tuning.choice import Choice, lookup, override
from jaxmoe.tuning.key import BUCKETS, Key, bucket
from jaxmoe.tuning.tables import Entry, cache_path
from jaxmoe.tuning.tuner import MARGIN, Tuned, TuningError, tune

__all__ = [
    "BUCKETS",
    "MARGIN",
    "Choice",
    "Entry",
    "Key",
    "Tuned",
    "TuningError",
    "bucket",
    "cache_path",
    "lookup",
    "override",
    "tune",
]
