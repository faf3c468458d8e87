"""Connections that the service makes to where others have sent it: to public addresses alone.

A name is resolved when the connection is made, and what was looked at is what is connected to: where a name led before says
nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import httpcore

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotPublic(httpcore.ConnectError):
    """A name or an address that leads to a place that is not public."""


class OnlyPublic(httpcore.SyncBackend):
    """Connects to public addresses alone."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        return super().connect_tcp(public_address(host, port), port, timeout, local_address, socket_options)


class AsyncOnlyPublic(httpcore.AnyIOBackend):
    """The same without a thread, but for one place that the administrator has named, wherever that is."""

    def __init__(self, trusted: tuple[str, int]) -> None:
        self.trusted = trusted

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        if (host.lower(), port) != self.trusted:
            try:
                async with asyncio.timeout(timeout):
                    host = await asyncio.to_thread(public_address, host, port)
            except TimeoutError as error:
                raise httpcore.ConnectTimeout(f"{host} was not found in time") from error
        return await super().connect_tcp(host, port, timeout, local_address, socket_options)


def public_address(host: str, port: int) -> str:
    """An address of a host all of whose addresses are public. Raises httpcore.ConnectError."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"{host} has no address") from error
    for address in found:
        if not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise NotPublic(f"{host} leads to {address}, which is no public address")
    return found[0]


def literal_address(host: str) -> Address | None:
    """The address that a host is, also in the ways in which only the C library reads one: 127.1, 2130706433, 0x7f.1."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16"))
"""NAT64 and 6to4: a v4 address is inside."""


def is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast
