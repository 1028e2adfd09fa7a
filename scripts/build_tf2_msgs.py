#!/usr/bin/env python3
"""Build tf2_msgs/msg/TFMessage for a virtual environment that has rclpy from PyPI, where tf2_msgs does not exist.

usage: python scripts/build_tf2_msgs.py            with the environment's own Python; installs into its prefix

It generates the message code with the rosidl generators of the wheels and compiles it: a C and a C++ compiler and the
Python headers are needed, CMake, ament and a network are not. On a machine with ROS 2 it is not needed at all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = "tf2_msgs"
DEFINITION = "geometry_msgs/TransformStamped[] transforms\n"
# the hash by which real robots recognise the type; another one would not be received by anybody
TYPE_HASH = "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087"
DEPENDENCIES = ("geometry_msgs", "std_msgs", "builtin_interfaces")
TYPESUPPORTS = ("rosidl_typesupport_fastrtps_c", "rosidl_typesupport_introspection_c")
# in the order in which they link to each other; the introspection type support is what rmw_fastrtps falls back to
LIBRARIES = ("rosidl_generator_c", *TYPESUPPORTS, "rosidl_typesupport_c")
PYTHON_BINDINGS = "rosidl_generator_py"
PACKAGE_XML = f"""<?xml version="1.0"?>
<package format="3">
  <name>{PACKAGE}</name>
  <version>0.0.1</version>
  <description>TFMessage, generated against the ROS 2 wheels of PyPI</description>
  <maintainer email="spark3r_ros@example.com">spark3r_ros maintainers</maintainer>
  <license>BSD</license>
  <member_of_group>rosidl_interface_packages</member_of_group>
</package>
"""


class BuildError(RuntimeError):
    """Why tf2_msgs could not be built; one line."""


class Generation:
    """Runs the rosidl generators into ``work``, one folder per generator."""

    def __init__(self, work: Path, prefix: Path) -> None:
        self.work = work
        self.share = prefix / "share"
        self.source = work / "source" / PACKAGE  # what will be share/tf2_msgs

    def run(self) -> None:
        from rosidl_adapter.msg import convert_msg_to_idl
        from rosidl_generator_c import generate_c
        from rosidl_generator_py import generate_py
        from rosidl_generator_type_description import generate_type_hash
        from rosidl_typesupport_c import generate_c as generate_typesupport
        from rosidl_typesupport_fastrtps_c import generate_typesupport_fastrtps_c
        from rosidl_typesupport_introspection_c import generate_c as generate_introspection

        message = self.source / "msg" / "TFMessage.msg"
        message.parent.mkdir(parents=True)
        message.write_text(DEFINITION)
        convert_msg_to_idl(self.source, PACKAGE, Path("msg/TFMessage.msg"), message.parent)

        include_paths = [f"{name}:{self.share / name}" for name in DEPENDENCIES]
        generate_type_hash(self.arguments("rosidl_generator_type_description", include_paths=include_paths))
        description = self.work / "rosidl_generator_type_description" / PACKAGE / "msg" / "TFMessage.json"
        check_hash(description)
        shutil.copy(description, message.parent)
        described = [f"msg/TFMessage.idl:{description}"]
        generate_c(
            self.arguments("rosidl_generator_c", ros_interface_files=[str(message)], type_description_tuples=described),
            False,  # the comments of the definition are not carried over
        )
        generate_typesupport_fastrtps_c(self.arguments("rosidl_typesupport_fastrtps_c"))
        generate_introspection(self.arguments("rosidl_typesupport_introspection_c"))
        generate_typesupport(self.arguments("rosidl_typesupport_c"), list(TYPESUPPORTS))
        bindings = self.arguments(PYTHON_BINDINGS)
        (self.work / PYTHON_BINDINGS / PACKAGE / "__init__.py").touch()
        generate_py(bindings, ["rosidl_typesupport_c"])

    def arguments(self, generator: str, **more: object) -> str:
        """Writes the argument file of one generator and expands its header template; returns the file's path."""
        output = self.work / generator / PACKAGE
        resources = self.share / generator / "resource"
        (output / "msg").mkdir(parents=True)
        template = resources / f"{generator}__visibility_control.h.in"
        if template.exists():
            header = template.read_text().replace("@PROJECT_NAME_UPPER@", PACKAGE.upper())
            (output / "msg" / template.stem).write_text(header.replace("@PROJECT_NAME@", PACKAGE))
        interfaces = [f"{name}:{idl}" for name in DEPENDENCIES for idl in sorted((self.share / name).rglob("*.idl"))]
        content = {
            "package_name": PACKAGE,
            "output_dir": str(output),
            "template_dir": str(resources),
            "idl_tuples": [f"{self.source}:msg/TFMessage.idl"],
            "ros_interface_dependencies": interfaces,
            "target_dependencies": [],
            **more,
        }
        path = self.work / f"{generator}.json"
        path.write_text(json.dumps(content))
        return str(path)


