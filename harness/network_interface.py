"""The network interface over which this rank reaches the other ranks.

Gloo binds to whatever address the host's own name has. On Debian that is 127.0.1.1, elsewhere it
may be none, or that of a network which does not connect the nodes. The ranks have just met at
rank 0, so the interface that leads there is the right one.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address


@contextmanager
def gloo_interface(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """Within, Gloo binds to the interface that reaches the other ranks; a variable set prevails.

    Synchronises the ranks. `store` is at MASTER_ADDR.
    """
    own = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address-{rank}", own)
    if is_loopback(own):  # rank 0's machine, perhaps, whose name may mean the machine itself
        others = store.multi_get([f"address-{other}" for other in range(world_size)])
        own = address_among([address.decode() for address in others])
    name = interface_of(own)
    if INTERFACE in os.environ or not name:
        yield
        return
    os.environ[INTERFACE] = name
    try:
        yield
    finally:
        del os.environ[INTERFACE]


def address_among(addresses: Sequence[str]) -> str:
    """Return this machine's address towards the first of `addresses` on a network, or loopback."""
    elsewhere = [address for address in addresses if address and not is_loopback(address)]
    return address_towards(elsewhere[0]) if elsewhere else next(filter(None, addresses), "")


def address_towards(host: str) -> str:
    """Return the address from which this machine sends to `host`; "" where it has no way there."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # sends nothing
            except OSError:
                continue
            return probe.getsockname()[0].partition("%")[0]
    return ""


def is_loopback(address: str) -> bool:
    """Return whether an address is that of the machine itself, such as 127.0.1.1."""
    return bool(address) and ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str:
    """Return the name of the interface with this address; "" where none has it."""
    if not address:
        return ""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return "lo"
    found = _ipv4_addresses() if wanted.version == 4 else _ipv6_addresses()
    return next((name for name, has in found if ipaddress.ip_address(has) == wanted), "")


def _ipv4_addresses() -> Iterator[tuple[str, bytes]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            yield name, answer[20:24]


def _ipv6_addresses() -> Iterator[tuple[str, bytes]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        address, *_, name = line.split()
        yield name, bytes.fromhex(address)
