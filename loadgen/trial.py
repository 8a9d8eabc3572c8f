"""A window of a scenario in virtual time, kept in memory: what a search looks at, by the code of `fanmark simulate`, without its files."""

import asyncio
import gc
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.fleet_use import Use, Watch
from fanmark.loadgen.lanes.virtual import Service
from fanmark.loadgen.lanes.virtual_bare import BareEndpoint, Marks, has_no_words
from fanmark.loadgen.records import Begun, Query, Window
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import stand_in
from fanmark.loadgen.tally import Tally


@dataclass
class Trial:
    """All queries of one window of one arm, those of lead-in and lead-out too, and the engines' accounts in it."""

    queries: list[Query] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    accounts: Mapping[str, Use] = field(default_factory=dict)
    watch: Watch | None = None

    def begin(self, query: Begun) -> None:
        pass

    def write(self, query: Query) -> None:
        self.queries.append(query)

    def window(self, window: Window) -> None:
        self.windows.append(window)
        if self.watch is not None:
            self.watch.start_at, self.watch.stop_at = window.start_at, window.end_at

    @property
    def seconds(self) -> float:
        """Of the window, or of all where there is none."""
        return self.windows[0].seconds if self.windows else max(query.done_at for query in self.queries)

    @property
    def counted(self) -> list[Query]:
        """Those that count, in no order."""
        return [query for query in self.queries if not query.warmup]


def try_out(scenario: Scenario, topologies: Mapping[str, Topology], services: Mapping[str, Service]) -> Trial:
    """Raises FanmarkError where something is wrong. Nothing is collected meanwhile: what a window leaves behind is little, and looking for
    it over and over takes an eighth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return run_virtually(_try_out(scenario, topologies, services))
    finally:
        if collects:
            gc.enable()


async def _try_out(scenario: Scenario, topologies: Mapping[str, Topology], services: Mapping[str, Service]) -> Trial:
    if has_no_words(scenario):
        endpoints, tools = await stand_in(scenario, topologies, services, BareEndpoint, Marks())
    else:
        endpoints, tools = await stand_in(scenario, topologies, services)
    if len(scenario.arms) == 1 and scenario.workload.cache in ("arm", "run"):
        # The engines are new, and nobody else is there: a salt would keep nobody apart, and who warmed the cache need not be asked
        scenario = msgspec.structs.replace(scenario, workload=msgspec.structs.replace(scenario.workload, cache="warm"))
    trial, watch = Trial(), Watch(endpoints)
    trial.watch, trial.accounts = watch, watch.accounts
    if scenario.load.duration is None:
        watch.start_at = 0.0
    tally = Tally({arm.name: arm.topology for arm in scenario.arms}, scenario.baseline.name)
    run_id, now = f"virtual-{scenario.seed}", asyncio.get_running_loop().time
    await Run(scenario, topologies, endpoints, tools, tally, trial, run_id, now).execute()
    watch.end(endpoints)
    return trial
