#!/usr/bin/env python3
"""Bring .venv into the state that `make demo` and `make test` need; does only what is not right yet.

Every failure is one line with the remedy. This file must be understood by Python 3.6, to be able to refuse it.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements"
FILES = ("ros.txt", "run.txt", "test.txt")  # installed together, under constraints.txt
FILES_WITHOUT_DEPENDENCIES = ("test-nodeps.txt",)
OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_GB = 4.0  # of disk for a new environment, downloads included


class SetupError(Exception):
    """What is wrong and what to do about it, in one line."""


def check_machine():
    """Raises SetupError when this interpreter or machine cannot carry the environment."""
    here = sys.version_info[:2]
    if not OLDEST <= here <= NEWEST:
        raise SetupError(
            f"Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} is needed, this is "
            f"{platform.python_version()} ({sys.executable}): run `make PYTHON=python3.11 ...`"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"the ROS 2 wheels exist for x86_64 Linux only, this is {platform.machine()} {platform.system()}: "
            "install ROS 2 itself, see docs/install.md"
        )


def check_compiler():
    """tf2_msgs is compiled once: compilers and Python headers must be there before minutes of downloads."""
    for compiler in ("cc", "c++"):
        if shutil.which(compiler) is None:
            raise SetupError(f"{compiler} is missing: install a C/C++ compiler (package build-essential)")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SetupError(f"{header} is missing: install the Python headers (package python3-dev)")


def check_disk():
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    if free_gb < NEEDED_GB:
        raise SetupError(f"{free_gb:.1f} GB of disk are free under {ROOT}, {NEEDED_GB:.0f} GB are needed: make room")


def explain(output):
    """The one line that tells why pip failed, from what it printed."""
    network = r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|Connection refused|"
    network += r"Network is unreachable|Read timed out|ConnectTimeoutError|ProxyError|SSLError|Could not fetch URL"
    if re.search(r"No space left on device|Errno 28", output):
        return "the disk is full: make room (pip also needs it in the temporary and cache folders)"
    if re.search(network, output):
        return "the package index cannot be reached: check the network, proxy or pip configuration"
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return f"no {missing.group(1)} for Python {platform.python_version()} on this machine: use Python 3.11"
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return (errors or output.strip().splitlines() or ["no message"])[-1]


def say(text):
    print("setup: " + text, flush=True)


def clean_environment():
    """This process's environment without what other Python or ROS environments left in it."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE", "AMENT_PREFIX_PATH")
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def python(*arguments, **kwargs):
    """Runs the environment's Python and returns the finished process with its output."""
    return subprocess.run(
        [str(VENV / "bin" / "python"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=str(ROOT),
        env=clean_environment(),
        **kwargs,
    )


def pip_install(*arguments):
    """Runs pip in the environment; says every ten seconds what it is at. Its output is kept in .venv/pip.log."""
    log, start = VENV / "pip.log", time.monotonic()
    options = ["--no-compile", "--progress-bar=off", "--retries=2"]
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", *options, *arguments]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=str(ROOT), env=clean_environment()
        )
        while process.poll() is None:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                doing = re.findall(r"^ *(Collecting \S+|Downloading \S+|Installing)", log.read_text("utf-8"), re.M)
                say(f"  {time.monotonic() - start:3.0f} s: {(doing or ['starting'])[-1].lower()}")
    if process.returncode:
        raise SetupError(f"{explain(log.read_text('utf-8'))} (pip's output: .venv/pip.log)")


def fingerprint():
    """Changes when the requirements or the interpreter do."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(REQUIREMENTS.glob("*.txt")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pins():
    """{name: version} of everything that the requirement files pin."""
    found = {}
    for name in FILES + FILES_WITHOUT_DEPENDENCIES:
        for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines():
            pin = re.match(r"([\w.-]+)==(\S+)", line)
            if pin:
                found[pin.group(1)] = pin.group(2)
    return found


PROBE = """
import importlib.metadata, json, sys
wrong = []
for name, version in json.loads(sys.argv[1]).items():
    try:
        found = importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        found = "nothing"
    if found != version:
        wrong.append(name + " " + version + " (found " + found + ")")
print(json.dumps(wrong))
"""


def wrong_packages():
    """Pinned packages that the environment lacks or has in another version."""
    result = python("-c", PROBE, json.dumps(pins()))
    return json.loads(result.stdout) if result.returncode == 0 else [result.stdout.strip()]


def ensure_environment():
    if (VENV / "bin" / "python").exists() and python("-c", "import pip").returncode == 0:
        return
    say("creating .venv with Python " + platform.python_version())
    result = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )
    if result.returncode:
        reason = (result.stdout.strip().splitlines() or ["no message"])[-1]
        raise SetupError("python -m venv failed (on Debian: install python3-venv): " + reason)


def ensure_packages():
    stamp = VENV / "requirements.stamp"
    wrong = wrong_packages()
    if stamp.exists() and stamp.read_text() == fingerprint() and not wrong:
        return
    say("installing {} pinned packages (a few minutes the first time)".format(len(wrong) or "changed"))
    arguments = ["-c", str(REQUIREMENTS / "constraints.txt")]
    for name in FILES:
        arguments += ["-r", str(REQUIREMENTS / name)]
    pip_install(*arguments)
    for name in FILES_WITHOUT_DEPENDENCIES:
        pip_install("--no-deps", "-r", str(REQUIREMENTS / name))
    stamp.write_text(fingerprint())


def ensure_package():
    """The package itself, editable; again when its metadata changed."""
    stamp = VENV / "package.stamp"
    metadata = b"".join((ROOT / name).read_bytes() for name in ("setup.py", "setup.cfg"))
    state = str(ROOT) + " " + hashlib.sha256(metadata).hexdigest()
    if stamp.exists() and stamp.read_text() == state and python("-P", "-c", "import spark3r_ros").returncode == 0:
        return
    say("installing spark3r_ros (editable)")
    pip_install("--no-deps", "--no-build-isolation", "-e", str(ROOT))
    stamp.write_text(state)


def has_tf2_msgs():
    return (VENV / "bin" / "python").exists() and python("-c", "from tf2_msgs.msg import TFMessage").returncode == 0


def ensure_tf2_msgs():
    if has_tf2_msgs():
        return
    say("building tf2_msgs")
    result = python(str(ROOT / "scripts" / "build_tf2_msgs.py"))
    if result.returncode or not has_tf2_msgs():
        raise SetupError((result.stdout.strip().splitlines() or ["tf2_msgs cannot be imported"])[-1])


def main():
    start = time.monotonic()
    try:
        check_machine()
        if not (VENV / "requirements.stamp").exists():
            check_disk()
        if not has_tf2_msgs():
            check_compiler()
        ensure_environment()
        ensure_packages()
        ensure_package()
        ensure_tf2_msgs()
    except SetupError as error:
        sys.exit("setup: " + str(error))
    except OSError as error:
        sys.exit("setup: {}: {}".format(error.filename or "the machine", error.strerror or error))
    say(f"ready ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
