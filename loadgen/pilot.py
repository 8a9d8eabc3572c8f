"""A pilot: trials that set the arms' rates so that all have as many calls in flight as the baseline at its own."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from fanmark.loadgen.scenario import Arm, Scenario

TRIALS = (4, 16, 64, 64, 64, 64)  # so many queries of each arm are looked at in a trial, once the system is filled
START_BELOW = 8.0  # in the first, all but the baseline get the baseline's rate divided by this
AGREED = 0.03  # where calls in flight are as near to each other, a pilot ends

# carries out a trial: the scenario with its rates, the arms that run at once, the trial's number, how many queries of each are looked at;
# gives, by arm, the time that a query's calls take in sum
Trial = Callable[[Scenario, Sequence[Arm], int, int], Awaitable[dict[str, float]]]


async def pilot(scenario: Scenario, trial: Trial, drained: Callable[[], Awaitable[None]]) -> Scenario:
    """The scenario with the rates that were found. Trials run the arms as the scenario does, at once or apart."""
    base, arms = scenario.baseline, scenario.arms
    rate = scenario.load_of(base).rate
    rates = {arm.name: rate if arm is base else rate / START_BELOW for arm in arms}
    for number, least in enumerate(TRIALS):
        tried = with_rates(scenario, rates)
        calls_s: dict[str, float] = {}
        for group in [tried.arms] if tried.load.arms == "interleaved" else [[arm] for arm in tried.arms]:
            calls_s |= await trial(tried, group, number, least)
            await drained()
        rates, apart = matched(rates, calls_s, base.name)
        if apart <= AGREED and least == TRIALS[-1]:
            break
    return with_rates(scenario, rates)


def matched(rates: Mapping[str, float], calls_s: Mapping[str, float], base: str) -> tuple[dict[str, float], float]:
    """The rates at which all arms have as many calls in flight as the baseline at its own (by Little's law rate x the time that a query's
    calls take in sum), and how far the farthest was from that at the rates given, as a share."""
    wanted = rates[base] * calls_s[base]
    found = {arm: wanted / calls_s[arm] if calls_s[arm] else rates[arm] for arm in rates}
    return found, max(abs(rates[arm] / found[arm] - 1) for arm in rates)


def with_rates(scenario: Scenario, rates: Mapping[str, float]) -> Scenario:
    """The scenario with these rates of its arms."""
    arms = [msgspec.structs.replace(arm, rate=rates[arm.name]) for arm in scenario.arms]
    return msgspec.structs.replace(scenario, arms=arms)
