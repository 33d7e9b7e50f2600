"""Rewards that compare a completion with what its row says; a config names them, `posttrain.data.verifiers:exact`.

Each gives 1 or 0 for a completion, and raises where the row cannot be judged by: that is a mistake of the
data, which drops the group, and never a reward of 0. docs/rl.md lists the fields of a row.
"""

from posttrain.data.verifiers.formula import math
from posttrain.data.verifiers.numeric import numeric
from posttrain.data.verifiers.program import code
from posttrain.data.verifiers.text import exact, regex

__all__ = ["code", "exact", "math", "numeric", "regex"]
