"""What `.venv` holds and whether it is up to date: streamconv in place, one extra, tested versions."""

import argparse
import hashlib
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "tools/constraints.txt")


def digest(root: Path, extra: str) -> str:
    """Return what a finished installation of `extra` is stamped with: it changes when the environment should.

    The path is part of it because an environment that was moved holds the old one.
    """
    whole = hashlib.sha256(f"{root}\n{extra}\n".encode())
    for name in SOURCES:
        whole.update((root / name).read_bytes())
    return whole.hexdigest()


def is_ready(root: Path, extra: str) -> bool:
    """Whether `.venv` was installed with `extra` from these very settings, and its interpreter still exists."""
    stamp = stamp_path(root, extra)
    return interpreter(root).exists() and stamp.is_file() and stamp.read_text() == digest(root, extra)


def install(root: Path, extra: str) -> None:
    """Create `.venv` where needed and install streamconv from `root` with `extra`; stamp it only when all went well."""
    stamp_path(root, extra).unlink(missing_ok=True)
    if not (root / ".venv/bin/pip").exists() or not interpreter(root).exists():
        venv.create(root / ".venv", clear=True, with_pip=True)
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    pip = [str(interpreter(root)), "-m", "pip", "install", "--disable-pip-version-check", *quiet]
    constraint = ["--constraint", str(root / "tools/constraints.txt")]
    subprocess.run([*pip, *constraint, "--editable", f"{root}[{extra}]"], check=True)
    stamp_path(root, extra).write_text(digest(root, extra))


def interpreter(root: Path) -> Path:
    return root / ".venv/bin/python"


def stamp_path(root: Path, extra: str) -> Path:
    return root / ".venv" / f"ready-{extra}"


def known_extras(root: Path) -> list[str]:
    with (root / "pyproject.toml").open("rb") as file:
        return sorted(tomllib.load(file)["project"]["optional-dependencies"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/setup", description=__doc__)
    parser.add_argument("extra", nargs="?", default="eval", choices=known_extras(ROOT))
    extra = parser.parse_args().extra
    if is_ready(ROOT, extra):
        return
    started = time.monotonic()
    print(f"Installing streamconv[{extra}] into .venv (a minute or two the first time) ...", flush=True)
    try:
        install(ROOT, extra)
    except subprocess.CalledProcessError as failed:
        sys.exit(
            f"pip could not install streamconv[{extra}] (exit {failed.returncode}); its message is above."
        )
    print(f"... done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
