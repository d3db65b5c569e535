import functools
import hashlib
import http.server
import threading

import pytest


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serves a folder on this machine; returns the folder, its address and the set of what was asked for."""
    folder, asked = tmp_path / "server", set()
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            if self.command == "GET":
                asked.add(self.path)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # torchvision hangs up on its first request, with which it only looks for redirections

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def md5():
    return lambda path: hashlib.md5(path.read_bytes()).hexdigest()
