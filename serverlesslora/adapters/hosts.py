"""Which hosts the server may be sent to for an adapter, so that nobody can use it to reach what only it can reach.

A name is checked before it is looked up, and the address before it is connected to, on every hop of a redirect: names
may resolve differently each time. Only addresses of the public internet are served, unless the operator named the
origin (`http://models.internal:9000`), whose address may then be private or loopback. Link-local addresses, where
clouds keep their credentials, are never connected to.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from serverlesslora.adapters.sources import split_url
from serverlesslora.errors import AdapterInvalid, ConfigError

Trust = Literal["public", "internal"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Addresses that carry another address inside, which a router on the way may send it to (RFC 6052, 8215, 3056, 4380).
_CARRIERS = tuple(
    map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
)
_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")  # carriers' NAT; some clouds answer for their metadata here
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class HostRules(msgspec.Struct, frozen=True):
    """`internal`: origins the operator vouches for. `names`: the only public hosts; None: any."""

    internal: frozenset[Origin] = frozenset()
    names: frozenset[str] | None = None

    def check(self, url: str) -> Trust:
        """May this address be asked, and how far is its host trusted? Raises AdapterInvalid."""
        origin = origin_of(url)
        if origin in self.internal:
            return "internal"
        listed = "name it with --adapter-host if it should be"
        if origin.scheme != "https":
            raise AdapterInvalid(f"{origin.scheme}://{origin.host} is not encrypted; use https, or {listed}")
        if self.names is not None and not any(_matches(origin.host, name) for name in self.names):
            raise AdapterInvalid(f"adapters are not fetched from the host {origin.host}; {listed}")
        if (literal := _literal(origin.host)) is not None and (reason := refusal(literal, "public")):
            raise AdapterInvalid(f"adapters are not fetched from {origin.host}: {reason}")
        return "public"


def parse_hosts(entries: Iterable[str]) -> HostRules:
    """`HOST` and `*.DOMAIN` are public hosts, and then the only ones; `SCHEME://HOST[:PORT]` is an origin of which the
    address does not matter. Raises ConfigError.
    """
    internal: set[Origin] = set()
    names: set[str] = set()
    for entry in entries:
        is_origin = "://" in entry
        url = entry if is_origin else f"https://{entry.removeprefix('*.')}"
        try:
            parts = split_url(url)
        except AdapterInvalid as error:
            raise ConfigError(f"adapter host {entry!r}: {error.message}") from None
        if parts.path.strip("/") or parts.query or parts.fragment or (parts.port is not None and not is_origin):
            raise ConfigError(f"adapter host {entry!r}: give HOST, *.DOMAIN or SCHEME://HOST[:PORT]")
        if is_origin:
            internal.add(origin_of(url))
        else:
            names.add(entry.lower())
    return HostRules(frozenset(internal), frozenset(names) if names or internal else None)


def origin_of(url: str) -> Origin:
    """Raises AdapterInvalid when it is no http(s) address."""
    parts = split_url(url)
    assert parts.hostname is not None
    return Origin(parts.scheme, parts.hostname.rstrip(".").lower(), parts.port or _DEFAULT_PORTS[parts.scheme])


def refusal(address: Address, trust: Trust) -> str | None:
    """Why this address is not connected to; None: it may be."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return "it belongs to one link"
        mapped = address.ipv4_mapped
        if trust == "internal" and mapped is None and address.is_loopback:
            return None
        if any(address in network for network in _CARRIERS):
            return "it carries another address inside"
        if address in _SITE_LOCAL and trust == "public":
            return "it is private"
    if address.is_link_local:
        return "it is link-local, where clouds keep credentials"
    if address.is_multicast or address.is_unspecified:
        return "it is nobody's own address"
    if trust == "internal":
        return None
    if address.is_loopback:
        return "it is this machine"
    if not address.is_global or (isinstance(address, ipaddress.IPv4Address) and address in _SHARED):
        return "it is private or reserved"
    return None


def _matches(host: str, name: str) -> bool:
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
