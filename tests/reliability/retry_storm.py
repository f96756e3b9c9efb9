#!/usr/bin/env python3
"""The only upstream answers 503 to everything, and every client asks three times: the upstream
sees at most 1.2 times what is asked, and only single tries once its breaker is open."""

import asyncio
from collections import Counter

from common import Ask, Client, Gateway, Sim, at_rate, main, one_group, upstream

# As the official clients do.
TIMES = 3


async def body(run, given):
    sim = Sim(run, "only")
    sim.fault("status=503")
    gateway = Gateway(run, one_group([upstream(sim)]))
    client = Client(run, gateway.addr)
    statuses = Counter()

    async def one():
        for _ in range(TIMES):
            answer = await client.ask(Ask(run))
            statuses[answer.status or answer.broken] += 1
            if answer.status == 200:
                return

    rate = (30 if given.short else 200) / TIMES
    begin = 2
    await at_rate(rate, begin, one)
    first = len(sim.calls())
    asked = statuses.total()
    sim.forget()
    await at_rate(rate, given.seconds - begin, one)
    later = len(sim.calls())
    client.close()
    run.figure("requests", statuses.total(), None, "")
    run.figure("answered with", dict(statuses), set(statuses) <= {502, 503}, "502, 503")
    share = first / asked
    run.figure("the upstream saw, at first, per request", share, share <= 1.2, "<= 1.2")
    # One a second as a last resort, and one whenever the breaker lets one try.
    most = 2 * (given.seconds - begin)
    run.figure("the upstream saw, later", later, later <= most, f"<= {most:.0f}")
    sim.heal()
    healthy = 0
    for _ in range(700):
        ask = Ask(run)
        healthy = healthy + 1 if not ask.fault_of(await client.ask(ask)) else 0
        if healthy == 5:
            break
        await asyncio.sleep(0.1)
    client.close()
    run.figure("good again after it is", healthy == 5, healthy == 5, "True")
    await run.check_invariants([sim])


if __name__ == "__main__":
    main("retry_storm", 60, 6, body)
