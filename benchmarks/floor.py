"""The floor: an empty grpc.aio server on uvloop. It parses nothing and answers every Check with the same bytes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop


async def serve(path: str, answer: bytes) -> None:
    async def check(_data: bytes, _context: Any) -> bytes:
        return answer

    method = grpc.unary_unary_rpc_method_handler(check)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": method})]
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", help="path of the Unix socket to listen on")
    parser.add_argument("answer", type=Path, help="file with a serialised CheckResponse")
    parser.add_argument("--batch", action="store_true", help="use the scheduling policy of SRP, SCHED_BATCH")
    args = parser.parse_args()
    if args.batch:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    uvloop.run(serve(args.socket, args.answer.read_bytes()))
