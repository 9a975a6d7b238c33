"""Passwords and keys in addresses, left out of everything that is shown or kept.

An address may carry them: ``http://user:PASSWORD@host``, ``s3://KEY:SECRET@bucket?session_token=…``. Whoever connects gets
the address as it was given; people, logs, files and MLflow get it redacted. :func:`isoflop.core.text.safe_text` redacts
whatever passes it, so that the errors of libraries, which quote addresses, are covered too.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

HIDDEN = "***"
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<rest>[^\s'\"<>`]+)")
_USER = re.compile(r"(?P<user>[^/@:?#]*)(?::(?P<password>[^/?#]*))?@")
_SLASHED = re.compile(r"(?P<user>[^/@:?#]*):(?P<password>[^?#]*)@")  # a password with a slash that nobody escaped
_PORT = re.compile(r"[^/@:?#]*:\d+(/|$)")
_OPTION = re.compile(r"(?P<lead>[?&;])(?P<name>[^=&;#\s]+)=(?P<value>[^&;#\s]*)")
_NAMES = re.compile(r"key|secret|token|passw|pwd|auth|sig|credential|account|sas$|code", re.IGNORECASE)
_KEYS = ("s3", "s3a", "s3n")  # both halves are keys there, and there is no port
_NAMES_ONLY = ("http", "https")  # a name alone before the @ is a token there


def redacted(text: str) -> str:
    """``text`` with the passwords and keys of every address in it replaced by ``***``.

    A user's name beside a password stays, so that people see whom an address means; so do options that name no secret.
    """
    return _ADDRESS.sub(_without, text) if "://" in text else text


def has_secret(address: str) -> bool:
    """Whether there is something to hide in an address."""
    return redacted(address) != address


def _without(found: re.Match[str]) -> str:
    scheme, rest = found["scheme"], found["rest"]
    user = _USER.match(rest)
    if user is None and (scheme.lower() in _KEYS or not _PORT.match(rest)):
        user = _SLASHED.match(rest)
    if user is not None:
        rest = _who(scheme, user) + rest[user.end() :]
    return f"{scheme}://{_OPTION.sub(_option, rest)}"


def _who(scheme: str, found: re.Match[str]) -> str:
    if found["password"] is not None:
        keys = scheme.lower() in _KEYS
        return f"{HIDDEN if keys else found['user']}:{HIDDEN}@" if found["password"] or keys else found[0]
    return f"{HIDDEN}@" if scheme.lower().rpartition("+")[2] in _NAMES_ONLY and found["user"] else found[0]


def _option(found: re.Match[str]) -> str:
    inner = unquote(found["value"])  # an address inside an address
    hidden = _NAMES.search(found["name"]) is not None or redacted(inner) != inner
    return f"{found['lead']}{found['name']}={HIDDEN}" if hidden and found["value"] else found[0]
