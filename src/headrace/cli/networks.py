"""The links of a simulated fleet, as they are written in a file or a flag."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LinkOptions(BaseModel):
    """The links of one level: bytes/s into and out of each unit; seconds, one way."""

    model_config = ConfigDict(extra="forbid")
    bandwidth: float
    latency: float = 0.0


LevelOptions = Literal["device", "host", "rack", "cluster", "datacentre"]


class BandwidthStep(BaseModel):
    """From `at` on (seconds of the trace), the links of a level, or of one unit of it, have this share of their bandwidth."""

    model_config = ConfigDict(extra="forbid")
    at: float
    level: LevelOptions
    factor: float
    unit: int | None = None


class Network(BaseModel):
    """The links of a simulated fleet. What is left out follows from the hardware."""

    model_config = ConfigDict(extra="forbid")
    device: LinkOptions | None = Field(default=None, description="Of an instance, inside its host")
    host: LinkOptions | None = Field(default=None, description="Of a host: all its network adapters together")
    rack: LinkOptions | None = None
    cluster: LinkOptions | None = None
    datacentre: LinkOptions | None = None
    steps: list[BandwidthStep] = []
