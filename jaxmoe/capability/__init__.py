"""Which kernel runs, and why no other does: the table, its one reader, and targets.

>>> from jaxmoe.capability import Problem, Target, explain
>>> problem = Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768,
...                   num_experts=128, top_k=8, declared_compute="w4a4")
>>> print(explain(problem, Target.from_name("sm_120")))
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
from jaxmoe.capability.resolution import (
    Problem,
    Rejection,
    Resolution,
    UnsupportedError,
    explain,
    implementation_names,
    resolve,
)
from jaxmoe.capability.table import TABLE, Reason, Row
from jaxmoe.capability.targets import Target

__all__ = [
    "TABLE",
    "Override",
    "Problem",
    "Reason",
    "Rejection",
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
