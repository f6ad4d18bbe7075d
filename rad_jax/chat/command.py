"""What the commands that ask a model have in common: their flags, the client made of these, and the reckoning before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rad_jax.chat import access, client
from rad_jax.chat.cache import Cache
from rad_jax.chat.limits import Limits
from rad_jax.errors import UserError


def define_flags(max_tokens: int, max_failures: int = 20) -> None:
    """The flags, with defaults that suit the command."""
    from absl import flags

    flags.DEFINE_string("endpoint", client.LOCAL, "Address of the endpoint, up to and with /v1.")
    flags.DEFINE_string("model", None, "Model to ask, as the endpoint names it.", required=True)
    flags.DEFINE_string(
        "key_variable", None, "Environment variable that holds the endpoint's key; without it none is sent."
    )
    flags.DEFINE_string(
        "attested_by",
        None,
        "For restricted data and another machine: 'NAME, YYYY-MM-DD', who made sure that it may go there.",
    )
    flags.DEFINE_float("temperature", 0.0, "Of the sampling.", lower_bound=0.0)
    flags.DEFINE_float("top_p", 1.0, "Of the sampling.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("max_tokens", max_tokens, "Longest answer.", lower_bound=1)
    flags.DEFINE_string("cache", None, "Folder of the answers that are kept; default: beside --out.")
    flags.DEFINE_integer("concurrency", 8, "Requests under way at once.", lower_bound=1)
    flags.DEFINE_float("requests_per_minute", None, "Most requests a minute.", lower_bound=0.1)
    flags.DEFINE_float("tokens_per_minute", None, "Most tokens a minute.", lower_bound=1)
    flags.DEFINE_float("timeout_s", 120.0, "Seconds for one answer.", lower_bound=0.1)
    flags.DEFINE_integer("max_failures", max_failures, "Questions that may fail; one more ends the run.", lower_bound=0)
    flags.DEFINE_boolean("dry_run", False, "Count requests, tokens and cost, and send nothing.")
    flags.DEFINE_list("prices", ["0", "0"], "US dollars for a million tokens asked and a million answered.")
    flags.DEFINE_float("max_cost", None, "US dollars at which to stop.", lower_bound=0.0)


def client_of(options: Any, out: Path) -> client.Client:
    """The client of these flags; its cache lies in OUT.cache unless --cache says where. Raises UserError for flags that cannot be used."""
    key = None
    if options.key_variable:
        key = os.environ.get(options.key_variable, "").strip()
        if not key:
            raise UserError(f"--key_variable={options.key_variable}: this environment variable is not set.")
    return client.Client(
        client.Endpoint(options.endpoint, key, options.timeout_s),
        client.Model(options.model, options.temperature, options.top_p, options.max_tokens),
        cache=Cache(Path(options.cache or f"{out}.cache")),
        limits=Limits(options.requests_per_minute, options.tokens_per_minute),
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        prices=prices(options.prices),
        max_cost=options.max_cost,
    )


def prices(values: list[str]) -> tuple[float, float]:
    """Reads --prices. Raises UserError for what is no pair of prices."""
    try:
        asked, answered = (float(value) for value in values)
    except ValueError:
        raise UserError("--prices are two numbers: --prices=2.5,10") from None
    if min(asked, answered) < 0:
        raise UserError("--prices are not negative: --prices=2.5,10")
    return asked, answered


def check_access(options: Any, level: str) -> None:
    """Raises UserError when data of this level may not go to the endpoint."""
    access.check(options.endpoint, level, options.attested_by)


def dry_run(asked: client.Client, questions: Iterable[client.Question], options: Any, level: str) -> str:
    """What asking these questions would take, to be printed; sends nothing."""
    count = known = tokens = 0
    for question in questions:
        count += 1
        if asked.cached(question):
            known += 1
        else:
            tokens += client.tokens_of(question.messages)
    sent, most = count - known, (count - known) * asked.model.max_tokens
    rates = prices(options.prices)
    least, at_most = client.cost(tokens, 0, rates), client.cost(tokens, most, rates)
    lines = [
        f"{count} requests, {known} of them answered in the cache, {sent} to be sent to {options.endpoint}",
        f"about {tokens} tokens asked (four characters a token), at most {most} answered (--max_tokens each)",
        f"{least:.2f} US dollars for the questions, at most {at_most:.2f} in all"
        if any(rates)
        else "no cost: --prices are 0",
    ]
    minutes = [sent / options.requests_per_minute] if options.requests_per_minute else []
    minutes += [tokens / options.tokens_per_minute] if options.tokens_per_minute else []
    if minutes:
        lines.append(f"at least {max(minutes):.1f} minutes at the rate limits")
    lines.append(f"the data is {level}; tries that fail and answers that must be asked for again come on top")
    return "\n  ".join(lines)


def record(asked: client.Client, options: Any, level: str) -> dict[str, Any]:
    """What a run remembers of its questions, as plain JSON: for the file beside its output."""
    usage = asked.usage
    return {
        "model": asked.model.signature(),
        "refused_parameters": asked.refused,
        "endpoint": options.endpoint,
        "access": level,
        "attested_by": options.attested_by,
        "answered": usage.answered,
        "failed": dict(usage.failures),
        "from_cache": usage.from_cache,
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost_usd": round(asked.cost, 4),
    }
