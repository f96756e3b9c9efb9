#!/usr/bin/env python3
"""10,000 exchanges with clients that leave, refuse and fail, under reloads and one SIGTERM: each is
accounted for exactly once."""

import asyncio
import json
import random
import time

from captured import Captured, capturing, config, totals
from common import SECRETS, Ask, Client, Sim, main

CLIENTS = 24


async def body(run, given):
    count = given.count or (600 if given.short else 10_000)
    sim = Sim(run, "gpu-1", "--first-token", "1ms", "--rate", "2000")
    gateway = capturing(run, sim)
    client = Client(run, gateway.addr)
    whole, refused, left, failed = {}, set(), set(), []
    todo = iter(range(count))
    reloads, over = 0, False

    async def one():
        dice = random.random()
        ask = Ask(run, stream=random.random() < 0.6, tokens=random.randrange(4, 40))
        if dice < 0.15:
            left.add(ask.question)
            ask.stream, ask.tokens = True, 2000
            return await leave(gateway.addr, ask)
        if dice < 0.3:
            refused.add(ask.question)
            ask.headers["x-forebay-capture"] = "0"
        answer = await client.ask(ask)
        if fault := ask.fault_of(answer):
            failed.append((ask.request_id, fault))
        elif ask.question not in refused:
            whole[ask.question] = answer.content()

    async def work():
        for _ in todo:
            await one()

    async def reload():
        nonlocal reloads
        file = run.folder / "forebay.yaml"
        before = json.loads(file.read_text())
        while not over:
            await asyncio.sleep(0.7)
            reloads += 1
            # Another plugin each time, of the same folder.
            file.write_text(json.dumps({**before, **config(sim, sync=f"{300 + reloads}ms")}))

    reloading = asyncio.create_task(reload())
    began = time.monotonic()
    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    rate = count / (time.monotonic() - began)
    over = True
    await reloading
    # Some are on their way when it is told to stop.
    last = [Ask(run, stream=True, tokens=400) for _ in range(8)]
    asking = [asyncio.create_task(client.ask(ask)) for ask in last]
    await asyncio.sleep(0.1)
    gateway.child.terminate()
    for ask, answer in zip(last, await asyncio.gather(*asking)):
        if fault := ask.fault_of(answer):
            failed.append((ask.request_id, fault))
        else:
            whole[ask.question] = answer.content()
    await asyncio.to_thread(gateway.child.wait, 30)
    client.close()

    captured = Captured(run.folder / "captures")
    log = gateway.log.read_text(errors="replace")
    sums = totals(log)
    counted = sum(sums[name] for name in ("captured", "opted_out", "skipped", "dropped"))
    finished = sum(line["path"] == "/v1/chat/completions" for line in gateway.access_lines())
    lines = sum(captured.times.values())
    missing = [question for question in whole if captured.answers.get(question) != whole[question]]
    strangers = [q for q in captured.times if q not in whole and q not in left]
    kept_out = [question for question in refused if question in captured.times]
    run.figure("exchanges", count + len(last), None, "")
    run.figure("a second", rate, None, "")
    run.figure("reloads", log.count("configuration reloaded"), None, "")
    run.figure("clients that left", len(left), None, "")
    run.figure("failures that a client saw", len(failed), not failed, "0")
    run.fail("failed", failed)
    run.figure("finished, by the access log", finished, finished == count + len(last), "all")
    run.figure("accounted for", counted, counted == finished, "as many")
    run.figure("captured", sums["captured"], sums["captured"] == lines, f"{lines} lines")
    run.figure("opted out", sums["opted_out"], sums["opted_out"] == len(refused), len(refused))
    run.figure("skipped", sums["skipped"], None, "")
    run.figure("dropped", sums["dropped"], sums["dropped"] == 0, "0")
    run.figure("bad lines", len(captured.bad), not captured.bad, "0")
    run.figure("twice", len(captured.twice()), not captured.twice(), "0")
    run.figure("missing or other words", len(missing), not missing, "0")
    run.fail("missing", missing)
    run.figure("captured against their will", len(kept_out), not kept_out, "0")
    run.figure("of nobody", len(strangers), not strangers, "0")
    leaks = [name for name, value in SECRETS.items() if value in log]
    run.figure("secrets in the log", len(leaks), not leaks, "0")


async def leave(addr, ask):
    """Reads a little of the answer and closes the connection."""
    reader, writer = await asyncio.open_connection(*addr)
    writer.write(ask.bytes())
    await reader.read(random.randrange(1, 4000))
    writer.close()


if __name__ == "__main__":
    counts = {"--count": {"type": int, "help": "exchanges; default 10,000, short 600"}}
    main("capture_account", 0, 0, body, counts)
