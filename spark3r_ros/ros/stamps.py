"""Stamps as integer nanoseconds; no float ever touches them."""

from __future__ import annotations

from builtin_interfaces.msg import Time

NS_PER_S = 1_000_000_000

# A stamp that is older than the newest one by more than this means that time went back; by less, that it is late.
JUMP_BACK_NS = NS_PER_S


def to_ns(stamp: Time) -> int:
    return stamp.sec * NS_PER_S + stamp.nanosec


def to_msg(stamp_ns: int) -> Time:
    sec, nanosec = divmod(stamp_ns, NS_PER_S)
    return Time(sec=sec, nanosec=nanosec)
