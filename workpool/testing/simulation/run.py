"""Running simulations."""
from __future__ import annotations
import functools
import logging, random, sys, time
from workpool.metrics import observer
from workpool.plugins import asking
from workpool.pool import telemetry
from workpool.testing.simulation.machine import run_machines
from workpool.testing.simulation.schedule import draw
from workpool.testing.simulation.stage import play
from workpool.testing.simulation.world import World
from prometheus_client import CollectorRegistry
registry=CollectorRegistry()

def shortcuts():
    """Do once what every pool would do again, with the same result: most of the cost of a start."""
    load, in_order = asking.load, asking._in_order
    loaded = functools.cache(lambda: load((play,), {}))
    ordered = functools.cache(lambda: in_order(loaded()))
    asking.load = lambda *_: loaded()
    asking._in_order = lambda _: ordered()
    observer._Series = series_of
    telemetry.version = functools.cache(telemetry.version)

_Series = observer._Series
_series = {}

def series_of(metric, row, environment_id):
    if metric not in _series:
        _series[metric] = _Series(metric, row, environment_id)
    return _series[metric]

def simulate(schedule):
    async def main():
        random.seed(schedule.seed)
        world = World(schedule, registry)
        await world.live()
        return world
    return run_machines(main)
shortcuts()
if __name__=="__main__":
    logging.disable(logging.CRITICAL)
    a=time.perf_counter()
    s0=int(sys.argv[1]); n=int(sys.argv[2])
    for seed in range(s0,s0+n):
        w=simulate(draw(random.Random(seed),seed))
        if n<5:
            print(w.schedule); 
            for r in w.history: print(r)
            for r in w.trace.runs: print(r.node.machine.name,r.work_id[-5:],r.play,r.started,r.ended,r.told_at,r.result)
        if not w._all_stopped(): print("NOT STOPPED",seed)
    print((time.perf_counter()-a)/n*1000,"ms")
