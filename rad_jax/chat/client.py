"""A client for chat endpoints of OpenAI's form (hosted ones, Azure, vLLM, SGLang, llama.cpp): many questions in, every answer or the reason why not.

Failures of the moment (429, 5xx, lost connections, nothing in time, garbage) are tried again, after what Retry-After says or a random wait that
grows; all tries pass the rate limits. An answer that cannot be used is asked for once more with what is wrong with it. What fails in the end is
counted by reason, and too many failures end the run; whatever was answered is in the cache. No reason and no error quotes a text.
"""

from __future__ import annotations

import base64
import email.utils
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from rad_jax.chat import http
from rad_jax.chat.cache import Cache, Reply, key_of
from rad_jax.chat.limits import Limits
from rad_jax.errors import UserError

Message = dict[str, Any]
LOCAL = "http://127.0.0.1:8000/v1"
IMAGE_TOKENS = 1000  # what an image is taken for where tokens are estimated; models differ widely
_CHARACTERS = 4  # of a token, where tokens are estimated
_MOST_WAIT = 300.0  # seconds that a server may ask for; beyond it the question fails
_CAP = 60.0  # seconds between two tries where the server asks for nothing
_REPAIRS = 1


class UnusableError(Exception):
    """An answer that cannot be used: why, as one of few phrases, and in detail for the model's second try (never for a log)."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail or reason


class _FailedError(Exception):
    """A question that gets no answer; the message is the reason."""


class _AgainError(Exception):
    """A try that failed and may be repeated, after `seconds` where the server said so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Model:
    """What is asked, and how it samples. All of it is in the key of the cache."""

    name: str
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024

    def signature(self) -> str:
        """For the signature of a number that comes of its answers."""
        return f"model:{self.name}|temperature:{self.temperature:g}|top_p:{self.top_p:g}|max_tokens:{self.max_tokens}"


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        id: whose it is, for the caller.
        messages: of the conversation.
        check: the answer's text -> what is wanted of it; raises UnusableError.
        schema: JSON schema that the server is asked to keep to, or None.
        sample: which of several answers to the same messages.
    """

    id: Any
    messages: Sequence[Message]
    check: Callable[[str], Any]
    schema: Mapping[str, Any] | None = None
    sample: int = 0


@dataclass(frozen=True)
class Answer:
    """What `check` made of an answer, or why there is none, with the last text that came."""

    value: Any = None
    reason: str = ""
    text: str = ""


@dataclass
class Usage:
    """What a run has cost so far. `failures` counts reasons."""

    answered: int = 0
    from_cache: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: up to and with "/v1"; of Azure, the deployment with its ?api-version=.
        key: sent as the endpoint's key, None for none.
        seconds: for one answer.
        tries: of one request in all.
        backoff: seconds before the second try, at most; doubled for each further one.
    """

    url: str = LOCAL
    key: str | None = None
    seconds: float = 120.0
    tries: int = 6
    backoff: float = 1.0

    def target(self) -> str:
        """Where requests go. Raises UserError for what is no address."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint={self.url} is no address: write one like {LOCAL}.")
        return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions", fragment=""))

    def headers(self) -> dict[str, str]:
        """Of every request."""
        own = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rad_jax"}
        if self.key is None:
            return own
        azure = "api-version=" in urlsplit(self.url).query
        return own | ({"api-key": self.key} if azure else {"Authorization": f"Bearer {self.key}"})


class Client:
    """Asks a model. Use one for a run: it counts, and remembers which parameters the model refuses.

    Args:
        endpoint, model, limits: see there.
        cache: of answers, None for none.
        concurrency: requests under way at once.
        max_failures: questions that may fail; one more ends the run.
        prices: US dollars for a million tokens asked and answered.
        max_cost: US dollars after which the run ends.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: Model,
        *,
        cache: Cache | None = None,
        limits: Limits | None = None,
        concurrency: int = 8,
        max_failures: int = 20,
        prices: tuple[float, float] = (0.0, 0.0),
        max_cost: float | None = None,
    ):
        self.endpoint, self.model, self.usage = endpoint, model, Usage()
        self._target, self._headers = endpoint.target(), endpoint.headers()
        self._cache, self._limits = cache, limits or Limits()
        self._concurrency, self._max_failures, self._prices, self._max_cost = (
            concurrency,
            max_failures,
            prices,
            max_cost,
        )
        self._lock = threading.Lock()
        self._dropped: set[str] = set()

    @property
    def refused(self) -> list[str]:
        """Parameters that the model did not take and that were left out, for the signature."""
        return sorted(self._dropped)

    @property
    def cost(self) -> float:
        """US dollars so far."""
        return cost(self.usage.prompt_tokens, self.usage.completion_tokens, self._prices)

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """All questions with their answers, as they come; questions are taken only a few ahead, and asked in threads.

        Raises:
            UserError: more questions failed than may, the endpoint is not there or refuses everything, or the cost is reached.
        """
        pool = ThreadPoolExecutor(self._concurrency)
        waiting: dict[Future[Answer], Question] = {}
        try:
            for question in questions:
                waiting[pool.submit(self._answer, question)] = question
                if len(waiting) >= 2 * self._concurrency:
                    yield from self._finished(waiting)
            while waiting:
                yield from self._finished(waiting)
        finally:
            self._limits.stopped.set()  # whoever waits to send gives up; nobody does when all is answered
            pool.shutdown(cancel_futures=True)
            self._limits.stopped.clear()

    def _finished(self, waiting: dict[Future[Answer], Question]) -> Iterator[tuple[Question, Answer]]:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            question, answer = waiting.pop(future), future.result()
            if answer.reason:
                self.usage.failures[answer.reason] += 1
                if self.usage.failures.total() > self._max_failures:
                    raise UserError(
                        f"{self.usage.failures.total()} questions failed ({describe(self.usage.failures)}), more than --max_failures="
                        f"{self._max_failures}: mend the cause and run the same command again, what was answered is kept."
                    )
            else:
                self.usage.answered += 1
            if self._max_cost is not None and self.cost > self._max_cost:
                raise UserError(
                    f"--max_cost={self._max_cost:g} is reached: what was answered is kept, raise it to go on."
                )
            yield question, answer

    def request(self, messages: Sequence[Message], question: Question) -> dict[str, Any]:
        """The body of a request with every parameter, as the cache knows it."""
        body: dict[str, Any] = {
            "model": self.model.name,
            "messages": list(messages),
            "temperature": self.model.temperature,
            "top_p": self.model.top_p,
            "max_tokens": self.model.max_tokens,
        }
        if question.schema is not None:
            form = {"name": "answer", "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def cached(self, question: Question) -> bool:
        """Whether the first request of a question is in the cache."""
        return (
            self._cache is not None
            and self._cache.get(self._key(self.request(question.messages, question), question)) is not None
        )

    def _key(self, body: Mapping[str, Any], question: Question) -> str:
        return key_of({**body, "sample": question.sample})

    def _answer(self, question: Question) -> Answer:
        messages, text, why = [*question.messages], "", UnusableError("")
        try:
            for _ in range(1 + _REPAIRS):
                text = self._reply(messages, question).text
                try:
                    return Answer(question.check(text), text=text)
                except UnusableError as error:
                    why = error
                complaint = f"This answer cannot be used: {why.detail}. Answer again, in the form asked for, and write nothing else."
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": complaint}]
        except _FailedError as error:
            return Answer(reason=str(error), text=text)
        return Answer(reason=why.reason, text=text)

    def _reply(self, messages: Sequence[Message], question: Question) -> Reply:
        """The answer to one request, from the cache or from the endpoint."""
        body = self.request(messages, question)
        key = self._key(body, question)
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            with self._lock:
                self.usage.from_cache += 1
            return known
        reason, estimate = "", tokens_of(messages)
        for attempt in range(self.endpoint.tries):
            try:
                reply = self._try(body, estimate + self.model.max_tokens)
            except _AgainError as error:
                reason = str(error)
                if error.seconds is None:
                    self._limits.sleep(random.uniform(0, min(_CAP, self.endpoint.backoff * 2**attempt)))
                elif error.seconds > _MOST_WAIT:
                    break
                else:
                    self._limits.pause(error.seconds)
                continue
            if self._cache is not None:
                self._cache.put(key, reply)
            return reply
        raise _FailedError(reason)

    def _try(self, body: Mapping[str, Any], reserved: float) -> Reply:
        """Sends a request once, and again without each parameter that the model refuses."""
        while True:
            self._limits.take(reserved)
            with self._lock:
                self.usage.requests += 1
                sent = _without(body, self._dropped)
            used = 0
            try:
                response = http.post(self._target, json.dumps(sent).encode(), self._headers, self.endpoint.seconds)
                refused = _refused_parameter(response, sent)
                if refused is None:
                    reply = read(response)
                    used = reply.prompt_tokens + reply.completion_tokens
                    with self._lock:
                        self.usage.prompt_tokens += reply.prompt_tokens
                        self.usage.completion_tokens += reply.completion_tokens
                    return reply
                with self._lock:
                    self._dropped.add(refused)
            except http.NoAnswerError as error:
                if error.absent and not self.usage.answered:
                    raise UserError(
                        f"{urlsplit(self._target).netloc}: {error}: start the server, or name another --endpoint."
                    ) from error
                raise _AgainError(str(error)) from error
            finally:
                self._limits.settle(reserved, used)


def _without(body: Mapping[str, Any], dropped: set[str]) -> dict[str, Any]:
    """A request without what the model refuses; the limit of its answer then goes by its newer name."""
    sent = {name: value for name, value in body.items() if name not in dropped}
    if "max_tokens" in dropped and "max_completion_tokens" not in dropped:
        sent["max_completion_tokens"] = body["max_tokens"]
    return sent


_OPTIONAL = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "response_format")


