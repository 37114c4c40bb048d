"""Vectors of a server elsewhere: ``RemoteEncoder`` against a double that has real ones' faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine.embeddings.kept import TemporaryVectors
from engine.embeddings.remote import RemoteEncoder
from engine.embeddings.served import with_served
from engine.errors import AuthError, ConfigError, UnavailableError
from engine.secrets import Secret
from engine.settings import RunConfig
from tests.engine.embedding_host import EmbeddingHost, count, cut, status, vector_of

pytestmark = [pytest.mark.slow, pytest.mark.anyio]
TEXTS = [f"the {word} text of {n} words" for n, word in enumerate("one two three four".split())]
MANY = [f"text number {n} about {n * 7 % 31} things" for n in range(150)]


@pytest.fixture
def host() -> Iterator[EmbeddingHost]:
    with EmbeddingHost() as host:
        yield host


@pytest.fixture
def encoder_of() -> Iterator[Callable[..., RemoteEncoder]]:
    """Makes encoders, which end with the test."""
    made: list[RemoteEncoder] = []

    def make(
        host: EmbeddingHost, kept: Any = None, key: str | None = None, **settings: Any
    ) -> RemoteEncoder:
        given = {"semantic_url": host.url, "semantic_model": "words", "semantic_dimension": 64}
        config = RunConfig.model_validate(given | settings)
        notes: list[str] = []
        secret = None if key is None else Secret(key)
        made.append(RemoteEncoder(config, secret, kept or TemporaryVectors(), notes.append))
        made[-1].notes = notes  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for encoder in made:
        encoder.close()


Make = Callable[..., RemoteEncoder]


def assert_right(vectors: np.ndarray[Any, Any], texts: list[str]) -> None:
    """Each is the vector of its text, of unit length."""
    expected = np.array([vector_of(text) for text in texts])
    assert vectors.shape == expected.shape
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert ((vectors * expected).sum(axis=1) > 0.999).all()


def test_vectors_come_in_the_order_of_the_texts(host: EmbeddingHost, encoder_of: Make) -> None:
    """Although items are shuffled, and in batches of 32 at most."""
    assert_right(encoder_of(host).encode(MANY), MANY)
    assert max(len(body["input"]) for body in host.requests) == 32


def test_a_text_has_one_vector(host: EmbeddingHost, encoder_of: Make) -> None:
    """The server's move; what is kept does not, and is not asked for again."""
    encoder = encoder_of(host)
    first = encoder.encode(TEXTS)
    assert (encoder.encode(TEXTS[::-1])[::-1] == first).all()
    assert (encoder.encode([TEXTS[2]])[0] == first[2]).all()
    assert {host.asked[text] for text in TEXTS} == {1}


def test_what_was_foreseen_is_asked_once(host: EmbeddingHost, encoder_of: Make) -> None:
    encoder = encoder_of(host)
    encoder.foresee(MANY)
    encoder.foresee(MANY[:10])
    assert_right(encoder.encode(MANY[100:]), MANY[100:])
    assert_right(encoder.encode(MANY), MANY)
    assert {host.asked[text] for text in MANY} == {1}


def test_no_texts_have_no_vectors(host: EmbeddingHost, encoder_of: Make) -> None:
    assert encoder_of(host).encode([]).shape == (0, 64)
    assert not host.requests


@pytest.mark.parametrize(
    "troubles",
    [
        [status(429, Retry_After="0.1")] * 2,
        [status(429)] * 2,
        [status(503)] * 2,
        [status(500)] * 2,
        [cut, cut],
        [count],
    ],
    ids=["429 that says when", "429", "503", "500", "cut", "count"],
)
def test_what_passes_is_waited_for(
    host: EmbeddingHost, encoder_of: Make, troubles: list[Any]
) -> None:
    """All vectors are right, and nobody is told of a fault."""
    host.troubles = [None, *troubles]
    encoder = encoder_of(host)
    assert_right(encoder.encode(MANY), MANY)
    assert not encoder.notes  # type: ignore[attr-defined]


