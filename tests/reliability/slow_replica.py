#!/usr/bin/env python3
"""One of four upstreams takes ten times as long as the others: with least_connections at least
four fifths of its part of the traffic go elsewhere."""

from common import Ask, Client, Gateway, Sim, at_rate, main, one_group, upstream

QUICK, SLOW = "100ms", "1s"


async def body(run, given):
    times = [SLOW, QUICK, QUICK, QUICK]
    sims = [Sim(run, f"gpu-{nth}", "--first-token", time) for nth, time in enumerate(times)]
    upstreams = [upstream(sim) for sim in sims]
    gateway = Gateway(run, one_group(upstreams, strategy="least_connections"))
    client = Client(run, gateway.addr)
    failures = []

    async def one():
        ask = Ask(run, stream=True, tokens=2)
        if fault := ask.fault_of(await client.ask(ask)):
            failures.append((ask.request_id, fault))

    # Nothing is known at first; what counts is what comes of it.
    rate = 80
    await at_rate(rate, given.seconds / 3, one)
    for sim in sims:
        sim.forget()
    await at_rate(rate, 2 * given.seconds / 3, one)
    client.close()
    counts = [len(sim.calls()) for sim in sims]
    moved = 1 - counts[0] / (sum(counts) / 4)
    run.figure("requests, the slow one first", str(counts), None, "")
    # Of few requests one more or less is a larger part.
    least = 0.7 if given.short else 0.8
    run.figure("of its part went elsewhere", moved, moved >= least, f">= {least}")
    run.figure("failures", len(failures), not failures, "0")
    run.fail("failed", failures)
    await run.check_invariants(sims)


if __name__ == "__main__":
    main("slow_replica", 45, 6, body)