def check_hash(description: Path) -> None:
    hashes = {entry["type_name"]: entry["hash_string"] for entry in json.loads(description.read_text())["type_hashes"]}
    if hashes[f"{PACKAGE}/msg/TFMessage"] != TYPE_HASH:
        raise BuildError(f"the generated type hash is not ROS 2's: {hashes[f'{PACKAGE}/msg/TFMessage']}")


def call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{command[0]} failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")


def compile_objects(work: Path, prefix: Path) -> dict[str, list[str]]:
    """Compiles every generated file; returns the object files by generator."""
    import numpy

    generators = (*LIBRARIES, PYTHON_BINDINGS)
    folders = [work / name for name in generators]
    folders += [entry for entry in sorted((prefix / "include").iterdir()) if entry.is_dir()]
    folders += [prefix / "include", Path(sysconfig.get_path("include")), Path(numpy.get_include())]
    includes = [f"-I{folder}" for folder in folders]
    objects: dict[str, list[str]] = {name: [] for name in generators}
    commands = []
    for name in generators:
        for source in sorted([*(work / name).rglob("*.c"), *(work / name).rglob("*.cpp")]):
            compiler = ["cc", "-std=gnu11"] if source.suffix == ".c" else ["c++", "-std=gnu++17"]
            commands.append([*compiler, "-O2", "-fPIC", "-w", *includes, "-c", str(source), "-o", f"{source}.o"])
            objects[name].append(f"{source}.o")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, commands))
    return objects


def link(target: Path, objects: list[str], lib: Path, own: list[str], more: list[str]) -> None:
    runtime = ["rosidl_runtime_c", "rcutils", *LIBRARIES[1:], ":libfastcdr.so.2", "rosidl_typesupport_fastrtps_cpp"]
    libraries = [f"{PACKAGE}__{name}" for name in own] + runtime + more
    libraries += [f"{package}__{name}" for package in DEPENDENCIES for name in LIBRARIES]
    flags = [f"-L{lib}", "-Wl,--as-needed", *[f"-l{name}" for name in libraries], f"-Wl,-rpath,{lib}"]
    call(["c++", "-shared", "-o", str(target), *objects, *flags])


def install(work: Path, source: Path, objects: dict[str, list[str]], prefix: Path) -> None:
    lib = prefix / "lib"
    for name in LIBRARIES:
        own = [] if name == LIBRARIES[0] else [LIBRARIES[0]]
        link(lib / f"lib{PACKAGE}__{name}.so", objects[name], lib, own, [])
    site = Path(sysconfig.get_path("platlib")) / PACKAGE
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(work / PYTHON_BINDINGS / PACKAGE, site, ignore=shutil.ignore_patterns("*.c", "*.o"))
    extension = site / f"{PACKAGE}_s__rosidl_typesupport_c{sysconfig.get_config_var('EXT_SUFFIX')}"
    converters = [f"{package}__{PYTHON_BINDINGS}" for package in DEPENDENCIES]
    link(extension, objects[PYTHON_BINDINGS], lib, list(LIBRARIES), converters)

    shutil.copytree(source, prefix / "share" / PACKAGE, dirs_exist_ok=True)
    (prefix / "share" / PACKAGE / "package.xml").write_text(PACKAGE_XML)
    interfaces = sorted(str(path.relative_to(source)) for path in source.rglob("*.*"))
    index = prefix / "share" / "ament_index" / "resource_index"
    for kind, text in (("packages", ""), ("rosidl_interfaces", "\n".join(interfaces))):
        (index / kind).mkdir(parents=True, exist_ok=True)
        (index / kind / PACKAGE).write_text(text)


def main() -> None:
    prefix, start = Path(sys.prefix), time.monotonic()
    try:
        for compiler in ("cc", "c++"):
            if shutil.which(compiler) is None:
                raise BuildError(f"{compiler} is missing: install a C and a C++ compiler (package build-essential)")
        with tempfile.TemporaryDirectory() as folder:
            generation = Generation(Path(folder), prefix)
            generation.run()
            install(Path(folder), generation.source, compile_objects(Path(folder), prefix), prefix)
    except (BuildError, ImportError, OSError) as error:
        sys.exit(f"tf2_msgs could not be built: {error}")
    print(f"tf2_msgs: generated and compiled in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
