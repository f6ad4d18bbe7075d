"""What a request may hold at most, and for how long."""

BODY = 50 * 10**6  # bytes
BODIES = 8 * BODY  # of all requests that are being answered
HEAD_SECONDS = 20.0  # until a request's head must be here whole; looked at so often, so that it may last twice as long
BODY_SECONDS = 60.0  # until a body must be here whole
LINGER_SECONDS = 0.2  # that a refused upload's connection stays open after the answer
PIXELS = 64 * 10**6
REASON = 1000  # characters
QUESTION = 4000  # characters of a chat's text
NEW_TOKENS = 512
DEFAULT_NEW_TOKENS = 256


def megabytes(count: int) -> str:
    return f"{count // 10**6} MB"
