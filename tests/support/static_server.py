"""A static HTTPS server with Range and client certificates, which can cut and damage what it sends.

As a program: `python -m tests.support.static_server FOLDER HOST PORT CERTIFICATE KEY CA`.
"""

import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_PIECE = 16 << 10


@dataclass
class Faults:
    """What the server does wrong.

    Attributes:
        cut_after: Bytes after which it ends each answer.
        damage: It flips bits.
        ranges: It knows Range.
        status: It answers with nothing else.
        drip: It sends each byte in a TLS record of its own, so that a client receives one at a time.
        endless: It sends interim answers, and never the final one.
    """

    cut_after: int | None = None
    damage: bool = False
    ranges: bool = True
    status: int | None = None
    drip: bool = False
    endless: bool = False


@dataclass
class StaticServer:
    """The server; `requests` are the paths that it was asked for, and the first byte of each."""

    folder: Path
    url: str
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, int]] = field(default_factory=list)

    def begins(self, kind: str) -> list[int]:
        """Return the first bytes of the requests for targets of a kind, `models` or `wheels`."""
        return [begin for path, begin in self.requests if path.startswith(f"/targets/{kind}/")]


def _handler(server: StaticServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def do_GET(self) -> None:
            faults = server.faults
            span = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-") if faults.ranges else ""
            begin = int(span or 0)
            server.requests.append((self.path, begin))
            while faults.endless:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            file = (server.folder / self.path.lstrip("/")).resolve()
            if faults.status is not None or not file.is_relative_to(server.folder) or not file.is_file():
                self.send_error(faults.status or 404)
                return
            size = file.stat().st_size
            self.send_response(206 if span else 200)
            self.send_header("Content-Length", str(size - begin))
            if span:
                self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
            self.end_headers()
            cut = faults.cut_after if "/targets/" in self.path else None
            left = size - begin if cut is None else cut
            with file.open("rb") as source:
                source.seek(begin)
                while left > 0 and (piece := source.read(min(1 if faults.drip else _PIECE, left))):
                    if faults.damage and "/targets/" in self.path:
                        piece = bytes(byte ^ 1 for byte in piece)
                    self.wfile.write(piece)
                    left -= len(piece)
            # A whole answer leaves the connection open: the client may have sent its next request.
            self.close_connection = self.close_connection or (cut is not None and left == 0)

    return Handler


def _listen(server: StaticServer, host: str, port: int, certificate: Path, key: Path, ca: Path) -> ThreadingHTTPServer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: Any, client_address: Any) -> None:  # the handshake on the request's thread
            with context.wrap_socket(request, server_side=True) as stream:
                super().finish_request(stream, client_address)

        def handle_error(self, *_: Any) -> None:
            return  # of connections that were cut

    return Server((host, port), _handler(server))


@contextmanager
def static_server(folder: Path, *, certificate: Path, key: Path, ca: Path) -> Iterator[StaticServer]:
    server = StaticServer(folder.resolve(), "")
    listening = _listen(server, "127.0.0.1", 0, certificate, key, ca)
    server.url = f"https://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


if __name__ == "__main__":
    _folder, _host, _port, _certificate, _key, _ca = sys.argv[1:]
    _served = StaticServer(Path(_folder).resolve(), "")
    _listening = _listen(_served, _host, int(_port), Path(_certificate), Path(_key), Path(_ca))
    print("ready", flush=True)
    _listening.serve_forever()
