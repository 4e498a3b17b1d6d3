"""The kinds of places: a web server's folder, a repository of a hub, and a folder of an object store."""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serverlesslora.adapters.files import CHUNK, CONFIG, KNOWN_FILES, PICKLED, WEIGHTS, wanted_files
from serverlesslora.adapters.hosts import HostRules, origin_of
from serverlesslora.adapters.remote import Absent, Check, Reading, Remote, RemoteFile, Transient
from serverlesslora.adapters.sources import BucketSource, HubSource, LocalSource, Source, WebSource
from serverlesslora.adapters.web import Timeouts, Web
from serverlesslora.errors import AdapterInvalid, InvalidRequest, NotFound

RANGE_BYTES = 8 * CHUNK  # of one request to an object store
ASKED_AT_ONCE = 8
_NETWORK = frozenset({
    "botocore.HTTPClientError", "botocore.ConnectionError", "botocore.IncompleteReadError",
    "botocore.ResponseStreamingError", "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError",
})  # fmt: skip
_MD5 = re.compile(r"[0-9a-f]{32}")
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
_EXTRA_NAMES = {"s3": "s3", "gs": "gcs"}


def remote_of(source: Source, rules: HostRules, timeouts: Timeouts) -> Remote:
    """Raises InvalidRequest when a package for it is missing. Loads what it needs, which may take a second."""
    assert not isinstance(source, LocalSource)
    match source:
        case WebSource():
            return Site(source, rules, timeouts)
        case HubSource():
            from huggingface_hub import constants

            return CachedRepository(source) if constants.HF_HUB_OFFLINE else Repository(source, rules, timeouts)
        case BucketSource():
            return Bucket(source, timeouts)


class Site:
    """A web server cannot be asked what it has: every file an adapter may have is tried."""

    def __init__(self, source: WebSource, rules: HostRules, timeouts: Timeouts) -> None:
        rules.check(source.url)
        self._source = source
        self._web = Web(rules, timeouts=timeouts)
        self.close = self._web.close

    def files(self) -> list[RemoteFile]:
        return [RemoteFile(name) for name in KNOWN_FILES]

    def open(self, file: RemoteFile, *, offset: int, version: str | None) -> Any:
        return self._web.open(self._source.address_of(file.name), offset=offset, version=version)


