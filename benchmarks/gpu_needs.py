"""What Triton needs of a machine to run kernels on its GPU, said in one sentence each where it is missing.

    python3 benchmarks/gpu_needs.py

Triton builds the code that launches its kernels with the machine's C compiler and Python.h, when it launches the first.
The last line is the verdict; the exit code is 1 if something is missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

READY = "all that Triton needs is here"


def compiler() -> str | None:
    """As Triton looks for it."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def headers() -> str:
    """The folder in which Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]


def missing() -> list[str]:
    """Sentences: what is missing, and how to get it."""
    found = []
    for name in ("torch", "triton"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed for {sys.executable}: pip install {name}")
    cc = compiler()
    if cc is None:
        found.append(
            "Triton needs a C compiler to launch kernels and finds none: apt-get install gcc, or set CC to one"
        )
        return found
    if not os.path.exists(os.path.join(headers(), "Python.h")):
        version = "{}.{}".format(*sys.version_info)
        found.append(
            f"Triton needs Python.h to launch kernels and {headers()} has none: apt-get install python{version}-dev"
        )
        return found
    command = [cc, "-x", "c", "-fsyntax-only", f"-I{headers()}", "-"]
    try:
        tried = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
        said = tried.stderr.strip() if tried.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        found.append(f"{cc} does not compile what includes Python.h, which Triton does: {said.splitlines()[0]}")
    return found


def main() -> int:
    for name in ("torch", "triton"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: none")
    print(f"Python {platform.python_version()}, headers in {headers()}; C compiler {compiler() or 'none'}")
    found = missing()
    print("; ".join(found) or READY)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
