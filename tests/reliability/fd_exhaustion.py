#!/usr/bin/env python3
"""A gateway that may open 256 files meets 1,000 connections: streams that run go on, nothing
spins, and when they leave it serves again."""

import asyncio
import time

from common import Ask, Client, Gateway, Sim, keep_asking, main, one_group, upstream

FILES = 256
CONNECTIONS = 1000


async def body(run, given):
    sim = Sim(run, "gpu-1", "--rate", "10")
    gateway = Gateway(run, one_group([upstream(sim)]), nofile=FILES)
    client = Client(run, gateway.addr)
    failures = []

    async def stream():
        ask = Ask(run, stream=True, tokens=int(given.seconds * 10) + 20)
        if fault := ask.fault_of(await client.ask(ask, timeout=given.seconds * 4 + 60)):
            failures.append((ask.request_id, fault))

    streams = [asyncio.create_task(stream()) for _ in range(5)]
    while gateway.metrics().get("forebay_requests_in_flight", 0) < 5:
        await asyncio.sleep(0.05)

    closing, held = False, []

    async def hold(number):
        """Holds a connection, anew whenever it is cut."""
        while not closing:
            try:
                local = (f"127.1.0.{number // 50 + 1}", 0)
                reader, writer = await asyncio.open_connection(*gateway.addr, local_addr=local)
                held.append(writer)
                await reader.read()
                writer.close()
            except OSError:
                pass
            await asyncio.sleep(0.2)

    holders = [asyncio.create_task(hold(number)) for number in range(CONNECTIONS)]
    await asyncio.sleep(1)
    cpu, begun, most = gateway.cpu_seconds(), time.monotonic(), 0
    while time.monotonic() < begun + given.seconds:
        most = max(most, gateway.fds())
        await asyncio.sleep(0.1)
    cores = (gateway.cpu_seconds() - cpu) / (time.monotonic() - begun)
    closing = True
    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    for writer in held:
        writer.close()

    left = time.monotonic()

    async def again():
        ask = Ask(run)
        fault = ask.fault_of(await client.ask(ask, timeout=10))
        await asyncio.sleep(0.1 if fault else 0)
        return fault

    fault = "never"
    while fault and time.monotonic() < left + 30:
        fault = await again()
    recovered = time.monotonic() - left
    then = [found for found in await keep_asking(time.monotonic() + 1, again) if found]
    await asyncio.gather(*streams)
    client.close()
    run.figure("connections that were tried", CONNECTIONS, None, "")
    run.figure("gateway fds, most", most, most <= FILES, f"<= {FILES}")
    run.figure("gateway CPU meanwhile, cores", cores, cores < 0.5, "< 0.5")
    run.figure("streams that did not go on", len(failures), not failures, "0")
    run.fail("failed", failures)
    run.figure("serves again after s", recovered, not fault and recovered <= 15, "<= 15")
    run.figure("failures afterwards", len(then), not then, "0")
    run.fail("failed afterwards", then)
    await run.check_invariants([sim])


if __name__ == "__main__":
    main("fd_exhaustion", 30, 5, body)
