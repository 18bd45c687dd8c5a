"""Ask a server that speaks OpenAI's chat completions, with retries.

The key is read from an environment variable at every request. The key is sent in the Authorization header only. In
every message and answer that leaves this module it is replaced by MASK.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from grpo_core.schema import printable

FIRST_PAUSE = 0.5  # seconds before the first retry; each further one is twice as long
MAX_PAUSE = 30.0  # seconds, unless the server asks for more
MAX_BYTES = 4_000_000  # of a response
MAX_SHOWN = 200  # characters of a response in a message
RETRIED = {408, 409, 425, 429, *range(500, 600)}  # statuses after which the same request may succeed
MASK = "***"


AnyText = TypeVar("AnyText", str, bytes)


class NoAnswer(Exception):
    """The server gave no answer; the message is the reason, as a verb phrase."""


class _Retry(Exception):
    """A request failed and may succeed later."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds that the server asks for


@dataclass(frozen=True)
class ChatClient:
    """A server at `url`, the address that ends before /chat/completions."""

    url: str
    key_from: str  # environment variable with the key; no key is sent where it is not set
    retries: int  # after the first request
    request_timeout: float  # seconds of one request
    transport: Any = None  # of httpx, for tests; None: the network

    def open(self) -> Any:
        """Return an HTTP client, which belongs to the event loop that uses it first."""
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(timeout=None, limits=limits, transport=self.transport)  # `ask` limits the time

    async def ask(self, client: Any, body: Mapping[str, Any]) -> str:
        """Return the text that the server answers to the request `body`.

        Raises:
            NoAnswer: the server refuses the request, or fails at the last retry too.
        """
        pause = FIRST_PAUSE
        for attempt in range(self.retries + 1):
            try:
                return self.mask(await self._ask_once(client, body))
            except _Retry as error:
                if attempt == self.retries:
                    raise NoAnswer(self.mask(str(error))) from None
                await asyncio.sleep(max(pause, error.pause))
                pause = min(2 * pause, MAX_PAUSE)
            except NoAnswer as error:
                raise NoAnswer(self.mask(str(error))) from None
        raise AssertionError("the last attempt returns or raises")

    async def _ask_once(self, client: Any, body: Mapping[str, Any]) -> str:
        import httpx

        try:
            async with asyncio.timeout(self.request_timeout):
                request = client.stream(
                    "POST",
                    f"{self.url.rstrip('/')}/chat/completions",
                    content=json.dumps(body).encode(),  # ASCII, with lone surrogates too
                    headers={"Content-Type": "application/json", **self._make_headers()},
                )
                async with request as response:
                    status, pause = response.status_code, _read_pause(response.headers.get("retry-after"))
                    content = self.mask(await _read_body(response.aiter_bytes()))
        except TimeoutError:
            raise _Retry(f"took more than {self.request_timeout:g} s for one request") from None
        except httpx.HTTPError as error:  # no connection, or one that breaks; a response that cannot be decoded
            raise _Retry(f"cannot be reached: {type(error).__name__}: {error}") from None
        if status in RETRIED:
            raise _Retry(_describe_status(status, content), pause)
        if status != 200:
            hint = f"; the key is read from the environment variable {self.key_from}" if status in (401, 403) else ""
            raise NoAnswer(_describe_status(status, content) + hint)
        return _read_answer(content)

    def _make_headers(self) -> dict[str, str]:
        key = self._read_key()
        if not key.isascii() or not key.isprintable():
            raise NoAnswer(f"cannot be asked: the environment variable {self.key_from} holds no key")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _read_key(self) -> str:
        return os.environ.get(self.key_from, "").strip()

    def mask(self, text: AnyText) -> AnyText:
        """Return the text or bytes with the key replaced."""
        key = self._read_key()
        if not key:
            return text
        quoted = json.dumps(key)[1:-1]  # as JSON writes it, where a slash may have a backslash too
        for form in sorted({key, quoted, quoted.replace("/", "\\/")}, key=len, reverse=True):
            text = text.replace(form, MASK) if isinstance(text, str) else text.replace(form.encode(), MASK.encode())
        return text


def _read_answer(content: bytes) -> str:
    try:
        answer = json.loads(content)["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise TypeError("content is no text")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = f"answered something else than a chat completion: {_show(content)}"
        raise _Retry(reason) from error
    return answer


async def _read_body(parts: AsyncIterator[bytes]) -> bytes:
    """Return a whole response.

    Raises:
        NoAnswer: it has more than MAX_BYTES.
    """
    content = bytearray()
    async for part in parts:
        content += part
        if len(content) > MAX_BYTES:
            raise NoAnswer(f"answered more than {MAX_BYTES:,} bytes")
    return bytes(content)


def _read_pause(retry_after: str | None) -> float:
    """Return the seconds of a header Retry-After; 0 without one, or where it is a date."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < float("inf") else 0.0


def _describe_status(status: int, content: bytes) -> str:
    return f"answered with the status {status}{f': {_show(content)}' if content else ''}"


def _show(content: bytes) -> str:
    text = " ".join(content.decode(errors="replace").split())
    return printable(text[:MAX_SHOWN]) + (" ..." if len(text) > MAX_SHOWN else "")
