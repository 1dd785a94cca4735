"""Attention plans: what a step attends to, cut into work that is spread evenly (FlashInfer, arXiv 2501.01005).

Made once a step from block tables and positions, in numpy alone, and used by every layer and any kernel that takes its arrays. A plan
never changes a bit of what is computed: it cuts at the borders of partitions only, and partial states are merged left to right.
"""

from headrace.compute.plans.bounds import Bounds, Capacity, bounds
from headrace.compute.plans.plan import Limits, Plan, Shape, advance, make_plan
from headrace.compute.plans.sparse import PARTITION, BlockSparse, Queries, describe

__all__ = [
    "PARTITION",
    "BlockSparse",
    "Bounds",
    "Capacity",
    "Limits",
    "Plan",
    "Queries",
    "Shape",
    "advance",
    "bounds",
    "describe",
    "make_plan",
]
