"""A tokenizer, an engine that writes what a test says, and a server of the API over them."""

import pytest

from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.sampling import Sampling
from rlhfjax.serve.app import OPEN_PATHS, Api
from rlhfjax.serve.served import Served
from rlhfjax.web.guard import guarded
from rlhfjax.web.server import Server
from tests.serve.fake_engine import FakeEngine

TEXTS = ['{"name": "the cat", "tall": true}', "a dog ran under it", "12, 345"] * 40


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A tokenizer with our chat template."""
    return train_sentencepiece(
        TEXTS, tmp_path_factory.mktemp("tokenizer"), vocab_size=314
    )


@pytest.fixture
def served(words):
    """served(text="…", **options of FakeEngine) -> a model that writes a text and ends its turn."""

    def make(
        text="the cat ran", *, name="tiny", sampling=None, most_tokens=None, **options
    ):
        def write(request):
            ids = text(request) if callable(text) else text
            ids = words.encode(ids) if isinstance(ids, str) else ids
            return [*ids, words.eos_id]

        defaults = {
            "max_new_tokens": 16,
            "eos_id": words.eos_id,
            "pad_id": words.pad_id,
        }
        sampling = Sampling(**{**defaults, **(sampling or {})})
        engine = FakeEngine(write, vocab_size=words.vocab_size, **options)
        return Served(name, engine, words, sampling, most_tokens)

    return make


@pytest.fixture
def serve():
    """serve(models, token="", **options of Api) -> the URL of a server that runs."""
    servers = []

    def start(*models, token="", **options):
        api = Api(models, **options)
        app = guarded(api.app(), host="127.0.0.1", token=token, open_paths=OPEN_PATHS)
        servers.append(Server(app, "127.0.0.1", 0, grace=1))
        servers[-1].start()
        return servers[-1].url

    yield start
    for server in servers:
        server.stop()
