"""Running simulations."""
from __future__ import annotations

import functools
import logging
import random
import sys
import time

from workpool.testing.simulation.invariants import judge
from prometheus_client import CollectorRegistry

from workpool.metrics import observer
from workpool.plugins import asking
from workpool.pool import telemetry
from workpool.testing.simulation.machine import run_machines
from workpool.testing.simulation.schedule import draw
from workpool.testing.simulation.stage import play
from workpool.testing.simulation.world import World

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
        return await World(schedule, registry).live(judge)
    return run_machines(main)
shortcuts()
if __name__=="__main__":
    from workpool.testing.simulation.invariants import judge
    from collections import Counter
    logging.disable(logging.CRITICAL)
    a=time.perf_counter()
    s0=int(sys.argv[1]); n=int(sys.argv[2])
    bad=Counter(); first={}
    for seed in range(s0,s0+n):
        schedule=draw(random.Random(seed),seed)
        c,words=simulate(schedule)
        if n<5:
            print(schedule.pools, schedule.troubles, schedule.kinds); 
            for d in schedule.deeds: print(d)
            log=[(r.time,0,r.work_id[-6:],r.kind,r.worker_id,r.state,r.lease_end and r.lease_end-1772366400) for r in c.history]
            log+=[(r.started,1,r.work_id[-6:],"RUN",r.node.machine.name,r.play,"ended",r.ended,"told",r.told_at,r.result) for r in c.trace.runs]
            log+=[(r.at,2,str(r.work_id)[-6:],"SENT",r.node.machine.name,r.op,r.answer,r.answered_at,r.trouble and (r.trouble.there,r.trouble.back,r.trouble.applied,r.trouble.answer)) for r in c.trace.sent]
            for l in sorted(log,key=lambda l:l[:2]): print(*l)
            for node in c.trace.nodes: print(node.machine.name,node.worker_id,"born",node.born,"drain",node.drain,node.drained,"closed",node.closed,"crash",node.crashed,node.left_behind,node.error,node.machine.pauses,node.cuts)
            for node in c.trace.nodes: 
                for at,e in node.events: 
                    if type(e).__name__ not in ("PollFinished",): print("  ",node.machine.name,at,str(e)[:60],getattr(e,"outcome",""),getattr(e,"result",""))
            print(words)
        for w in words:
            k=w.split(":")[0]; bad[k]+=1; first.setdefault(k,[]).append((seed,w))
    for k,v in bad.most_common():
        print(k,v)
        for x in first[k][:4]: print("    ",x)
    print((time.perf_counter()-a)/n*1000,"ms")