def _refused_parameter(response: http.Response, sent: Mapping[str, Any]) -> str | None:
    """The parameter of a request that a 400 or 422 complains of, where the request can do without it."""
    if response.status not in (400, 422):
        return None
    error = _error(response.body)
    message = str(error.get("message") or error.get("detail") or "").lower()
    if re.search(r"too (?:large|long)|context length|at most|reduce", message):  # of this request, not of the parameter
        return None
    known = [name for name in _OPTIONAL if name in sent]
    if error.get("param") in known:
        return str(error["param"])
    if not re.search(r"support|unrecogni[sz]ed|unknown|not permitted|extra|invalid", message):
        return None
    return next((name for name in known if re.search(rf"\b{name}\b", message)), None)


def read(response: http.Response) -> Reply:
    """The text of an answer.

    Raises:
        UserError: no question can be answered there: wrong key, no such model, quota used up, a redirect.
        _AgainError: the same request may do better later.
        _FailedError: it will not.
    """
    if response.status != 200:
        _raise_for(response)
    try:
        value = json.loads(response.body)
        choice = value["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, usage = message.get("content"), value.get("usage") or {}
        prompt, completion = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _AgainError("unreadable answer") from error
    if finish == "content_filter":
        raise _FailedError("filtered")
    if message.get("refusal"):
        raise _FailedError("refused by the model")
    if finish == "length":
        raise _FailedError("cut at the token limit")
    if finish != "stop":
        raise _FailedError("no finished text")
    if not isinstance(text, str) or not text.strip():
        raise _FailedError("empty answer")
    # What a reasoning model thinks aloud, where its server does not keep it apart.
    return Reply(re.sub(r"\A\s*<think>.*?</think>\s*", "", text, flags=re.DOTALL), prompt, completion)


def _raise_for(response: http.Response) -> None:
    status, error = response.status, _error(response.body)
    code = error.get("code") or error.get("type")
    # Only what looks like a code is passed on: a message may quote the report.
    code = code if isinstance(code, str) and re.fullmatch(r"[\w.-]{1,40}", code) else ""
    told = f"{status} {code}".strip()
    if code == "content_filter":
        raise _FailedError("filtered")
    if status in (401, 403):
        raise UserError(f"the endpoint refuses the key ({told}): name the variable that holds it with --key_variable.")
    if status == 404:
        raise UserError(f"the endpoint has no such model or address ({told}): check --model, and --endpoint up to /v1.")
    if status == 402 or code == "insufficient_quota":
        raise UserError(f"the endpoint's quota is used up ({told}): what was answered is kept.")
    if 300 <= status < 400:
        raise UserError(
            f"the endpoint sends the request elsewhere ({told}), which is not followed: name the address itself."
        )
    if status in (408, 409, 425, 429) or status >= 500:
        raise _AgainError(f"server error {told}", retry_after(response.headers))
    raise _FailedError(f"request refused {told}")


def _error(body: bytes) -> dict[str, Any]:
    """The error object of a body, empty where there is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    found = value.get("error", value) if isinstance(value, dict) else {}
    return found if isinstance(found, dict) else {"message": str(found)}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (retry-after-ms; Retry-After in seconds or as a date), None where it does not or not readably."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers["retry-after"]
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None


def tokens_of(messages: Sequence[Message]) -> int:
    """About how many tokens messages have: four characters make one, an image `IMAGE_TOKENS`."""
    total = 0
    for message in messages:
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            total += -(-len(part["text"]) // _CHARACTERS) if "text" in part else IMAGE_TOKENS
    return total


def with_image(text: str, png: bytes) -> Message:
    """A message of the user with an image, as vision models take it."""
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    return {
        "role": "user",
        "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}],
    }


def cost(prompt_tokens: float, completion_tokens: float, prices: tuple[float, float]) -> float:
    """US dollars, for prices of a million tokens."""
    return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6


def describe(failures: Mapping[str, int]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(failures).most_common())
