"""The baseq program in a Python environment. It is C++ and takes nothing from Python but its place.

    baseq quantize MODEL          on the command line
    baseq.prefix()                for CMake: -DCMAKE_PREFIX_PATH=$(python -c "import baseq; print(baseq.prefix())")
"""

import importlib.util
import os
import sys
from pathlib import Path


def prefix() -> Path:
    """The folder that holds bin/, include/, lib/ and share/."""
    return Path(__file__).resolve().parent


def main() -> None:
    """Becomes the program."""
    program = prefix() / "bin" / "baseq"
    environment = dict(os.environ)
    # The program looks for torch beside itself. One of another folder, as of the system under a user's, is named to it.
    if not (prefix().parent / "torch" / "lib").is_dir():
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            sys.exit("baseq: torch is not installed; pip install torch")
        folders = [str(Path(torch.submodule_search_locations[0]) / "lib"), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, folders))
    os.execve(program, ["baseq", *sys.argv[1:]], environment)
