"""A local object store with the interface of S3, and proxies of it that fail for a while."""

import contextlib
import logging
import threading
from collections.abc import Iterator

import fsspec
import pytest

BUCKET = "bucket"


class Trouble:
    """Answers 500 to requests as long as `says` says so of their method and path."""

    def __init__(self, app):
        self.app, self.says, self.refused = app, lambda method, path: False, 0

    def __call__(self, environ, start):
        if self.says(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"out of order"]
        return self.app(environ, start)


class Store:
    """The store, what a client needs to know of it, and its troubles."""

    def __init__(self, address: str, trouble: Trouble):
        self.trouble = trouble
        self.environment = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
        self.files = fsspec.filesystem("s3", key="a", secret="b", endpoint_url=address, use_listings_cache=False)

    def names(self, folder: str) -> set[str]:
        found = self.files.find(f"{BUCKET}/{folder}")
        return {path.removeprefix(f"{BUCKET}/{folder}/") for path in found}


@contextlib.contextmanager
def object_store() -> Iterator[Store]:
    """Serve an empty bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.moto_server.werkzeug_app")
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    trouble = Trouble(server.DomainDispatcherApplication(server.create_backend_app))
    listening = make_server("127.0.0.1", 0, trouble, threaded=True)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        store = Store(f"http://127.0.0.1:{listening.port}", trouble)
        store.files.mkdir(BUCKET)
        yield store
    finally:
        listening.shutdown()
        thread.join()
