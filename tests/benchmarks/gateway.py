"""
Customs' side of a call in a process of its own: ``python -m … PEM CUSTOMS CA``.

It answers calls of an API itself, and hands the exchange of tokens on to the sandbox: what the
sandbox does for a grant, the next call does not wait for, as it does not at Customs. *PEM* is its
TLS key and certificate, *CUSTOMS* the sandbox's address and *CA* what that is trusted by. Prints
its own address when it listens.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

import aiohttp
from aiohttp import web


async def main(pem: str, customs: str, ca: str) -> None:
    trusted = ssl.create_default_context(cafile=ca)
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(pem)
    async with aiohttp.ClientSession() as session:

        async def answer(request: web.BaseRequest) -> web.Response:
            if request.method == "GET":
                return web.json_response({"status": "OK"})
            body, kind = await request.read(), request.headers["content-type"]
            async with session.post(
                customs + request.path, data=body, headers={"content-type": kind}, ssl=trusted
            ) as reply:
                return web.Response(
                    status=reply.status, body=await reply.read(), content_type=reply.content_type
                )

        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=own)
        await site.start()
        host, port = runner.addresses[0]
        print(f"https://{host}:{port}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
