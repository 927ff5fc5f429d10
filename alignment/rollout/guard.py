"""Ask for the server's key at every path: vLLM 0.31 asks under /v1 alone, not where weights are replaced."""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
OPEN = ("/health", "/ping")  # for load balancers; they tell nothing and change nothing


class KeyEverywhere:
    """What `vllm serve --middleware` takes: ASGI middleware that knows the key in VLLM_API_KEY."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._key = os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN or self._knows_the_key(scope):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _knows_the_key(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given, self._key)
