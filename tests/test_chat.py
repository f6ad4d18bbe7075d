"""The chat client against a server on this machine that misbehaves in every way; limits against a clock of our own."""

import email.utils
import json
import os
import stat
import time

import pytest

from rad_jax.chat import access, http, schema, templates
from rad_jax.chat.cache import Cache, Reply
from rad_jax.chat.client import Client, Endpoint, Model, Question, UnusableError, retry_after, tokens_of, with_image
from rad_jax.chat.limits import Limits
from rad_jax.errors import UserError

MODEL = Model("m", max_tokens=50)
WORDS = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
    "additionalProperties": False,
}


def echo(body):
    return f"said {body['messages'][-1]['content']}"


def questions(count, check=str):
    return [Question(i, [{"role": "user", "content": f"text {i}"}], check) for i in range(count)]


def client(server, **options):
    endpoint = Endpoint(server.url, seconds=options.pop("seconds", 30.0), backoff=0.01, tries=options.pop("tries", 6))
    return Client(endpoint, options.pop("model", MODEL), **options)


def in_time(fault):
    """Seconds for an answer: few where the server is to be too slow, which it is by 1.5 seconds, else plenty."""
    return {"seconds": 0.5} if fault in ("slow", "drip") else {}


def ask(asked, wanted):
    return {question.id: answer for question, answer in asked.ask(wanted)}


def test_answers_belong_to_their_questions(chat_server):
    server = chat_server(echo)
    found = ask(client(server), questions(50))
    assert {i: answer.value for i, answer in found.items()} == {i: f"said text {i}" for i in range(50)}
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "top_p", "max_tokens"}
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "fault", ["error", "slow", "drip", "truncated", "disconnect", "garbage", "not_json", "no_http", "busy", "busy_ms"]
)
def test_a_fault_of_the_moment_is_tried_again(chat_server, fault):
    server = chat_server(echo)
    server.faults = {0: fault, 1: fault}
    asked = client(server, **in_time(fault))
    start = time.monotonic()
    assert ask(asked, questions(1))[0].value == "said text 0"
    assert asked.usage.requests >= 3 and not asked.usage.failures
    if fault.startswith("busy"):  # twice what the header asks for
        assert time.monotonic() - start >= {"busy": 0.4, "busy_ms": 0.3}[fault]


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("error", "server error 500 x", 3),
        ("slow", "no answer in time", 3),
        ("drip", "no answer in time", 3),
        ("truncated", "connection lost", 3),
        ("disconnect", "connection lost", 3),
        ("garbage", "unreadable answer", 3),
        ("busy_long", "server error 429 x", 1),
        ("filtered", "filtered", 1),
        ("azure_filtered", "filtered", 1),
        ("cut_off", "cut at the token limit", 1),
        ("refusal", "refused by the model", 1),
        ("empty", "empty answer", 1),
        ("bad_request", "request refused 400 context_length_exceeded", 1),
        ("too_large", "request refused 400 invalid_value", 1),
    ],
)
def test_a_failure_is_counted_with_its_reason(chat_server, fault, reason, requests):
    server = chat_server(echo)
    server.faults = dict.fromkeys(range(9), fault)
    asked = client(server, tries=3, **in_time(fault))
    answer = ask(asked, questions(1))[0]
    assert (answer.value, answer.reason) == (None, reason)
    assert dict(asked.usage.failures) == {reason: 1} and asked.usage.requests == requests


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("redirect", "sends the request elsewhere"),
        ("unauthorised", "refuses the key"),
        ("missing", "no such model"),
        ("quota", "quota is used up"),
    ],
)
def test_what_no_question_survives_stops_the_run_and_quotes_nothing(chat_server, fault, told):
    server = chat_server(echo)
    server.faults = dict.fromkeys(range(99), fault)
    with pytest.raises(UserError, match=told) as error:
        ask(client(server, concurrency=1), questions(20))
    assert "SECRET" not in str(error.value) and len(server.bodies) <= 2


def test_nobody_listens():
    asked = Client(Endpoint("http://127.0.0.1:9/v1"), MODEL)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: nothing listens there: start the server"):
        ask(asked, questions(3))


def test_failures_are_bounded(chat_server):
    server = chat_server(echo)
    server.faults = dict.fromkeys(range(0, 100, 2), "filtered")
    with pytest.raises(UserError, match="4 questions failed \\(4 filtered\\), more than --max_failures=3"):
        ask(client(server, max_failures=3, concurrency=2), questions(100))
    assert len(server.bodies) < 30


