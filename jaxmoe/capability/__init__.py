"""Which kernel runs, and why no other does: the table, its one reader, and targets.

>>> from jaxmoe.capability import Problem, Target, explain
>>> problem = Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768,
...                   num_experts=128, top_k=8, declared_compute="w4a4")
>>> print(explain(problem, Target.from_name("sm_120")))  # doctest: +ELLIPSIS
problem   moe_mlp of nvfp4 weights, compute auto (the checkpoint declares w4a4), ...
target    sm_120
asked     AUTO
selected  xla (w4a16, layout canonical, evidence: ...)
degraded  from w4a4, which the checkpoint declares, to w4a16 (more accurate)
rejected
  sm120_w4a4        NOT_BUILT             this build holds no sm120 library (jaxmoe._sm120): ...
"""

from jaxmoe.capability.context import (
    Override,
    current_override,
    current_target,
    log_degradation,
    override,
    select,
)
from jaxmoe.capability.manifest import check_manifest
from jaxmoe.capability.problem import Problem
from jaxmoe.capability.resolution import Rejection, Resolution, UnsupportedError
from jaxmoe.capability.resolver import Request, explain, implementation_names, resolve
from jaxmoe.capability.table import TABLE, Reason, Row
from jaxmoe.capability.targets import Target

__all__ = [
    "TABLE",
    "Override",
    "Problem",
    "Reason",
    "Rejection",
    "Request",
    "Resolution",
    "Row",
    "Target",
    "UnsupportedError",
    "check_manifest",
    "current_override",
    "current_target",
    "explain",
    "implementation_names",
    "log_degradation",
    "override",
    "resolve",
    "select",
]
