"""The port that a run is watched on: served from a thread, while the run goes on and for a while after it."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanmark.loadgen.errors import ScenarioError

_STOP_WITHIN_S = 0.05  # the server looks so often whether it is to end
_BESIDE_TIMEOUT_S = 1.0
_LONGEST_HOLD_S = 90.0

Page = Callable[[str], tuple[str, bytes]]  # of a request's Accept header: content type and body


class Scrapes:
    """A page, and when it was asked for."""

    def __init__(self, page: Page, now: Callable[[], float] = time.monotonic) -> None:
        self._page = page
        self._now = now
        self._at: list[float] = []

    def __call__(self, accept: str) -> tuple[str, bytes]:
        """The page."""
        self._at = [*self._at[-2:], self._now()]
        return self._page(accept)

    @property
    def hold_s(self) -> float:
        """Two of the scraper's intervals, and none where nobody has scraped at least twice."""
        times = self._at
        if len(times) < 2:
            return 0.0
        return min(2.0 * max(b - a for a, b in itertools.pairwise(times)), _LONGEST_HOLD_S)


def texts_of(urls: Sequence[str]) -> Callable[[], Sequence[str]]:
    """What these servers of ours tell at /metrics; one that does not answer tells nothing."""
    from urllib.request import ProxyHandler, build_opener

    opener = build_opener(ProxyHandler({}))

    def read(url: str) -> str:
        try:
            with opener.open(url, timeout=_BESIDE_TIMEOUT_S) as reply:
                return bytes(reply.read()).decode()
        except (OSError, ValueError):
            return ""

    return lambda: [read(url) for url in urls]


def _is_loopback(host: str) -> bool:
    """Whether a browser that sends this Host header was told to come here, and not by a name that its owner has bent to this address."""
    return host.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


def serve(pages: Mapping[str, Page], port: int, host: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
    """Serves pages by their path; gives the port and what ends it. Raises ScenarioError where the port is taken."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from socketserver import TCPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            page = pages.get(path)
            if host == "127.0.0.1" and path != "/metrics" and not _is_loopback(self.headers.get("Host", "")):
                self.send_error(403, "only by a name of this machine's own")
                return
            if page is None:
                self.send_error(404, "there is " + ", ".join(pages))
                return
            kind, body = page(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def server_bind(self) -> None:
            """Without looking up the host's name, which may take seconds."""
            TCPServer.server_bind(self)
            self.server_name, self.server_port = host, self.socket.getsockname()[1]

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Who does not wait for the reply is no concern of the run's."""

    try:
        server = Server((host, port), Handler)
    except OSError as e:
        where = f"--metrics-port {port}" if host == "127.0.0.1" else f"--metrics-host {host} --metrics-port {port}"
        raise ScenarioError(f"{where}: {e.strerror}: choose another, or leave it out for a free one") from None
    thread = threading.Thread(target=server.serve_forever, args=(_STOP_WITHIN_S,), daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop


async def hold(seconds: float, enough: asyncio.Event) -> None:
    """Leaves the pages up for so long, or until it is enough."""
    try:
        async with asyncio.timeout(seconds):
            await enough.wait()
    except TimeoutError:
        return
