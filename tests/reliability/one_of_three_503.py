#!/usr/bin/env python3
"""One of three upstreams answers 503 to everything: at least 99.9 % of all requests succeed."""

from common import Ask, Client, Gateway, Sim, at_rate, main, one_group, percentile, upstream


async def body(run, given):
    sims = [Sim(run, f"gpu-{number}", "--first-token", "20ms") for number in (1, 2, 3)]
    sims[0].fault("status=503")
    gateway = Gateway(run, one_group([upstream(sim) for sim in sims]))
    client = Client(run, gateway.addr)
    failures, seconds = [], []

    async def one():
        ask = Ask(run, stream=len(seconds) % 2 == 0)
        answer = await client.ask(ask)
        seconds.append(answer.seconds)
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, fault))

    await at_rate(20 if given.short else 100, given.seconds, one)
    client.close()
    share = 1 - len(failures) / len(seconds)
    run.figure("requests", len(seconds), None, "")
    run.figure("success", share, share >= 0.999, ">= 0.999")
    run.fail("failed", failures)
    run.figure("asked of the one that fails", len(sims[0].calls()), None, "")
    run.figure("p99 s", percentile(seconds, 0.99), None, "")
    await run.check_invariants(sims)


if __name__ == "__main__":
    main("one_of_three_503", 60, 6, body)
