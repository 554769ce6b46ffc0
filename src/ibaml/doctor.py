"""What is installed, found and missing: ``ibaml doctor``."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ibaml.data.files.locate import ENVIRONMENT_VARIABLE, SOURCES, search_folders
from ibaml.data.sources import tiny_imagenet
from ibaml.learner.run_folder import describe_environment

FEATURES: dict[str, str] = {
    "tables": "tables: CSV and Parquet files, DataFrames",
    "formulas": "formulas such as score ~ ses + C(sector)",
    "sklearn": "estimators of scikit-learn",
    "botorch": "posteriors as models of BoTorch",
    "timm": "backbones of timm by name",
    "torchvision": "backbones of torchvision by name",
    "transformers": "text encoders of transformers by name",
    "sentence-transformers": "encoders of sentences by name",
    "peft": "low-rank adapters in backbones",
    "molecules": "features of SMILES by RDKit",
    "onnx": "adapted tasks as ONNX files",
    "processes": "training over several processes",
    "experiments": "what `ibaml reproduce fsmol` and `groups` compare with",
    "playground": "the tab Table of `ibaml playground`",
}
"""What each optional extra is for."""

_PACKAGE = "ibaml"
_DATA = (*SOURCES, tiny_imagenet.ARCHIVE)
_MADE = ("*-v[0-9]*-*.npz", "features/**/*.npz")
"""How files of caches are called: the version of how they are made is in the name."""


class Requirement(NamedTuple):
    """A package with its lower bound, as ``pyproject.toml`` has it.

    Attributes:
        name: Name of the package.
        at_least: Oldest version that does; empty for any.
        extra: The optional extra that it belongs to; empty for what is always needed.
        extras: Extras of the package itself.
    """

    name: str
    at_least: str
    extra: str
    extras: tuple[str, ...]


def parse_requirement(line: str) -> Requirement:
    """Reads a line of the metadata of a package; of its bounds only the lower one.

    Raises:
        ValueError: If it is none.

    Examples:
        >>> parse_requirement('formulaic>=1.1; extra == "formulas"')
        Requirement(name='formulaic', at_least='1.1', extra='formulas', extras=())
        >>> parse_requirement("ibaml[tables]; extra == 'formulas'").extras
        ('tables',)
    """
    found = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?[^;]*?(?:>=\s*([\w.]+))?[^;>]*(?:;(.*))?$", line)
    if found is None:
        raise ValueError(f"{line!r} is no requirement; expected a name with bounds, such as 'torch>=2.11'.")
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", found[4] or "")
    extras = tuple(name.strip() for name in (found[2] or "").split(",") if name.strip())
    return Requirement(found[1], found[3] or "", extra[1] if extra else "", extras)


def missing_of(extra: str, requirements: Sequence[Requirement]) -> list[str]:
    """Returns what an extra needs and is not installed, or too old; ``""``: what is always needed.

    Args:
        extra: Name of the extra.
        requirements: Those of the package, with all of its extras.
    """
    missing: dict[str, None] = {}
    for wanted in (each for each in requirements if each.extra == extra):
        if wanted.name == _PACKAGE:
            missing |= {name: None for other in wanted.extras for name in missing_of(other, requirements)}
        elif (version := _version(wanted.name)) is None:
            missing[wanted.name] = None
        elif _numbers(version) < _numbers(wanted.at_least):
            missing[f"{wanted.name}>={wanted.at_least} (there is {version})"] = None
    return list(missing)


def examine() -> dict[str, Any]:
    """Returns versions, devices, folders and optional features as JSON values."""
    requirements = [parse_requirement(line) for line in metadata.requires(_PACKAGE) or ()]
    environment = describe_environment()
    provided = set(metadata.metadata(_PACKAGE).get_all("Provides-Extra") or ())
    missing = {extra: missing_of(extra, requirements) for extra in FEATURES if extra in provided}
    return {
        "versions": {
            **{_PACKAGE: metadata.version(_PACKAGE), "python": environment["python"]},
            **{each.name: _version(each.name) for each in requirements if not each.extra},
        },
        "platform": environment["platform"],
        "installed_in": str(Path(__file__).parent),
        "missing": missing_of("", requirements),
        "devices": _devices(),
        "folders": [_folder(folder) for folder in search_folders()],
        "features": [
            {
                "extra": extra,
                "for": FEATURES[extra],
                "missing": names,
                "install": f"pip install '{_PACKAGE}[{extra}]'" if names else None,
            }
            for extra, names in missing.items()
        ],
    }


def describe(found: Mapping[str, Any]) -> str:
    """Returns what ``examine`` found as lines to read."""
    versions = dict(found["versions"])
    lines = [
        f"{_PACKAGE} {versions.pop(_PACKAGE)} on Python {versions.pop('python')}, {found['platform']}",
        f"  in {found['installed_in']}",
        "  with " + ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
    ]
    if found["missing"]:
        lines.append(f"  MISSING: {', '.join(found['missing'])}; install it with: pip install --upgrade {_PACKAGE}")
    lines += ["", "Devices"] + [f"  {each['name']}: {each['what']}" for each in found["devices"]]
    lines += ["", f"Folders for data and caches, in the order of search (${ENVIRONMENT_VARIABLE} comes first)"]
    lines += [line for folder in found["folders"] for line in _told(folder)]
    lines += ["", "Optional features"]
    for each in found["features"]:
        state = "ready" if not each["missing"] else f"needs {', '.join(each['missing'])}: {each['install']}"
        lines.append(f"  {each['for']}: {state}")
    return "\n".join(lines)


def _told(folder: Mapping[str, Any]) -> Iterator[str]:
    state = "can be written" if folder["writable"] else "CANNOT BE WRITTEN"
    yield f"  {folder['folder']}: {state}{'' if folder['exists'] else ', not there yet'}"
    if folder["made"]:
        yield f"    made here: {folder['made']} files, {folder['made_bytes'] / 1e6:.1f} MB; they can be removed"
    if folder["data"]:
        yield f"    data: {', '.join(folder['data'])}"


def _devices() -> list[dict[str, str]]:
    """Returns the devices that ``device=`` takes, each with words about it."""
    found = [{"name": "cpu", "what": f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found.append({"name": f"cuda:{index}", "what": what})
    return found


def _folder(folder: Path) -> dict[str, Any]:
    """Returns what there is in a folder of data and caches."""
    made = [path for pattern in _MADE for path in folder.glob(pattern)]
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK),
        "data": [name for name in _DATA if (folder / name).is_file()],
        "made": len(made),
        "made_bytes": sum(path.stat().st_size for path in made),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version, by which releases are ordered."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