def test_base64_is_read_although_not_asked_for(host: EmbeddingHost, encoder_of: Make) -> None:
    host.as_base64 = True
    assert_right(encoder_of(host).encode(TEXTS), TEXTS)
    assert host.requests[0]["encoding_format"] == "float"


def no_indices(body: dict[str, Any]) -> dict[str, Any]:
    items = sorted(body["data"], key=lambda item: item["index"])
    return {"data": [{"embedding": item["embedding"]} for item in items]}


def test_a_host_without_indices_keeps_the_order(host: EmbeddingHost, encoder_of: Make) -> None:
    host.shape = no_indices
    assert_right(encoder_of(host).encode(TEXTS), TEXTS)


def same_index(body: dict[str, Any]) -> dict[str, Any]:
    return {"data": [item | {"index": 0} for item in body["data"]]}


def test_indices_that_say_nothing_are_asked_one_by_one(
    host: EmbeddingHost, encoder_of: Make
) -> None:
    """Which vector is whose is never guessed."""
    host.shape = same_index
    assert_right(encoder_of(host).encode(TEXTS), TEXTS)


@pytest.mark.parametrize("text", ["POISON pill", "ZERO", "NAN"])
def test_one_text_that_cannot_be_embedded_spoils_no_other(
    host: EmbeddingHost, encoder_of: Make, text: str
) -> None:
    """It has a vector of zeros, and the person is told once."""

    def shape(body: dict[str, Any]) -> Any:
        last = host.requests[-1]["input"]
        if text in last:
            bad = [0.0] * 64 if text == "ZERO" else [None] * 64
            items = [
                item | ({"embedding": bad} if last[item["index"]] == text else {})
                for item in body["data"]
            ]
            return body | {"data": items}
        return body

    host.shape = shape
    encoder = encoder_of(host)
    texts = [*TEXTS[:2], text, *TEXTS[2:]]
    vectors = encoder.encode(texts)
    assert not vectors[2].any()
    assert_right(vectors[[0, 1, 3, 4]], TEXTS)
    (note,) = encoder.notes  # type: ignore[attr-defined]
    assert "embed_invalid" in note
    host.requests.clear()
    assert not encoder.encode([text]).any()
    assert not host.requests


def test_an_outage_is_no_texts_fault(host: EmbeddingHost, encoder_of: Make) -> None:
    """Faults for every request, for longer than one text is tried: it is waited out."""
    host.troubles = [None] + [status(500)] * 9
    encoder = encoder_of(host)
    assert_right(encoder.encode(TEXTS), TEXTS)
    assert not encoder.notes  # type: ignore[attr-defined]


def test_an_outage_without_end(host: EmbeddingHost, encoder_of: Make) -> None:
    host.always = status(503)
    with pytest.raises(UnavailableError, match="embeddings: no endpoint has answered for 1 s"):
        encoder_of(host, max_outage_s=1.0).encode(TEXTS)


def test_refusals_without_end(host: EmbeddingHost, encoder_of: Make) -> None:
    host.always = status(400, "strange words")
    with pytest.raises(ConfigError, match=r"strange words.*--semantic-model"):
        encoder_of(host, max_outage_s=1.0).encode(TEXTS)


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_texts_beyond_the_context_are_cut(encoder_of: Make, owner: str) -> None:
    """By vLLM itself, elsewhere here; only those that are too long."""
    with EmbeddingHost(owner=owner) as host:
        host.context = 20
        long = "word " * 100
        encoder = encoder_of(host)
        vectors = encoder.encode([*TEXTS, long])
        assert_right(vectors[:4], TEXTS)
        assert_right(vectors[4:], ["word"])
        notes = encoder.notes  # type: ignore[attr-defined]
        assert len(notes) == (owner != "vllm")
        assert all("are cut" in note for note in notes)


