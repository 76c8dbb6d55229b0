"""A server of files that cuts, stalls, lies and redirects, to test what downloads from it."""

import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Send = Callable[["Request"], None]


class Request:
    """One request: the file that is asked for, the first byte that is wanted, and ways to answer.

    Attributes:
        number: how many requests for this file have come before.
        start: the first byte that is wanted.
        encodings: what the client accepts.
    """

    def __init__(self, handler: BaseHTTPRequestHandler, server: "HostileServer", content: bytes, number: int):
        self._handler, self.server, self.content, self.number = handler, server, content, number
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        self.start = int(wanted[1]) if wanted else 0
        self.encodings = handler.headers.get("Accept-Encoding", "identity")

    def head(self, status: int, **headers: object) -> None:
        """Send status and headers; a header that is None is left out."""
        self._handler.send_response(status)
        for name, value in {"Content-Type": "application/zip", "Connection": "close", **headers}.items():
            if value is not None:
                self._handler.send_header(name, str(value))
        self._handler.end_headers()

    def send(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def head_of_rest(self, **headers: object) -> bytes:
        """The head of a right answer; the bytes that belong after it."""
        rest, size = self.content[self.start :], len(self.content)
        if self.start:
            headers = {"Content-Range": f"bytes {self.start}-{size - 1}/{size}", **headers}
        self.head(206 if self.start else 200, **{"Content-Length": len(rest), **headers})
        return rest

    def wait(self) -> None:
        """Send nothing until the server ends."""
        self.server.ended.wait(30)

    def reset(self) -> None:
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def whole(request: Request) -> None:
    request.send(request.head_of_rest())


def without_length(request: Request) -> None:
    request.send(request.head_of_rest(**{"Content-Length": None}))


def cut_half_way(request: Request) -> None:
    rest = request.head_of_rest()
    request.send(rest[: (len(rest) + 1) // 2])


def reset_half_way(request: Request) -> None:
    cut_half_way(request)
    request.reset()


def closed_at_once(request: Request) -> None:
    pass


def stalled(request: Request) -> None:
    rest = request.head_of_rest()
    request.send(rest[: max(len(rest) // 2, 1000)])
    request.wait()


def stalled_before_the_answer(request: Request) -> None:
    request.wait()


def dripping(request: Request) -> None:
    for byte in request.head_of_rest():
        request.send(bytes([byte]))
        if request.server.ended.wait(0.02):
            return


def without_parts(request: Request) -> None:
    request.head(200, **{"Content-Length": len(request.content)})
    request.send(request.content)


def without_parts_and_cut(request: Request) -> None:
    request.head(200, **{"Content-Length": len(request.content)})
    request.send(request.content[: len(request.content) // 2])


def another_part(request: Request) -> None:
    size = len(request.content)
    request.head(206, **{"Content-Length": size - 1, "Content-Range": f"bytes 1-{size - 1}/{size}"})
    request.send(request.content[1:])


def another_part_in_secret(request: Request) -> None:
    rest = request.head_of_rest()
    request.send(request.content[: len(rest)])


def part_of_a_larger_file(request: Request) -> None:
    size = len(request.content)
    request.head(206, **{"Content-Range": f"bytes {request.start}-{size - 1}/{size + 1}"})
    request.send(request.content[request.start :])


def part_of_nonsense(request: Request) -> None:
    request.head(206, **{"Content-Range": "bytes */many"})
    request.send(request.content[request.start :])


def wrong_bytes(request: Request) -> None:
    request.send(bytes(byte ^ 1 for byte in request.head_of_rest()))


def wrong_bytes_then_cut(request: Request) -> None:
    rest = request.head_of_rest()
    request.send(bytes((len(rest) + 1) // 2))


def announced_too_short(request: Request) -> None:
    rest = request.head_of_rest(**{"Content-Length": len(request.content) // 3})
    request.send(rest)


def announced_too_long(request: Request) -> None:
    request.send(request.head_of_rest(**{"Content-Length": 10**12}))


def announced_as_nonsense(request: Request) -> None:
    request.send(request.head_of_rest(**{"Content-Length": "many"}))


def _send_until_hung_up(request: Request, content: bytes) -> None:
    try:
        while not request.server.ended.is_set():
            request.send(content)
    except OSError:
        request.server.hung_up.set()


def endless(request: Request) -> None:
    """The file, and then zeros without end."""
    without_length(request)
    _send_until_hung_up(request, bytes(2**16))


def endless_zeros(request: Request) -> None:
    request.head(200)
    _send_until_hung_up(request, bytes(2**16))


def endless_head(request: Request) -> None:
    request.send(b"HTTP/1.1 200 OK\r\n")
    _send_until_hung_up(request, b"X: " + b"x" * 2**16 + b"\r\n")


def no_http(request: Request) -> None:
    request.send(b"SSH-2.0-OpenSSH_9.2\r\n" + request.content)


def html(request: Request) -> None:
    page = b"<html>Log in to this network</html>"
    request.head(200, **{"Content-Type": "text/html; charset=utf-8", "Content-Length": len(page)})
    request.send(page)


def html_of_unknown_length(request: Request) -> None:
    request.head(200, **{"Content-Type": "text/html"})
    request.send(b"<html>" + bytes(len(request.content)))


def compressed(request: Request) -> None:
    request.send(request.head_of_rest(**{"Content-Encoding": "gzip"}))


def compressed_if_it_may(request: Request) -> None:
    whole(request) if request.encodings == "identity" else compressed(request)


def status(code: int, **headers: object) -> Send:
    def send(request: Request) -> None:
        request.head(code, **{"Content-Length": 0, **headers})

    send.__name__ = f"status_{code}"
    return send


def redirected(address: str) -> Send:
    """To `address`, in which `{endpoint}` and `{path}` stand for this server and the path of the request."""

    def send(request: Request) -> None:
        location = address.format(endpoint=request.server.endpoint, path=request._handler.path)
        request.head(302, **{"Content-Length": 0, "Location": location})

    send.__name__ = f"redirected_to_{address}"
    return send


def busy_twice(request: Request) -> None:
    whole(request) if request.number > 1 else status(503)(request)


class HostileServer:
    """The server, which runs inside `with HostileServer() as server:`.

    Attributes:
        endpoint: its address.
        requests: path and first wanted byte of each request.
        ended: is set when the server ends.
        hung_up: is set when a client has left a stream that has no end.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.ended, self.hung_up = threading.Event(), threading.Event()
        self._files: dict[str, tuple[bytes, Send]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hostile": self}))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HostileServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def __exit__(self, *exception) -> None:
        self.ended.set()  # lets those go on that wait
        self._http.shutdown()
        self._http.server_close()

    def add(self, path: str, content: bytes, send: Send = whole) -> str:
        """Serve a file in one of the ways above; return its address."""
        self._files[path] = content, send
        return self.endpoint + path

    def starts(self, path: str) -> list[int]:
        """The first byte that each request for a file wanted."""
        return [start for asked, start in self.requests if asked == path]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        content, send = self._files[handler.path]
        request = Request(handler, self, content, len(self.starts(handler.path)))
        self.requests.append((handler.path, request.start))
        send(request)


class _Handler(BaseHTTPRequestHandler):
    hostile: HostileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        try:
            self.hostile.answer(self)
        except OSError:
            pass  # the client has left

    def log_message(self, *arguments) -> None:
        """Keep quiet."""
