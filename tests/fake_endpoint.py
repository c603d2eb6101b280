"""A server of this process that answers chat completions."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeEndpoint:
    """Answers with what `write` returns for a request's JSON; as a context, it runs."""

    def __init__(self, write):
        self.requests = []  # bodies, as they came
        self.keys = []  # values of the header Authorization
        self.failures = []  # statuses of the next requests
        self.finish_reason = "stop"
        self.message = "no"  # of a failure
        self.body = None  # the body of every reply; None: a chat completion
        self._write = write
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, key, body):
        """Returns the status and the body of a reply."""
        request = json.loads(body)
        with self._lock:
            self.requests.append(request)
            self.keys.append(key)
            failure = self.failures.pop(0) if self.failures else 0
        if path != "/v1/chat/completions":
            return 404, b"{}"
        if failure:
            return failure, json.dumps({"error": {"message": self.message}}).encode()
        if self.body is not None:
            return 200, self.body
        text = self._write(request)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        reply = {"id": "1", "object": "chat.completion", "model": "fake-1"}
        return 200, json.dumps(reply | {"choices": [choice]}).encode()

    def _handler(fake):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                key = self.headers["Authorization"]
                status, reply = fake.answer(self.path, key, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        return Handler
