"""Static roles: every instance leans as it was started (the rule of DistServe and of most deployments between two re-plannings).

Leaves out: everything; it is the baseline of the axis.
"""

import msgspec

from headrace.types.ids import Address
from headrace.types.request import NEVER_NS
from headrace.types.views import ClusterView


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    period_ns = NEVER_NS

    def __init__(self, config: Config) -> None:
        pass

    def turn(self, view: ClusterView) -> dict[Address, str]:
        return {}
