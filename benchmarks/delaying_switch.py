"""A small Ethernet switch that delays frames: a thread between tap devices.

For kernels without netem. Python forwards about 20,000 frames per second, so hosts behind it use
large frames, and links of up to 100 Mbit/s.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

TUNSETIFF, TAP, NO_PACKET_INFORMATION = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
LARGEST_FRAME = 65536
IDLE_S = 0.05


class DelayingSwitch:
    """A switch with tap devices of these names; a frame from one reaches another `delay_s` later.

    The devices may be moved into namespaces; `stop` removes them. Raises OSError without root.
    """

    def __init__(self, names: Sequence[str], delay_s: float) -> None:
        self.delay_s = delay_s
        self.ports: list[int] = []
        self.port_of: dict[bytes, int] = {}  # MAC address -> port
        self.waiting: list[tuple[float, int, int, bytes]] = []  # due, order, port, frame
        self.order = itertools.count()
        self.stopped = threading.Event()
        for name in names:
            port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self.ports.append(port)
            request = struct.pack("16sH", name.encode(), TAP | NO_PACKET_INFORMATION)
            fcntl.ioctl(port, TUNSETIFF, request)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start forwarding."""
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread and remove the devices."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        for port in self.ports:
            os.close(port)

    def _run(self) -> None:
        while not self.stopped.is_set():
            now = time.monotonic()
            while self.waiting and self.waiting[0][0] <= now:
                _, _, port, frame = heapq.heappop(self.waiting)
                self._send(port, frame)
            until_s = self.waiting[0][0] - now if self.waiting else IDLE_S
            for port in select.select(self.ports, [], [], min(until_s, IDLE_S))[0]:
                self._receive(port)

    def _receive(self, port: int) -> None:
        due = time.monotonic() + self.delay_s
        while True:
            try:
                frame = os.read(port, LARGEST_FRAME)
            except OSError:  # nothing left to read, or the device is not up yet
                return
            self.port_of[frame[6:12]] = port
            known = self.port_of.get(frame[:6])
            for to in [known] if known is not None else self.ports:
                if to is not None and to != port:
                    heapq.heappush(self.waiting, (due, next(self.order), to, frame))

    def _send(self, port: int, frame: bytes) -> None:
        with suppress(OSError):  # dropped, as by a real switch if the port is down
            os.write(port, frame)
