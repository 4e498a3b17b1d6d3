"""What a source may look like, and where the server may be sent for one: tables, redirects and lying resolvers."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.adapters.hosts import HostRules, parse_hosts, refusal
from serverlesslora.adapters.remote import Transient
from serverlesslora.adapters.sources import (
    BucketSource,
    HubSource,
    LocalSource,
    Source,
    WebSource,
    parse_source,
    shown,
)
from serverlesslora.adapters.web import Timeouts, Web
from serverlesslora.errors import AdapterInvalid, ConfigError
from tests.adapter_host import AdapterHost, adapter_host

DIGEST = "0123456789abcdef" * 4
QUICK = Timeouts(connect_s=2, read_s=2)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/srv/a", LocalSource("/srv/a")),
        ("./a#1", LocalSource("./a#1")),
        (f"/srv/a#digest={DIGEST}", LocalSource("/srv/a", DIGEST)),
        ("owner/repo", LocalSource("owner/repo")),
        ("hf://owner/repo", HubSource("owner/repo")),
        ("hf://owner/repo@v1.0/a/b", HubSource("owner/repo", "v1.0", "a/b")),
        ("hf://owner/repo@refs%2Fpr%2F3/", HubSource("owner/repo", "refs/pr/3")),
        (f"HF://o/r#digest={DIGEST.upper()}", HubSource("o/r", digest=DIGEST)),
        ("s3://my-bucket/a/b/", BucketSource("s3", "my-bucket", "a/b")),
        ("gs://my_bucket", BucketSource("gs", "my_bucket", "")),
        ("https://host.example/a/b", WebSource("https://host.example/a/b/")),
        ("https://host.example:8443", WebSource("https://host.example:8443/")),
        ("https://h.example/a/?sig=x%2F", WebSource("https://h.example/a/", "sig=x%2F")),
        ("http://10.0.0.1:9/a%20b", WebSource("http://10.0.0.1:9/a%20b/")),
    ],
)
def test_sources_are_parsed(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host/a",
        "file:///etc",
        "memory://a",
        "hf://owner",
        "hf://owner/repo@",
        "hf://owner/repo@../x",
        "hf://owner/repo/../../x",
        "hf://owner/repo/a//b",
        "hf://-owner/repo",
        "hf://owner/re po",
        "s3://B/a",
        "s3://",
        "s3://bucket/a/../b",
        "s3://bucket/*/b",
        "s3://user:pass@bucket/a",
        "https://user:secret@host/a",
        "https://user@host/a",
        "https://host/a#fragment",
        f"https://host/a#digest={DIGEST}0",
        "https://",
        "https:///a",
        "https://host:99999/a",
        "https://ho st/a",
        "https://host\\@127.0.0.1/a",
        "https://host/\u202ea",
        "https://host/%2e%2e/a",
        "https://host/a/../b",
        "https://host/a.zip",
        "https://host/a.tar.gz",
        "https://127.1/a",
        "https://2130706433/a",
        "https://0x7f000001/a",
        "https://0177.0.0.1/a",
        "https://0x7f.1/a",
        "https://[fe80::1%25eth0]/a",
        "https://[::1/a",
        "https://" + "h" * 5000,
    ],
)
def test_what_could_mean_something_else_is_refused(text: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        parse_source(text)
    assert "secret" not in caught.value.message


@given(st.text(), st.sampled_from(["", "hf://", "s3://", "gs://", "https://", "http://", "https://h/", "hf://o/r@"]))
def test_no_text_does_more_than_be_refused(text: str, scheme: str) -> None:
    shown(scheme + text)
    try:
        source = parse_source(scheme + text)
    except AdapterInvalid:
        return
    if not isinstance(source, LocalSource):
        assert ".." not in getattr(source, "folder", "").split("/")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("https://user:pw@h/a/?X-Amz-Signature=abc", "https://h/a/?…"),
        (f"https://h/a?sig=abc#digest={DIGEST}", f"https://h/a?…#digest={DIGEST}"),
        ("hf://owner/repo@v1/a", "hf://owner/repo@v1/a"),
        ("/srv/why?", "/srv/why?"),
    ],
)
def test_secrets_are_not_shown(text: str, seen: str) -> None:
    assert shown(text) == seen


NEVER = [
    "169.254.169.254",
    "fe80::1",
    "224.0.0.1",
    "ff02::1",
    "0.0.0.0",
    "::",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::808:808",
    "64:ff9b:1::a00:1",
    "2002:7f00:1::",
    "::7f00:1",
]
PRIVATE = ["127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.100.100.200", "::1", "fd00:ec2::254"]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"]


@pytest.mark.parametrize("address", NEVER + PRIVATE + ["240.0.0.1", "198.18.0.1", "192.0.2.1", "fec0::1"])
def test_addresses_that_are_not_public(address: str) -> None:
    assert refusal(ipaddress.ip_address(address), "public")


@pytest.mark.parametrize("address", NEVER)
def test_addresses_that_not_even_a_named_origin_may_have(address: str) -> None:
    assert refusal(ipaddress.ip_address(address), "internal")


def test_addresses_that_may_be_asked() -> None:
    assert not any(refusal(ipaddress.ip_address(address), "public") for address in PUBLIC)
    assert not any(refusal(ipaddress.ip_address(address), "internal") for address in PUBLIC + PRIVATE)


@pytest.mark.parametrize(
    ("hosts", "url", "trust"),
    [
        ([], "https://models.example/a", "public"),
        ([], "http://models.example/a", None),
        ([], "https://127.0.0.1/a", None),
        ([], "https://[::1]/a", None),
        ([], "https://169.254.169.254/a", None),
        (["models.example"], "https://models.example:8443/a", "public"),
        (["models.example"], "https://MODELS.example/a", "public"),
        (["models.example"], "https://models.example./a", None),
        (["models.example"], "https://other.example/a", None),
        (["models.example"], "http://models.example/a", None),
        (["*.example"], "https://a.b.example/", "public"),
        (["*.example"], "https://badexample/", None),
        (["10.0.0.1"], "https://10.0.0.1/", None),
        (["http://10.0.0.1:9000"], "http://10.0.0.1:9000/a", "internal"),
        (["http://10.0.0.1:9000"], "http://10.0.0.1:9001/a", None),
        (["http://10.0.0.1:9000"], "https://10.0.0.1:9000/a", None),
        (["https://models.internal"], "https://models.internal:443/a", "internal"),
        (["https://models.internal"], "https://models.example/a", None),
    ],
)
def test_hosts(hosts: list[str], url: str, trust: str | None) -> None:
    rules = parse_hosts(hosts)
    if trust is None:
        with pytest.raises(AdapterInvalid):
            rules.check(url)
    else:
        assert rules.check(url) == trust


@pytest.mark.parametrize("entry", ["", "a b", "https://host/path", "host:443", "ftp://host", "https://u@host"])
def test_bad_hosts_stop_the_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="adapter host"):
        parse_hosts([entry])


# --- the real thing: sockets


@pytest.fixture
def host() -> Iterator[AdapterHost]:
    with adapter_host() as host:
        host.files["/a/x"] = b"content"
        yield host


def read(web: Web, url: str) -> bytes:
    try:
        with web.open(url) as reading:
            return b"".join(reading.chunks)
    finally:
        web.close()


def port_of(host: AdapterHost) -> int:
    return int(host.url.rpartition(":")[2])


def test_a_named_origin_is_read(host: AdapterHost) -> None:
    assert read(Web(parse_hosts([host.url]), timeouts=QUICK), f"{host.url}/a/x") == b"content"


def test_a_name_that_leads_inside_is_not_connected_to(host: AdapterHost) -> None:
    answers: list[str] = []
    web = Web(HostRules(), timeouts=QUICK, resolve=lambda name, port: answers)
    for address in ("127.0.0.1", "::1", "169.254.169.254", "::ffff:127.0.0.1"):
        answers[:] = [address]
        with pytest.raises(AdapterInvalid, match="refused"):
            read(web, f"https://rebound.example:{port_of(host)}/a/x")
    assert host.asked == []


def test_one_bad_address_among_good_ones_is_enough() -> None:
    web = Web(HostRules(), timeouts=QUICK, resolve=lambda name, port: ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(AdapterInvalid, match="refused"):
        read(web, "https://mixed.example/a/x")


def test_a_name_is_looked_up_once_per_connection(host: AdapterHost) -> None:
    """What was checked is what is connected to: a second look-up could say something else."""
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    origin = f"http://rebound.example:{port_of(host)}"
    web = Web(parse_hosts([origin]), timeouts=QUICK, resolve=lambda name, port: answers.pop(0))
    assert read(web, f"{origin}/a/x") == b"content"
    assert answers == [["169.254.169.254"]]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:1/x",
        "https://127.0.0.1/x",
        "https://[::ffff:169.254.169.254]/latest/meta-data",
        "http://2130706433/x",
        "https://user:pw@other.example/x",
        "file:///etc/passwd",
        "//169.254.169.254/x",
        "",
    ],
)
def test_every_hop_is_checked(host: AdapterHost, target: str) -> None:
    host.redirects["/a/x"] = target
    with pytest.raises(AdapterInvalid):
        read(Web(parse_hosts([host.url]), timeouts=QUICK), f"{host.url}/a/x")
    assert len(host.asked) == 1


def test_redirects_are_followed_but_not_for_ever(host: AdapterHost) -> None:
    host.redirects["/once"] = "/a/x"
    assert read(Web(parse_hosts([host.url]), timeouts=QUICK), f"{host.url}/once") == b"content"
    host.redirects["/loop"] = "/loop"
    with pytest.raises(AdapterInvalid, match="redirects"):
        read(Web(parse_hosts([host.url]), timeouts=QUICK), f"{host.url}/loop")


def test_secrets_stay_with_their_origin(host: AdapterHost) -> None:
    with adapter_host() as other:
        other.files["/y"] = b"there"
        host.redirects["/a/x"] = f"{other.url}/y"
        web = Web(parse_hosts([host.url, other.url]), timeouts=QUICK)
        with web.open(f"{host.url}/a/x", headers={"authorization": "Bearer secret"}) as reading:
            assert b"".join(reading.chunks) == b"there"
        web.close()
        assert host.received[0]["authorization"] == "Bearer secret"
        assert "authorization" not in other.received[0]


def test_compressed_answers_are_refused(host: AdapterHost) -> None:
    host.headers["/a/x"] = {"content-encoding": "gzip"}
    with pytest.raises(AdapterInvalid, match="gzip"):
        read(Web(parse_hosts([host.url]), timeouts=QUICK), f"{host.url}/a/x")


def test_closing_ends_a_read_that_waits(host: AdapterHost) -> None:
    host.stalled.add("/a/x")
    web = Web(parse_hosts([host.url]), timeouts=Timeouts(5, 60))
    with web.open(f"{host.url}/a/x") as reading:
        assert next(reading.chunks)
        web.close()
        with pytest.raises(Transient):
            list(reading.chunks)


# --- TLS


def certificate_for(name: str, directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = directory / f"{name}.pem", directory / f"{name}.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_tls_proves_the_name_though_the_address_is_pinned(tmp_path: Path) -> None:
    cert, key = certificate_for("models.example", tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=str(cert))
    with adapter_host(server) as host:
        host.files["/x"] = b"secret"
        port = port_of(host)

        def web_for(name: str) -> tuple[Web, str]:
            origin = f"https://{name}:{port}"
            return (
                Web(
                    parse_hosts([origin]),
                    timeouts=QUICK,
                    resolve=lambda name, port: ["127.0.0.1"],
                    ssl_context=trusting,
                ),
                f"{origin}/x",
            )

        assert read(*web_for("models.example")) == b"secret"
        with pytest.raises(Transient, match="certificate"):
            read(*web_for("another.example"))
