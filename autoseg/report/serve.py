"""The live report: the page behind a small web server that this machine alone can reach."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from autoseg.errors import AutosegError, ConfigError
from autoseg.report.gather import inputs_digest, last_finished
from autoseg.report.page import check_run, render
from autoseg.workspace.digests import file_signature
from autoseg.workspace.files import digest
from autoseg.workspace.stages import Stage
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PATIENCE_S = 10.0
"""Seconds that a client may be silent for in the middle of a request."""
MOST_CONNECTIONS = 16
"""At once: some tabs of a browser, of which each holds a few."""


class LiveReport:
    """The page, made anew only where a file it shows was written since."""

    def __init__(self, work_dir: Path, stages: Sequence[Stage[Any]]) -> None:
        self.workspace, self.stages = Workspace(work_dir), stages
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] | None = None

    def version(self) -> str:
        """A digest of all files the page is made from."""
        digests = [inputs_digest(last_finished(self.workspace), self.stages)]
        for path in (self.workspace.usage, self.workspace.commands):
            digests.append(digest(file_signature(path)) if path.exists() else "")
        return digest(digests)

    def page(self) -> bytes:
        """The page as it is now.

        Raises:
            AutosegError: The folder is no run's, or a file of it is damaged.
        """
        with self._lock:
            version = self.version()
            if self._page is None or self._page[0] != version:
                self._page = (version, render(last_finished(self.workspace), self.stages, live=True).encode())
            return self._page[1]


class ReportServer(ThreadingHTTPServer):
    """A thread a connection, and no more than some at once."""

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        """Listen."""
        self.free_places = MOST_CONNECTIONS
        self._counting = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or hang up where all are taken."""
        with self._counting:
            is_taken = self.free_places > 0
            self.free_places -= is_taken
        if is_taken:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer; the place is free afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self.free_places += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over clients that went away; say all else."""
        if not isinstance(sys.exception(), OSError):
            log.exception("report: a request failed")


def make_server(work_dir: Path, stages: Sequence[Stage[Any]], port: int) -> ReportServer:
    """A server for the live report, bound to the loopback address; `serve_forever` starts it.

    Args:
        work_dir: a run's folder.
        stages: the table of stages.
        port: 0 takes a free one.

    Raises:
        ConfigError: The port is taken or may not be used.
        WorkspaceError: The folder is no run's.
    """
    live = LiveReport(work_dir, stages)
    check_run(live.workspace)

    class Handler(BaseHTTPRequestHandler):
        """Answers / with the page and /version with its digest."""

        timeout = PATIENCE_S

        def do_GET(self) -> None:
            # A page of another site that resolves to this address must not read the report.
            if self.headers.get("Host", "").partition(":")[0].lower() not in (HOST, "localhost"):
                self.send_error(403)
                return
            try:
                if self.path == "/":
                    self.answer(200, "text/html; charset=utf-8", live.page())
                elif self.path == "/version":
                    self.answer(200, "text/plain", live.version().encode())
                else:
                    self.send_error(404)
            except AutosegError as error:
                self.answer(500, "text/plain; charset=utf-8", str(error).encode())

        def answer(self, code: int, kind: str, body: bytes) -> None:
            """Send a whole answer."""
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the terminal quiet."""

    try:
        return ReportServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--port: {port} cannot be used ({reason}). Give another, or 0 for a free one.") from error


def serve_report(work_dir: Path, stages: Sequence[Stage[Any]], port: int) -> int:
    """Serve the live report until Ctrl-C.

    Returns:
        Exit code 0.

    Raises:
        ConfigError, WorkspaceError: As `make_server`.
    """
    server = make_server(work_dir, stages, port)
    with server:
        log.info("report: http://%s:%d/ - on this machine alone; Ctrl-C ends it", HOST, server.server_address[1])
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("report: ended")
    return 0
