#!/usr/bin/env python3
"""100 reloads and 20 upgrades under 500 requests a second and 50 long streams, half of them over
HTTP/2: nobody is refused, nothing fails, no stream is cut; upgrades that fail change nothing."""

import asyncio
import functools
import json
import os
import random
import signal
import subprocess
import time

from common import (
    Ask,
    Client,
    Gateway,
    Sim,
    at_rate,
    keep_asking,
    main,
    one_group,
    percentile,
    upstream,
)
from http2 import Http2Client

# Programs that cannot take over, each put in the binary's place for one upgrade.
BAD = {
    "crashes": "exit 3",
    "does not know how": 'unset FOREBAY_SUCCESSOR_OF; exec BINARY "$@" </dev/null',
    "talks nonsense": "echo nonsense >&0; exec sleep 60",
    "never is prepared": "exec sleep 60",
    "dies with the sockets": (
        'echo \'{"prepared":{"version":"9","wants":["LISTEN"]}}\' >&0; '
        "read greeting; read take; exit 9"
    ),
    "is not there": None,
}


async def body(run, given):
    short = given.short
    rate, streams = (60, 10) if short else (500, 50)
    upgrades, reloads = (3, 6) if short else (20, 100)
    failed = 1 if short else 10
    quick = Sim(run, "gpu-1", "--rate", "2000", "--first-token", "2ms")
    # A stream outlives several upgrades.
    tokens = int(given.seconds / 4 * 5)
    slow = Sim(run, "gpu-2", "--rate", "5", "--first-token", "20ms")
    config = one_group([upstream(quick)])
    config["groups"]["slow"] = {"local": True, "upstreams": [upstream(slow)]}
    to_slow = {"model": "slow", "groups": ["slow"], "rewrite": {"slow": "demo"}}
    config["routes"].insert(0, to_slow)
    config["upgrade"] = {"prepare": "2s"}
    binary, link = run.binary, run.folder / "forebay"
    link.symlink_to(binary)
    run.binary = link
    gateway = Gateway(run, config)
    http1, http2 = Client(run, gateway.addr), Http2Client(run, gateway.addr)
    clients = [http1, http2]
    failures, seconds, done = [], [], {"streams": 0}

    async def one(client, stream):
        ask = Ask(run, stream=stream, tokens=random.randint(tokens // 2, tokens) if stream else 4)
        if stream:
            ask.model = "slow"
        answer = await client.ask(ask, timeout=given.seconds + 60)
        if stream:
            done["streams"] += 1
        else:
            seconds.append(answer.seconds)
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, type(client).__name__, stream, fault))

    async def streaming(client, until):
        await asyncio.sleep(random.random() * 2)
        await keep_asking(until, lambda: one(client, True))

    async def command(*arguments):
        process = await asyncio.create_subprocess_exec(
            str(binary), *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=gateway.env
        )
        said, _ = await process.communicate()
        return process.returncode, said.decode()

    pids, refused, wrong = [gateway.child.pid], [], []

    async def upgrade():
        code, said = await command("upgrade", "-c", str(run.folder / "forebay.yaml"))
        if code != 0:
            wrong.append(f"upgrade: {said}")
            return
        pids.append(int(said.split("pid=")[1].split()[0]))
        gateway.adopt(pids[-1])

    async def fail_to_upgrade(kind, script):
        link.unlink()
        if script is not None:
            script = script.replace("BINARY", str(binary))
            script = script.replace("LISTEN", f"127.0.0.1:{gateway.addr[1]}")
            link.write_text(f"#!/bin/sh\n{script}\n")
            link.chmod(0o755)
        code, said = await command("upgrade", "-c", str(run.folder / "forebay.yaml"))
        refused.append(kind)
        if code == 0:
            wrong.append(f"it served: {kind}: {said}")
            gateway.adopt(int(said.split("pid=")[1].split()[0]))
        link.unlink(missing_ok=True)
        link.symlink_to(binary)

    def reload(number):
        file = run.folder / "forebay.yaml"
        changed = {**json.loads(file.read_text()), "limits": {"n": 8 + number % 2}}
        new = file.with_suffix(".new")
        new.write_text(json.dumps(changed))
        new.rename(file)
        status = gateway.admin_ask("POST", "/reload")[0]
        if status != 200:
            wrong.append(f"reload: {status}")

    async def changes(until):
        steps = [upgrade] * upgrades
        steps += [functools.partial(asyncio.to_thread, reload, n) for n in range(reloads)]
        for kind, script in BAD.items():
            steps += [functools.partial(fail_to_upgrade, kind, script)] * failed
        random.shuffle(steps)
        pause = (until - time.monotonic() - 2) / len(steps)
        for step in steps:
            next_at = time.monotonic() + pause
            await step()
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    until = time.monotonic() + given.seconds
    changing = asyncio.create_task(changes(until))
    loads = [streaming(clients[number % 2], until - 5) for number in range(streams)]
    turn = iter(range(1 << 62))
    loads.append(at_rate(rate, given.seconds, lambda: one(clients[next(turn) % 2], False)))
    await asyncio.gather(*loads)
    await changing
    for client in clients:
        client.close()
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids[:-1] if alive(pid)]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    run.figure("upgrades", len(pids) - 1, len(pids) - 1 == upgrades, f"{upgrades}")
    run.figure("reloads", reloads, None, "")
    run.figure("upgrades that were to fail", len(refused), None, "")
    run.figure("went another way", len(wrong), not wrong, "0")
    run.fail("went another way", wrong)
    run.figure("requests not streamed", len(seconds), None, "")
    run.figure("streams", done["streams"], None, "")
    run.figure("HTTP/2 connections", http2.connections, None, "")
    run.figure("refused, failed or cut", len(failures), not failures, "0")
    run.fail("failed", failures)
    closed = http1.closed_under
    run.figure("kept connections closed under a request", closed, closed == 0, "0")
    run.figure("old processes still there", len(left), not left, "0")
    run.figure("p99 s, not streamed", percentile(seconds, 0.99), None, "")
    run.figure("longest s, not streamed", max(seconds), None, "")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    await run.check_invariants([quick, slow])


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main("upgrade", 300, 12, body)
