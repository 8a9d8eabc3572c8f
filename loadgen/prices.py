"""What work costs in dollars."""

from typing import Annotated

import msgspec

Price = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Dollars per million tokens; or of a server of one's own, `gpu_hour` for each of the `gpus` of a replica. With both, one pays for the
    GPUs, and tokens are what an API would ask."""

    input: Price | None = None
    output: Price | None = None
    cached_input: Price | None = None
    gpu_hour: Price | None = None
    gpus: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def replica_s(self) -> float | None:
        """Dollars of a replica for a second; None where it is not one's own."""
        return None if self.gpu_hour is None else self.gpu_hour * self.gpus / 3600.0

    def of_tokens(self, read: float, cached: float, written: float) -> float | None:
        """By token prices; a cached token has its own price only where there is one. None without them."""
        if self.input is None or self.output is None:
            return None
        cheap = cached if self.cached_input is not None else 0
        return ((read - cheap) * self.input + cheap * (self.cached_input or 0.0) + written * self.output) / 1e6
