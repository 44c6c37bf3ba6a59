"""Object stores on the loopback: a Google Cloud Storage and an S3 server, each with one bucket.

    python -m tests.gqe_jax.buckets gs HOLD

A server prints the variables that lead a process's clients to it, as JSON, and serves until it is
killed. It runs in a process of its own, as the bytes of a store outlive its clients.
"""

import contextlib
import functools
import http
import json
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

BUCKET = "bucket"
REPOSITORY = pathlib.Path(__file__).parents[2]


class Hold:
    """A request for an object that is not answered, so that its client is killed in it.

    Args:
      path: a file by which the server and its user agree.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def arm(self, kind: str, name: str, skip: int = 0) -> None:
        """Holds a `write` or `read` of an object whose name contains `name`, after `skip` more."""
        self.path.write_text(json.dumps({"kind": kind, "name": name, "skip": skip}))

    def is_held(self) -> bool:
        """Whether a client waits for the answer."""
        return self.path.exists() and self.path.read_text() == "held"

    def release(self) -> None:
        """Drops the connection of that client."""
        self.path.unlink()

    def holds(self, kind: str, name: str) -> bool:
        """Whether this request is to be held; the server asks for one after another."""
        try:
            armed = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # not armed, or held already
            return False
        if kind != armed["kind"] or armed["name"] not in name:
            return False
        if armed["skip"]:
            self.arm(kind, armed["name"], armed["skip"] - 1)
            return False
        self.path.write_text("held")
        return True

    def wait(self) -> None:
        """Waits until the user releases the request."""
        while self.path.exists():
            time.sleep(0.01)


@contextlib.contextmanager
def serve(protocol: str, hold: pathlib.Path) -> Iterator[dict[str, str]]:
    """Starts a server for `gs` or `s3`; yields the environment of its clients.

    Args:
      protocol: of the URLs.
      hold: the file of `Hold`; for `gs` only.
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.gqe_jax.buckets", protocol, str(hold)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield json.loads(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


def serve_gcs(hold: Hold) -> tuple[ThreadingHTTPServer, dict[str, str]]:
    """Google Cloud Storage's JSON API, by gcp-storage-emulator.

    That package ignores conditions on the generation of an object, and the bounds of a listing.
    They are added here: the lock of a run directory, and TensorStore, rely on them.
    """
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    class ConditionFailed(Exception):
        pass

    class ConditionalStorage(Storage):
        """Checks the condition of the current request before it writes or deletes an object."""

        def __init__(self):
            super().__init__(use_memory_fs=True)
            self.lock = threading.Lock()
            self.condition: str | None = None
            self.uploads: dict[str, str | None] = {}
            self.bounds: tuple[str, str | None] = ("", None)

        def generation(self, bucket: str, name: str) -> str:
            """The generation of an object; 0 if there is none."""
            try:
                return self.get_file_obj(bucket, name)["generation"]
            except NotFound:
                return "0"

        def check(self, bucket: str, name: str, condition: str | None) -> None:
            if condition is not None and condition != self.generation(bucket, name):
                raise ConditionFailed(name)

        def perhaps_hold(self, kind: str, name: str) -> None:
            if hold.holds(kind, name):
                self.lock.release()  # others are served meanwhile
                hold.wait()
                self.lock.acquire()
                raise ConnectionAbortedError(name)

        def get_file(self, bucket_name, file_name, show_error=True):
            if bucket_name == BUCKET:
                self.perhaps_hold("read", file_name)
            return super().get_file(bucket_name, file_name, show_error)

        def create_resumable_upload(self, bucket_name, file_name, file_obj):
            upload = super().create_resumable_upload(bucket_name, file_name, file_obj)
            self.uploads[upload] = self.condition
            return upload

        def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
            condition = self.uploads.pop(file_id) if file_id else self.condition
            self.check(bucket_name, file_name, condition)
            self.perhaps_hold("write", file_name)
            super().create_file(bucket_name, file_name, content, file_obj, file_id)

        def delete_file(self, bucket_name, file_name):
            self.check(bucket_name, file_name, self.condition)
            super().delete_file(bucket_name, file_name)

        def _list_live_candidates(self, bucket_name, prefix=None):
            first, end = self.bounds
            found = super()._list_live_candidates(bucket_name, prefix)
            return [each for each in found if first <= each[0] and not (end and end <= each[0])]

    class Handler(RequestHandler):
        """Serves one request at a time, under its condition."""

        generation: str | None = None

        def _under_condition(self, serve) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = urllib.parse.parse_qs(url.query)
            with self.storage.lock:
                self.storage.condition = query.get("ifGenerationMatch", [None])[0]
                first, end = query.get("startOffset", [""]), query.get("endOffset", [None])
                self.storage.bounds = first[0], end[0]
                named = re.search(r"/b/([^/]+)/o/([^/]+)$", url.path)
                if self.command == "GET" and named:
                    name = urllib.parse.unquote(named[2])
                    self.generation = self.storage.generation(named[1], name)
                    if self.storage.condition not in (None, self.generation):
                        return self._end(http.HTTPStatus.PRECONDITION_FAILED)
                    if query.get("ifGenerationNotMatch", [None])[0] == self.generation:
                        return self._end(http.HTTPStatus.NOT_MODIFIED)
                try:
                    serve()
                except ConditionFailed:
                    self._end(http.HTTPStatus.PRECONDITION_FAILED)

        def _end(self, status: http.HTTPStatus) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def end_headers(self) -> None:
            if self.generation not in (None, "0"):
                self.send_header("x-goog-generation", self.generation)
            super().end_headers()

        def do_GET(self) -> None:
            self._under_condition(super().do_GET)

        def do_POST(self) -> None:
            self._under_condition(super().do_POST)

        def do_PUT(self) -> None:
            self._under_condition(super().do_PUT)

        def do_DELETE(self) -> None:
            self._under_condition(super().do_DELETE)

    class QuietServer(ThreadingHTTPServer):
        def handle_error(self, *_) -> None:
            """Says nothing of clients that are gone."""

    storage = ConditionalStorage()
    create_bucket(BUCKET, storage)
    server = QuietServer(("localhost", 0), functools.partial(Handler, storage))
    url = f"http://localhost:{server.server_port}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google.cloud.storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore's
        "GOOGLE_CLOUD_PROJECT": "project",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
    }
    return server, variables


def serve_s3(_: Hold) -> tuple[ThreadingHTTPServer, dict[str, str]]:
    """S3's API, by moto."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        def log_request(self, *_) -> None:
            """Logs nothing."""

    server = make_server(
        "localhost",
        0,
        DomainDispatcherApplication(create_backend_app),
        threaded=True,
        request_handler=Handler,
    )
    variables = {
        "AWS_ENDPOINT_URL": f"http://localhost:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return server, variables


def main() -> None:
    """The command line."""
    server, variables = {"gs": serve_gcs, "s3": serve_s3}[sys.argv[1]](Hold(sys.argv[2]))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    if sys.argv[1] == "s3":
        url = f"{variables['AWS_ENDPOINT_URL']}/{BUCKET}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
    print(json.dumps(variables), flush=True)
    thread.join()


if __name__ == "__main__":
    main()