class Repository:
    """The hub's own client says what there is, at one commit, which never changes; files are read as from any web
    server, their hashes compared with the hub's. Endpoint and token are those of the environment.
    """

    def __init__(self, source: HubSource, rules: HostRules, timeouts: Timeouts) -> None:
        import msgspec
        from huggingface_hub import HfApi

        self._source = source
        self._timeouts = timeouts
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        # The operator named the hub; what it redirects to must be public, or be named as well.
        endpoint = origin_of(self._api.endpoint)
        self._web = Web(
            msgspec.structs.replace(rules, internal=rules.internal | {endpoint}, names=None), timeouts=timeouts
        )
        self._commit = ""
        self.close = self._web.close

    def files(self) -> list[RemoteFile]:
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        source = self._source
        named = f"{source.repo}@{source.revision}" if source.revision else source.repo
        try:
            info = self._api.model_info(
                source.repo, revision=source.revision, files_metadata=True, timeout=self._timeouts.read_s
            )
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise NotFound(
                f"the hub has no {named}, or it is private and HF_TOKEN is not allowed to see it", param="lora_path"
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status not in (408, 429):
                raise AdapterInvalid(f"the hub answered {status} for {named}", param="lora_path") from error
            raise Transient(f"the hub answered {status} for {named}") from error
        except Exception as error:  # of whichever HTTP library the hub's client uses
            raise Transient(f"the hub cannot be reached: {type(error).__name__}") from error
        self._commit = str(info.sha)
        prefix = f"{source.folder}/" if source.folder else ""
        there: dict[str, Any] = {
            entry.rfilename.removeprefix(prefix): entry
            for entry in info.siblings or ()
            if entry.rfilename.startswith(prefix)
        }
        return [self._file(name, there[name]) for name in wanted_files(there)]

    def _file(self, name: str, entry: Any) -> RemoteFile:
        checks: tuple[Check, ...] = ()
        if entry.lfs is not None:
            checks = (Check("sha256", entry.lfs.sha256),)
        elif entry.blob_id:
            checks = (Check("git-sha1", entry.blob_id),)
        return RemoteFile(name, entry.size, f"{self._commit}:{entry.blob_id}", checks)

    @contextlib.contextmanager
    def open(self, file: RemoteFile, *, offset: int, version: str | None) -> Iterator[Reading]:
        from huggingface_hub.utils import build_hf_headers

        path = f"{self._source.folder}/{file.name}" if self._source.folder else file.name
        url = f"{self._api.endpoint}/{self._source.repo}/resolve/{self._commit}/{quote(path)}"
        headers = {name.lower(): value for name, value in build_hf_headers(library_name="serverlesslora").items()}
        headers.pop("accept-encoding", None)
        with self._web.open(url, offset=offset, headers=headers) as reading:
            yield reading._replace(version=file.version)


class CachedRepository:
    """HF_HUB_OFFLINE: what the hub's client has downloaded earlier."""

    def __init__(self, source: HubSource) -> None:
        from huggingface_hub import try_to_load_from_cache

        prefix = f"{source.folder}/" if source.folder else ""
        self._paths: dict[str, Path] = {}
        for name in KNOWN_FILES + PICKLED:
            found = try_to_load_from_cache(source.repo, prefix + name, revision=source.revision)
            if isinstance(found, str):
                self._paths[name] = Path(found).resolve()
        if CONFIG not in self._paths or WEIGHTS not in self._paths:
            raise NotFound(
                f"{source.repo} is not in the hub's local cache, and HF_HUB_OFFLINE is set", param="lora_path"
            )

    def files(self) -> list[RemoteFile]:
        return [RemoteFile(name, self._paths[name].stat().st_size) for name in wanted_files(self._paths)]

    @contextlib.contextmanager
    def open(self, file: RemoteFile, *, offset: int, version: str | None) -> Iterator[Reading]:
        with self._paths[file.name].open("rb") as content:
            yield Reading(0, file.size, None, iter(lambda: content.read(CHUNK), b""))

    def close(self) -> None:
        pass


class Bucket:
    """An object store through fsspec; credentials and endpoint are those of its own environment and files."""

    def __init__(self, source: BucketSource, timeouts: Timeouts, fs: Any = None) -> None:
        """`fs`: an fsspec file system, for tests."""
        self._folder = f"{source.bucket}/{source.folder}" if source.folder else source.bucket
        self._kind = source.kind
        self._fs = fs if fs is not None else _file_system(source.kind, timeouts)
        self._is_closed = False

    def files(self) -> list[RemoteFile]:
        # The folder is not listed: it may hold millions of others, and every one of them would become an object here.
        names = (*KNOWN_FILES, *PICKLED)
        with ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="adapter-names") as pool:
            entries = dict(zip(names, pool.map(self._entry, names), strict=True))
        there = {name: entry for name, entry in entries.items() if entry is not None}
        if not there:
            raise NotFound(f"there is no adapter at {self._kind}://{self._folder}", param="lora_path")
        return [self._file(name, there[name]) for name in wanted_files(there)]

    def _entry(self, name: str) -> dict[str, Any] | None:
        with self._told("looked at"):
            try:
                entry: dict[str, Any] = self._info(f"{self._folder}/{name}")
            except FileNotFoundError:
                return None
        return entry if entry.get("type") == "file" else None

    def _info(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = self._fs.info(path, refresh=True) if self._kind == "s3" else self._fs.info(path)
        return entry

    def _file(self, name: str, entry: dict[str, Any]) -> RemoteFile:
        checks = tuple(self._checks(entry))
        version = entry.get("ETag") or entry.get("etag") or entry.get("generation")
        return RemoteFile(name, entry.get("size"), str(version) if version else None, checks)

    def _checks(self, entry: dict[str, Any]) -> Iterator[Check]:
        if self._kind == "gs":
            if md5 := entry.get("md5Hash"):
                yield Check("md5", base64.b64decode(md5).hex())
        elif hasattr(self._fs, "call_s3"):
            bucket, _, key = entry["name"].partition("/")
            with self._told("asked for checksums"):
                head = self._fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            sha256, etag = head.get("ChecksumSHA256") or "", str(head.get("ETag", "")).strip('"')
            is_encrypted = "kms" in str(head.get("ServerSideEncryption", "")) or head.get("SSECustomerAlgorithm")
            # "…-4" is a hash of the hashes of parts; and with keys of its own the store hashes what it stores.
            if sha256 and "-" not in sha256:
                yield Check("sha256", base64.b64decode(sha256).hex())
            elif _MD5.fullmatch(etag) and not is_encrypted:
                yield Check("md5", etag)

    @contextlib.contextmanager
    def open(self, file: RemoteFile, *, offset: int, version: str | None) -> Iterator[Reading]:
        path = f"{self._folder}/{file.name}"
        with self._told("read"):
            now = self._info(path)
        current = self._file_version(now)
        begin = offset if version is not None and version == current else 0
        yield Reading(begin, now["size"], current, self._chunks(path, begin, now["size"], current))

    def _chunks(self, path: str, begin: int, size: int, version: str | None) -> Iterator[bytes]:
        for start in range(begin, size, RANGE_BYTES):
            if self._is_closed:
                raise Transient("the transfer was stopped")
            with self._told("read"):
                yield self._fs.cat_file(path, start=start, end=min(start + RANGE_BYTES, size))
        with self._told("read"):
            after = self._info(path)
        if self._file_version(after) != version:
            raise Transient(f"{path.rpartition('/')[2]} changed while it was read")

    @staticmethod
    def _file_version(entry: dict[str, Any]) -> str | None:
        version = entry.get("ETag") or entry.get("etag") or entry.get("generation")
        return str(version) if version else None

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors of the store's client in our words."""
        try:
            yield
        except FileNotFoundError as error:
            raise Absent(str(error)) from error
        except PermissionError as error:
            raise AdapterInvalid(
                f"{self._kind}://{self._folder} cannot be {what}: access is denied; check the server's credentials",
                param="lora_path",
            ) from error
        except (OSError, TimeoutError) as error:
            raise Transient(f"{self._kind}://{self._folder} cannot be {what}: {type(error).__name__}") from error
        except (AdapterInvalid, Transient, Absent):
            raise
        except Exception as error:  # the client's own classes
            if _is_of_the_network(error):
                raise Transient(f"{self._kind}://{self._folder} cannot be {what}: {type(error).__name__}") from error
            raise AdapterInvalid(
                f"{self._kind}://{self._folder} cannot be {what}: {type(error).__name__}; check the server's "
                "credentials and endpoint",
                param="lora_path",
            ) from error

    def close(self) -> None:
        self._is_closed = True


def _file_system(kind: str, timeouts: Timeouts) -> Any:
    package = _EXTRAS[kind]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InvalidRequest(
            f"{kind}:// needs the package {package}: pip install 'serverlesslora[{_EXTRA_NAMES[kind]}]'",
            param="lora_path",
        ) from error
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if kind == "s3":
        options["config_kwargs"] = {
            "connect_timeout": timeouts.connect_s,
            "read_timeout": timeouts.read_s,
            "retries": {"total_max_attempts": 1},  # who fetches tries again, and knows when to stop
        }
    fs = fsspec.filesystem(kind, **options)
    fs.retries = 1
    return fs


def _is_of_the_network(error: Exception) -> bool:
    """By name, because importing the clients takes a second and either may be missing."""
    return any(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in _NETWORK for kind in type(error).__mro__)
