"""Secrets among the options of a reward, kept out of messages: those end in terminals and logs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 4  # characters; hiding shorter values would only garble the message

_NAME = re.compile(r"token(?!iz)|key|passw|passphrase|secret|credential|bearer|auth(?!or)", re.IGNORECASE)
_PLACE = re.compile(r"(file|path|variable|env)$", re.IGNORECASE)  # says where the secret is, and is none
_LOGIN = re.compile(r"""(?<=://)[^\s/'"@]+@|[^\s/'"@:]+:[^\s/'"@]+@""")  # of a URL


def is_secret(name: str) -> bool:
    """Whether an option of this name holds a secret, by its name."""
    return bool(_NAME.search(name)) and not _PLACE.search(name)


def redacted(options: Any) -> Any:
    """The same options, for a message: ``***`` for secrets, also for those deeper down and in URLs."""
    if isinstance(options, Mapping):
        return {
            key: HIDDEN if is_secret(str(key)) and value is not None else redacted(value)
            for key, value in options.items()
        }
    if isinstance(options, (list, tuple)):
        return [redacted(value) for value in options]
    return _LOGIN.sub(f"{HIDDEN}@", options) if isinstance(options, str) else options


def hide(text: str, options: Mapping[str, Any]) -> str:
    """The text of an error without the secrets that are among the options."""
    for secret in sorted(set(_secrets(options, False)), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _LOGIN.sub(f"{HIDDEN}@", text)


def _secrets(value: Any, secret: bool) -> Iterator[str]:
    """Every secret, in the forms in which an error may quote it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secrets(inner, secret or is_secret(str(key)))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets(inner, secret)
    elif secret and value is not None:
        said = str(value)
        yield from (form for form in (said, repr(said)[1:-1], " ".join(said.split())) if len(form) >= SHORTEST)
