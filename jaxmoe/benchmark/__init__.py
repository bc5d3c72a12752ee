"""Measuring a layer's experts against what JAX offers today; see `benchmarks/README.md`.

>>> from jaxmoe import benchmark
>>> machine = benchmark.measure_machine()                                      # doctest: +SKIP
>>> for result in benchmark.measure_layer(benchmark.LAYERS["qwen3-30b-a3b"], "nvfp4", [1, 64],
...                                       machine=machine):                    # doctest: +SKIP
...     print(result)
"""

from jaxmoe.benchmark.layers import LAYERS as LAYERS
from jaxmoe.benchmark.layers import TINY as TINY
from jaxmoe.benchmark.layers import TOKENS as TOKENS
from jaxmoe.benchmark.layers import Layer as Layer
from jaxmoe.benchmark.layers import expected_experts as expected_experts
from jaxmoe.benchmark.layers import get_layer as get_layer
from jaxmoe.benchmark.machine import Machine as Machine
from jaxmoe.benchmark.machine import device_name as device_name
from jaxmoe.benchmark.machine import measure_machine as measure_machine
from jaxmoe.benchmark.records import append_rows as append_rows
from jaxmoe.benchmark.records import device_slug as device_slug
from jaxmoe.benchmark.records import origin as origin
from jaxmoe.benchmark.records import read_rows as read_rows
from jaxmoe.benchmark.records import row as row
from jaxmoe.benchmark.runner import BASELINE as BASELINE
from jaxmoe.benchmark.runner import MODES as MODES
from jaxmoe.benchmark.runner import Measurement as Measurement
from jaxmoe.benchmark.runner import MemoryLimitError as MemoryLimitError
from jaxmoe.benchmark.runner import Skipped as Skipped
from jaxmoe.benchmark.runner import layer_problem as layer_problem
from jaxmoe.benchmark.runner import measure_layer as measure_layer
