"""One record per measurement, appended to a JSON Lines file.

Tables, plots and model cards are generated from these records and from nothing else.
"""

import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


PACKAGES = (
    "jcdp-diffusers",
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "datasets",
    "transformers",
    "huggingface_hub",
    "numpy",
    "pillow",
    "pyarrow",
    "scikit-learn",
)

# Settings that came after the first records, and what was meant by those that do not have them.
LATER = {"noise_corner": 0.0, "protection_guidance_scale": 0.0, "protection": None}


def as_settings(config: Any) -> dict:
    """
    A dataclass of settings as records hold it.

    A setting that came after the first records is left out at the value that was meant before, so that whatever is
    named by its settings keeps its name. So in the dataclasses that it holds.
    """
    return without_later(dataclasses.asdict(config))


def without_later(value: Any) -> Any:
    """Settings without those of `LATER` at the value that was meant before, at any depth."""
    if not isinstance(value, dict):
        return value
    return {name: without_later(entry) for name, entry in value.items() if name not in LATER or entry != LATER[name]}


def append_record(
    path: str | os.PathLike,
    *,
    what: str,
    value: Any,
    seed: int | None,
    protocol: str,
    settings: Mapping[str, Any],
    device: str,
    seconds: float,
) -> dict:
    """Append one measurement to a JSON Lines file and return the record as it was written.

    Any number of processes may append to one file: each record is one write under a lock. A last line that a crash
    cut short makes way for the next record.

    Args:
        path: the file, made with its folder if needed.
        what: name of the measured quantity, for example "accuracy".
        value: the figure, or a list or dict of figures; finite.
        seed: seed of the repetition; None for what has none.
        protocol: name of the recipe; "smoke" marks a figure that is no evidence.
        settings: whatever else decides the value; strings, numbers, lists and dicts.
        device: in words, for example "cpu" or "cuda (NVIDIA H100)".
        seconds: what the measurement took.

    Returns:
        the arguments, plus `packages`, `commit` (that of the package's git checkout, with "-dirty" appended where the
        files differ from it; None outside a checkout) and `time` (UTC, ISO 8601).
    """
    for name, text in (("what", what), ("protocol", protocol), ("device", device)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} is {text!r}; a string that is not empty is accepted.")
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings is {settings!r}; a dict is accepted.")
    record = {
        "what": what,
        "value": plain(value, "value"),
        "seed": plain(seed, "seed"),
        "protocol": protocol,
        "settings": plain(settings, "settings"),
        "packages": package_versions(),
        "device": device,
        "seconds": plain(seconds, "seconds"),
        "commit": code_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    _append_line(Path(path), json.dumps(record, ensure_ascii=False, allow_nan=False))
    return record


def code_version() -> str | None:
    """The commit of the package's git checkout, with "-dirty" where the files differ from it; None outside one."""
    return _commit(Path(__file__).resolve().parents[1])


def read_records(path: str | os.PathLike) -> list[dict]:
    """All records of a JSON Lines file, in the order written.

    A last line that a crash cut short, or that is just being written, is no record yet and left out with a warning.

    Raises:
        ValueError: a line is no record; the sentence names the file and the line.
    """
    records = []
    content = Path(path).read_bytes()
    whole = _whole(content)
    if whole < len(content):
        warnings.warn(f"{os.fspath(path)} ends in a line that was cut short, which is left out.", stacklevel=2)
    for number, line in enumerate(content[:whole].split(b"\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # JSONDecodeError, or bytes that are no UTF-8
            raise ValueError(f"{os.fspath(path)}, line {number}, is no JSON record: {error}.") from error
        if not isinstance(record, dict) or not {"what", "value"} <= record.keys():
            raise ValueError(
                f"{os.fspath(path)}, line {number}, is no record: an object with what and value is accepted."
            )
        records.append(record)
    return records


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a figure; None where one is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


@functools.cache
def _version(package: str) -> str | None:
    """Every record has the versions, and looking them up reads a file for each."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def summarise(records: Iterable[Mapping], by: Sequence[str] = ("what", "protocol", "settings")) -> list[dict]:
    """Mean and spread over seeds, one row per group, in the order in which the groups first appear.

    Of several records that agree in the group, the seed and the settings, the last counts: it is a repetition of the
    same measurement. Records of one group and seed with different settings are refused: their mean would mean nothing.

    Args:
        by: fields of a record that name a group; "settings.width" is one setting.

    Returns:
        dicts of the fields in `by`, `mean`, `std` (sample standard deviation, None for a single value), `n`, `values`.
    """
    groups: dict[str, dict[str, Mapping]] = {}
    for record in records:
        value = record["value"]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"records has the value {value!r} for {record['what']!r}; numbers are accepted.")
        group = groups.setdefault(_key([_field(record, name) for name in by]), {})
        earlier = group.get(_key(record.get("seed")))
        if earlier is not None and earlier.get("settings") != record.get("settings"):
            raise ValueError(
                f"by is {tuple(by)}, which puts different settings with seed {record.get('seed')} into one group of "
                f"{record['what']!r}; fields that tell them apart are accepted."
            )
        group[_key(record.get("seed"))] = record
    rows = []
    for group in groups.values():
        values = [float(record["value"]) for record in group.values()]
        first = next(iter(group.values()))
        rows.append(
            {name: _field(first, name) for name in by}
            | {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
                "values": values,
            }
        )
    return rows


def _field(record: Mapping, name: str) -> Any:
    for part in name.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def plain(value: Any, name: str) -> Any:
    """
    A value in JSON's own types, as it would be after writing and reading it.

    Args:
        value: Numbers, strings, NumPy arrays, and dicts, lists and tuples of them.
        name (`str`): What the value is called in errors.

    Raises:
        ValueError: If a number is not finite, or there is something else in it.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; finite numbers are accepted.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{name}[{index}]") for index, entry in enumerate(value)]
    raise ValueError(f"{name} is a {type(value).__name__}; strings, numbers, lists and dicts are accepted.")


def _append_line(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A link in its place would lead to another file.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        text = line.encode() + b"\n"
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            whole = _whole(os.pread(descriptor, size, 0))
            if whole < size:
                os.ftruncate(descriptor, whole)
                size = whole
            else:
                text = b"\n" + text  # a record whose end of line an editor has dropped
        written = os.write(descriptor, text)
        if written != len(text):
            os.ftruncate(descriptor, size)
            raise OSError(f"path {str(path)!r} took {written} of {len(text)} bytes; the disk is probably full.")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)  # and with it the lock


def whole_records(content: bytes) -> bytes:
    """A file's content without a last line that was cut short."""
    return content[: _whole(content)]


def _whole(content: bytes) -> int:
    """How many bytes of a file are before a last line that was cut short."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:] or b"{}")
    except ValueError:
        return end
    return len(content)


@functools.cache
def _commit(checkout: Path) -> str | None:
    """HEAD of `checkout`, "-dirty" when files differ; None when `checkout` is not the top of a git checkout."""
    if shutil.which("git") is None:
        return None
    # Within a git hook these variables point at the repository that runs the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, env=environment, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    commit = git("rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != checkout:
        return None  # an installed copy, perhaps inside somebody else's repository
    # Records are what a run leaves behind; they do not make it another program.
    changes = git("status", "--porcelain", "--", ".", ":(exclude)results")
    return commit if changes == "" else f"{commit}-dirty"
