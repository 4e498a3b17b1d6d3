"""What a source of an adapter may look like: text in, a checked value out. Nothing is looked up or opened here.

    /srv/adapters/legal                                 a directory
    hf://owner/repo[@revision][/folder]                 a repository of a Hugging Face hub
    s3://bucket/folder, gs://bucket/folder              an object store
    https://host/folder/                                a web server that has the files below this address

Each may end with `#digest=…`, our own digest of the adapter: nothing else is accepted from there then.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal, get_args
from urllib.parse import SplitResult, quote, unquote, urlsplit

import msgspec

from serverlesslora.errors import AdapterInvalid

SourceKind = Literal["local", "hf", "s3", "gs", "https"]
KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
MAX_CHARACTERS = 4096

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PIN = re.compile(r"#digest=([0-9a-fA-F]{64})$")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# What inet_aton takes for an IPv4 address: "127.1", "0x7f000001", "017700000001", "2130706433".
_NUMERIC_HOST = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+))*")


class LocalSource(msgspec.Struct, frozen=True):
    path: str
    digest: str | None = None
    kind: SourceKind = "local"


class HubSource(msgspec.Struct, frozen=True):
    repo: str  # owner/name
    revision: str | None = None
    folder: str = ""
    digest: str | None = None
    kind: SourceKind = "hf"


class BucketSource(msgspec.Struct, frozen=True):
    kind: SourceKind
    bucket: str
    folder: str
    digest: str | None = None


class WebSource(msgspec.Struct, frozen=True):
    """`url` ends with a slash; `query`, often a signature, goes with every file's name."""

    url: str
    query: str = ""
    digest: str | None = None
    kind: SourceKind = "https"

    def address_of(self, name: str) -> str:
        return f"{self.url}{name}" + (f"?{self.query}" if self.query else "")


Source = LocalSource | HubSource | BucketSource | WebSource


def parse_source(text: str) -> Source:
    """Raises AdapterInvalid, which names what is wrong and never repeats a secret."""
    if "\0" in text:
        raise _bad("the adapter path contains a NUL byte")
    pinned = _PIN.search(text)
    digest = pinned[1].lower() if pinned else None
    plain = text[: pinned.start()] if pinned else text
    scheme = _SCHEME.match(plain)
    if scheme is None:
        return LocalSource(plain, digest)
    if len(text) > MAX_CHARACTERS:
        raise _bad(f"a source has at most {MAX_CHARACTERS} characters, not {len(text)}")
    rest = plain[scheme.end() :]
    match scheme[1].lower():
        case "hf":
            return _hub(rest, digest)
        case "s3" | "gs" as kind:
            return _bucket(kind, rest, digest)
        case "https" | "http":
            return _web(plain, digest)
        case other:
            raise _bad(
                f"{other[:32]}:// is no source of adapters; known are a directory, hf://, s3://, gs://, https://"
            )


def shown(text: str) -> str:
    """A source as it may be logged and answered: without query, user or password."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        return text
    base, question, rest = text.partition("?")
    pinned = _PIN.search(rest)
    authority, slash, path = base[scheme.end() :].partition("/")
    authority = authority.rpartition("@")[2] if scheme[1].lower() in ("http", "https") else authority
    return f"{scheme[0]}{authority}{slash}{path}{'?…' if question else ''}{pinned[0] if pinned else ''}"


def split_url(url: str) -> SplitResult:
    """An http(s) address that means one thing only. Raises AdapterInvalid."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise _bad("an address holds only printable ASCII characters, without spaces and backslashes")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise _bad(f"that is no address: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise _bad(f"an address begins with https://, not {parts.scheme[:32]}://")
    if "@" in parts.netloc:
        raise _bad("an address must not hold a user name or password")
    if not host or not _is_host(host):
        raise _bad(f"{(host or '')[:64]!r} is no host name")
    return parts


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return "%" not in host
    except ValueError:
        # An address in another spelling is nobody's host name.
        return bool(_HOST.fullmatch(host)) and not _NUMERIC_HOST.fullmatch(host)


def _hub(rest: str, digest: str | None) -> HubSource:
    owner, _, rest = rest.partition("/")
    name_and_revision, _, folder = rest.partition("/")
    name, at, revision = name_and_revision.partition("@")
    revision = unquote(revision)
    if not _REPO.fullmatch(owner) or not _REPO.fullmatch(name):
        raise _bad("a hub source is hf://OWNER/REPO[@REVISION][/FOLDER]")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise _bad(f"{revision[:64]!r} is no revision; a slash in it is written %2F")
    return HubSource(f"{owner}/{name}", revision or None, _folder(folder), digest)


def _bucket(kind: Literal["s3", "gs"], rest: str, digest: str | None) -> BucketSource:
    bucket, _, folder = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise _bad(f"a source in a bucket is {kind}://BUCKET/FOLDER")
    return BucketSource(kind, bucket, _folder(folder), digest)


def _web(url: str, digest: str | None) -> WebSource:
    parts = split_url(url)
    if parts.fragment or "#" in url:
        raise _bad("after # an address may only have digest= and 64 hexadecimal digits")
    if parts.path.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip", ".safetensors", ".json")):
        raise _bad("the address must be that of a directory which holds the adapter's files, unpacked")
    folder = _folder(unquote(parts.path))
    path = f"/{quote(folder)}/" if folder else "/"
    return WebSource(f"{parts.scheme}://{parts.netloc}{path}", parts.query, digest)


def _folder(path: str) -> str:
    """Without slashes at the ends. Raises AdapterInvalid for one that could mean another place."""
    path = path.strip("/")
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") for part in parts) or not path.isprintable() or set("\\?#*[]") & set(path):
        raise _bad(f"{path[:64]!r} is no folder; empty parts, dots and the characters \\ ? # * [ ] are not taken")
    return path


def _bad(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="lora_path")