def test_answers_are_kept_and_not_asked_for_twice(chat_server, tmp_path):
    server = chat_server(echo)
    server.faults = {12: "unauthorised"}
    folder = tmp_path / "cache"
    with pytest.raises(UserError):
        ask(client(server, cache=Cache(folder), concurrency=1), questions(20))
    before = len(server.bodies)
    asked = client(server, cache=Cache(folder))
    assert all(answer.value == f"said text {i}" for i, answer in ask(asked, questions(20)).items())
    assert asked.usage.from_cache >= 12 and len(server.bodies) - before == 20 - asked.usage.from_cache
    elsewhere = chat_server(lambda body: "other")
    asked = client(elsewhere, cache=Cache(folder))
    assert len(ask(asked, questions(20))) == 20 and not elsewhere.bodies  # the endpoint is not in the key
    warmer = client(elsewhere, cache=Cache(folder), model=Model("m", temperature=1.0, max_tokens=50))
    assert ask(warmer, questions(1))[0].value == "other"  # the parameters are
    assert not asked.cached(Question(0, questions(1)[0].messages, str, sample=1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "answers.sqlite").stat().st_mode) == 0o600


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"no database at all, but long enough" * 99)
    with pytest.raises(UserError, match=r"answers.sqlite: damaged"):
        Cache(tmp_path)


def test_an_unusable_answer_is_asked_for_once_more(chat_server):
    replies = iter(["chatter", '```json\n{"word": "yes"}\n```'])
    server = chat_server(lambda body: next(replies))
    asked = client(server)
    found = ask(asked, [Question(0, [{"role": "user", "content": "q"}], lambda text: schema.read(text, WORDS), WORDS)])
    assert found[0].value == {"word": "yes"}
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == WORDS
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert "not JSON" in server.bodies[1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("reply", "reason", "detail"),
    [
        ("SECRET", "not JSON", "not JSON"),
        ("[" * 100_000, "not JSON", "not JSON"),
        ("[]", "not of the schema", "the answer must be object"),
        ("{}", "not of the schema", "the answer lacks word"),
        ('{"word": 1}', "not of the schema", "word must be string"),
        ('{"word": "a", "SECRET": 2}', "not of the schema", "the answer has more than word"),
    ],
)
def test_a_wrong_schema_is_a_failure(chat_server, reply, reason, detail):
    with pytest.raises(UnusableError) as error:
        schema.read(reply, WORDS)
    assert (error.value.reason, error.value.detail) == (reason, detail)
    server = chat_server(lambda body: reply)
    found = ask(
        client(server), [Question(0, [{"role": "user", "content": "q"}], lambda text: schema.read(text, WORDS))]
    )
    assert found[0].reason == reason and len(server.bodies) == 2


def test_thoughts_are_no_answer(chat_server):
    server = chat_server(lambda body: "<think>\nis it\n</think>\n\nyes")
    assert ask(client(server), questions(1))[0].value == "yes"


def test_numbers_of_a_schema():
    count = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0}, "of": {"type": "array", "items": {"enum": ["a", "b"]}}},
    }
    assert schema.read('{"n": 3, "of": ["a"]}', count) == {"n": 3, "of": ["a"]}
    for wrong in ('{"n": true}', '{"n": -1}', '{"n": 1.5}', '{"of": ["c"]}'):
        with pytest.raises(UnusableError):
            schema.read(wrong, count)


def test_parameters_that_a_model_refuses_are_left_out_once_and_for_all(chat_server):
    server = chat_server(echo)
    server.faults = {0: "no_temperature", 1: "new_limit", 2: "no_schema", 3: "no_top_p"}
    asked = client(server, concurrency=1)
    wanted = [Question(q.id, q.messages, str, WORDS) for q in questions(3)]
    assert all(answer.value for answer in ask(asked, wanted).values())
    assert asked.refused == ["max_tokens", "response_format", "temperature", "top_p"]
    assert len(server.bodies) == 7
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}


def test_the_key_goes_where_the_endpoint_wants_it(chat_server):
    server = chat_server(echo)
    for url, name, value in (
        (server.url, "authorization", "Bearer k"),
        (f"{server.url}?api-version=1", "api-key", "k"),
    ):
        list(Client(Endpoint(url, key="k"), MODEL).ask(questions(1)))
        assert server.headers[-1][name] == value


def test_the_cost_is_counted_and_ends_the_run(chat_server):
    server = chat_server(echo)
    asked = client(server, prices=(2.0, 10.0))
    ask(asked, questions(10))
    assert asked.cost == pytest.approx(10 * (10 * 2 + 5 * 10) / 1e6)
    with pytest.raises(UserError, match="--max_cost"):
        ask(client(server, prices=(2.0, 10.0), max_cost=0.0002, concurrency=1), questions(100))


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        return False


