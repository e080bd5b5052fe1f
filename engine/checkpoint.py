"""Where a checkpoint comes from: a local folder, or one commit of a Hugging Face repository.

Knows nothing of what is in the files, and needs no torch.
"""

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from engine.config import CheckpointError

ADAPTER = "linear_spec_lora"  # the folder of the draft adapter, inside a checkpoint's
PINNED = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")
UNPINNED = re.compile(r"[\w.-]+/[\w.-]+(@[^/]*)?")
# Only what is read as data. Never Python files, pickles or other formats that can carry code.
TEXT_FILES = ("*.json", "*.jinja")
WEIGHT_FILES = ("model*.safetensors", f"{ADAPTER}/*.safetensors")
MODEL_FILES = ("config.json", "model*.json", f"{ADAPTER}/adapter_config.json", *WEIGHT_FILES)

SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file of tensors, what its fingerprint reads
HEADER_BYTES = 100_000_000  # the most that safetensors allows


def local_folder(checkpoint: str, weights: bool = True) -> Path:
    """The folder of a checkpoint that is named by its path or as `org/name@commit`; the latter is downloaded into
    Hugging Face's cache unless it is there already. Without `weights` its tensors are left out.

    Every process calls this for itself: on another machine the cache has another path. Raises CheckpointError.
    """
    folder = Path(checkpoint)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(f"no such checkpoint folder: {error.strerror}") from error
    pinned = PINNED.fullmatch(checkpoint)
    if pinned:
        patterns = TEXT_FILES + WEIGHT_FILES if weights else TEXT_FILES
        return _download(pinned["repository"], pinned["commit"], patterns)
    if UNPINNED.fullmatch(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: no such checkpoint folder; one on Hugging Face is named with its commit, since a branch "
            "can change: org/name@<40 hexadecimal digits>"
        )
    raise CheckpointError(f"{folder}: no such checkpoint folder")


def fingerprint(folder: Path) -> str:
    """What tells checkpoints apart without reading them whole, in hexadecimal: a hash of what a model is made from, the
    JSON files whole, and of tensor files the sizes, headers and evenly spread samples. Two that differ in a few
    numbers only may look alike. Raises CheckpointError for a file that cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            with path.open("rb") as file:
                if path.suffix == ".json":
                    digest.update(file.read())
                else:
                    _sample(file, size, digest)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int, digest: "hashlib.blake2b") -> None:
    """Adds a tensor file's header and samples of its data to the digest."""
    header = 8 + min(int.from_bytes(file.read(8), "little"), HEADER_BYTES)
    file.seek(0)
    digest.update(file.read(header))
    room = max(0, size - header - SAMPLE_BYTES)
    for index in range(SAMPLES):
        file.seek(header + room * index // (SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))


def short_name(checkpoint: str) -> str:
    """What clients may call it: `org/name`, or the folder's name."""
    pinned = PINNED.fullmatch(checkpoint)
    return pinned["repository"] if pinned else Path(checkpoint).resolve().name


def _download(repository: str, commit: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # not at the top: local checkpoints do without it

    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=list(patterns)))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: Hugging Face's native downloader
        raise CheckpointError(f"cannot download {repository}@{commit}: {error}") from error
