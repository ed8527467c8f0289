"""What a wheel and an sdist hold: python scripts/wheel_content.py CHECKOUT WHEEL SDIST.

The wheel has every file of the four packages, code and data, and no other: no tests, benchmarks or caches. The sdist
has those, what builds them, and no tests either.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = ("tppo", "simulator", "profiling", "analysis")
LARGEST_WHEEL_BYTES = 2 * 2**20
BESIDE = {"LICENSE", "README.md", "pyproject.toml", "MANIFEST.in", "PKG-INFO", "setup.cfg"}


def files_of(checkout: Path) -> set[str]:
    return {
        path.relative_to(checkout).as_posix()
        for package in PACKAGES
        for path in (checkout / package).rglob("*")
        if path.is_file()
    }


def in_the_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def in_the_sdist(path: Path) -> set[str]:
    """Without the folder that all of it is in, and without what setuptools notes."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in (member.name for member in sdist if member.isfile())}
    return {name for name in names if not name.startswith("tppo.egg-info/")}


def faults(checkout: Path, wheel: Path, sdist: Path) -> list[str]:
    wanted = files_of(checkout)
    found = [f"{wheel.name} lacks {name}" for name in sorted(wanted - in_the_wheel(wheel))]
    found += [f"{wheel.name} should not hold {name}" for name in sorted(in_the_wheel(wheel) - wanted)]
    found += [f"{sdist.name} lacks {name}" for name in sorted(wanted - in_the_sdist(sdist))]
    found += [f"{sdist.name} should not hold {name}" for name in sorted(in_the_sdist(sdist) - wanted - BESIDE)]
    if wheel.stat().st_size > LARGEST_WHEEL_BYTES:
        found.append(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {LARGEST_WHEEL_BYTES}")
    return found


def main() -> int:
    checkout, wheel, sdist = map(Path, sys.argv[1:])
    found = faults(checkout, wheel, sdist)
    print("\n".join(found) or f"{wheel.name}: {len(in_the_wheel(wheel))} files, {wheel.stat().st_size / 1000:.0f} kB")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
