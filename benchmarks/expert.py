"""An expert for balance.py. A request takes its `x-work` times the expert's mean, in an exactly computed queue.

Slots become free at the computed time, not when this process wakes up, so that late timers do not reduce its capacity.
"""

from __future__ import annotations

import argparse
import asyncio

from aiohttp import web

from benchmarks.queues import Slots


def make_app(name: str, slots: int, mean: float) -> web.Application:
    queue = Slots(slots)

    async def process(request: web.Request) -> web.Response:
        clock = asyncio.get_running_loop().time
        now = clock()
        end = queue.finish(now, float(request.headers["x-work"]) * mean)
        await request.read()
        await asyncio.sleep(end - clock())
        return web.Response(text=name, headers={"x-expert": name})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/process", process)
    app.router.add_get("/healthz", healthz)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--mean", type=float, required=True, help="seconds")
    args = parser.parse_args()
    app = make_app(args.name, args.slots, args.mean)
    # Keep connections open between rounds: closing one could lose a request in flight.
    web.run_app(app, host="127.0.0.1", port=args.port, access_log=None, print=None, keepalive_timeout=7200)


if __name__ == "__main__":
    main()