def test_requests_a_minute():
    clock = Clock()
    limits = Limits(requests=30, clock=clock, wait=clock.wait)
    times = []
    for _ in range(61):
        limits.take(1000)
        times.append(clock.now)
    assert times[-1] == pytest.approx(120)
    assert max(sum(start <= t < start + 60 for t in times) for start in times) <= 30


def test_tokens_a_minute():
    clock = Clock()
    limits = Limits(tokens=600, clock=clock, wait=clock.wait)
    for _ in range(7):
        limits.take(100)
    assert clock.now == pytest.approx(60)  # six hundred after the first, which is a debt
    limits.settle(100, 10)
    limits.take(100)
    assert clock.now == pytest.approx(60 + 10 - 9 + 0, abs=1.01)


def test_a_pause_holds_for_all():
    clock = Clock()
    limits = Limits(clock=clock, wait=clock.wait)
    limits.pause(7)
    limits.pause(3)
    limits.take(1)
    assert clock.now == pytest.approx(7)


def test_retry_after():
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after({"retry-after": "12"}) == 12.0
    assert retry_after({"retry-after": "9", "retry-after-ms": "1500"}) == 1.5
    assert retry_after({"retry-after": later}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:1/v1", True),
        ("http://[::1]:1/v1", True),
        ("https://api.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://192.168.0.7/v1", False),
        ("http://0.0.0.0/v1", False),
    ],
)
def test_restricted_data_stays_here(url, local):
    assert access.is_loopback(url) == local
    access.check(url, "public", None)
    for level in ("credentialed", "private", "unstated"):
        access.check(url, level, "A. Name, 2026-01-02")
        if local:
            access.check(url, level, None)
        else:
            with pytest.raises(UserError, match="is another machine"):
                access.check(url, level, None)


@pytest.mark.parametrize("text", ["", "yes", "2026-01-02", ", 2026-01-02", "A. Name, tomorrow", "A. Name, 9999-01-01"])
def test_no_attestation(text):
    with pytest.raises(UserError, match="attested_by"):
        access.check("https://api.example.org/v1", "private", text)


def test_restricted_files_are_their_owners_from_the_first_byte(tmp_path):
    """Whatever the umask is, and of a file that others could read before; what is public is as the umask says."""

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o022)
    try:
        for level, expected in (("public", 0o644), ("credentialed", 0o600), ("private", 0o600), ("unstated", 0o600)):
            assert mode(access.create(tmp_path / level, level)) == expected
        old = tmp_path / "old"
        old.write_text("text")
        assert mode(old) == 0o644
        made = access.create(old, "private")
        assert made == old and mode(old) == 0o600 and old.read_text() == ""
        made.write_text("more")
        assert mode(old) == 0o600
    finally:
        os.umask(before)


def test_the_strictest_level():
    assert access.strictest([]) == access.strictest(["public"]) == "public"
    assert access.strictest(["public", "credentialed"]) == "credentialed"
    assert access.strictest(["public", "unknown word"]) == "private"


def test_templates(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a comment\n### system\nBe brief.\n### user\nOne {{a}}, {{b}}, {{a}}.\n", encoding="utf-8")
    prompt = templates.load(file, {"a", "b"})
    assert prompt.fill({"a": "{{b}}", "b": r"\1"}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One {{b}}, \\1, {{b}}."},
    ]
    assert len(prompt.sha256) == 8
    for text in (
        "no turn",
        "### user\n{{a}}",
        "### user\n{{a}} {{b}} {{c}}",
        "### user\n{{a}} {{b}}\n### assistant\nx",
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="prompt"):
            templates.load(file, {"a", "b"})
    with pytest.raises(UserError, match="no prompt"):
        templates.load(tmp_path / "none.txt", set())


def test_images_are_sent_whole_and_estimated():
    message = with_image("What is there?", b"\x89PNG")
    assert message["content"][1]["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert tokens_of([message, {"role": "user", "content": "12345"}]) == 1000 + 4 + 2


def test_an_answer_that_never_ends_is_cut(chat_server, monkeypatch):
    monkeypatch.setattr(http, "MOST_BYTES", 1000)
    server = chat_server(lambda body: "x" * 2000)
    assert ask(client(server, tries=1), questions(1))[0].reason == "answer too long"


def test_cache_round_trip(tmp_path):
    cache = Cache(tmp_path)
    cache.put("k", Reply("Herzgröße \U0001f600\x00", 3, 4))
    cache.close()
    assert Cache(tmp_path).get("k") == Reply("Herzgröße \U0001f600\x00", 3, 4)
    assert json.dumps(Cache(tmp_path).get("other")) == "null"