def test_a_host_that_takes_fewer_texts_at_once(host: EmbeddingHost, encoder_of: Make) -> None:
    """It is asked for as many as it takes from then on."""

    def ten_at_most(handler: Any, body: dict[str, Any]) -> bool:
        if len(body["input"]) <= 10:
            return False
        message = "batch size is invalid, it should not be larger than 10.: input.contents"
        handler.reply({"error": {"message": message}}, 400)
        return True

    host.always = ten_at_most
    encoder = encoder_of(host)
    assert_right(encoder.encode(MANY[:64]), MANY[:64])
    host.requests.clear()
    assert_right(encoder.encode(MANY[64:]), MANY[64:])
    assert max(len(body["input"]) for body in host.requests) == 8


def test_another_dimension_is_told(host: EmbeddingHost, encoder_of: Make) -> None:
    """At the first contact of a session, and in the middle of one."""
    encoder = encoder_of(host)
    encoder.encode(TEXTS[:1])
    host.dimension = 32
    with pytest.raises(ConfigError, match="vectors of 32 numbers, and gave 64 before"):
        encoder.encode(TEXTS)
    with pytest.raises(ConfigError, match="vectors of 32 numbers, and gave 64 before"):
        encoder_of(host).encode(TEXTS)


def test_another_model_behind_the_name_is_told(host: EmbeddingHost, encoder_of: Make) -> None:
    kept = TemporaryVectors()
    encoder_of(host, kept).encode(TEXTS[:1])
    encoder_of(host, kept).encode(TEXTS[:2])
    host.turned = True
    assert encoder_of(host, kept).encode(TEXTS[:2]).any()  # which asks nothing
    with pytest.raises(ConfigError, match="another model as words than before"):
        encoder_of(host, kept).encode(TEXTS)


def test_the_key_goes_with_each_request_and_into_no_message(
    host: EmbeddingHost, encoder_of: Make
) -> None:
    host.key = "sk-canary-0123456789"
    assert_right(encoder_of(host, key=host.key).encode(TEXTS), TEXTS)
    assert host.keys == {f"Bearer {host.key}"}
    with pytest.raises(AuthError, match="--semantic-key-env") as told:
        encoder_of(host).encode(TEXTS)
    assert host.key not in str(told.value)


async def test_the_one_model_that_is_served_is_found(host: EmbeddingHost) -> None:
    config = await with_served(RunConfig(semantic_url=f"{host.url}/embeddings"))
    assert (config.semantic_model, config.semantic_dimension) == ("words", 64)


async def test_of_several_models_one_must_be_named() -> None:
    with EmbeddingHost("words", "letters") as host:
        with pytest.raises(ConfigError, match="words, letters; choose one with --semantic-model"):
            await with_served(RunConfig(semantic_url=host.url))
        config = await with_served(RunConfig(semantic_url=host.url, semantic_model="letters"))
    assert config.semantic_model == "letters"


async def test_a_server_that_does_not_embed(host: EmbeddingHost) -> None:
    host.always = status(404, "Not Found")
    with pytest.raises(ConfigError, match="does it serve embeddings"):
        await with_served(RunConfig(semantic_url=host.url))


async def test_a_server_that_is_not_there() -> None:
    with pytest.raises(UnavailableError, match=r"embeddings: http://127\.0\.0\.1:9"):
        await with_served(RunConfig(semantic_url="http://127.0.0.1:9/v1"))


async def test_a_server_that_comes_up(host: EmbeddingHost) -> None:
    """Is waited for, and the person told so once."""
    host.loading = 4
    notes: list[str] = []
    config = await with_served(RunConfig(semantic_url=host.url, wait_for_server_s=60), notes.append)
    assert config.semantic_dimension == 64
    (note,) = notes
    assert note.endswith("(--wait-for-server)")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@host/v1", "credentials"),
        ("http://host/v1?api_key=abc", "api_key in a query"),
        ("host:8000", "needs http"),
    ],
)
async def test_a_url_that_must_not_be(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--semantic-url: .*{words}") as told:
        await with_served(RunConfig(semantic_url=url))
    assert "secret" not in str(told.value)
