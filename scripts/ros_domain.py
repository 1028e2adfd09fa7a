"""A ROS domain that no other test session, benchmark or demo on this machine uses."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

DOMAINS = range(1, 102)  # the ports of higher ones may be taken by anybody (Linux hands them out)


def claim() -> tuple[int, IO[str]]:
    """A ROS_DOMAIN_ID and the open file that holds the claim: until it is closed, or the process ends."""
    first = os.getpid() % len(DOMAINS)
    for domain in [*DOMAINS[first:], *DOMAINS[:first]]:
        held = Path(tempfile.gettempdir(), f"spark3r_test_domain_{domain}").open("a")  # noqa: SIM115  held by the caller
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
        else:
            return domain, held
    raise RuntimeError(f"all ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are taken on this machine")
