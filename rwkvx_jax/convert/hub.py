"""Checkpoints of the Hugging Face Hub: hf://org/name[@revision][/file].

Files come through huggingface_hub into its cache, by its settings (HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE). The cache names a file's content by a hash, which is computed anew each time that
the file is used. Where the Hub can't be reached, files that are in the cache are used.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from rwkvx_jax.convert.directory import CONFIG_FILE
from rwkvx_jax.convert.files import INDEX, checkpoint_among, read_index
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.convert.vocabulary import TOKENIZER_FILE, VOCABULARY_FILES
from rwkvx_jax.storage import one_line

_log = logging.getLogger(__name__)

_FORM = "hf://org/name[@revision][/file]"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?", re.ASCII)
_OTHER_KINDS = ("datasets/", "spaces/", "buckets/")
_LOG_IN = "log in (`hf auth login`, or HF_TOKEN in the environment)"
_SHA256, _SHA1 = (2 * hashlib.new(name).digest_size for name in ("sha256", "sha1"))  # hex digits
_BLOCK = 1 << 20
_SHOWN = 20


class Address(NamedTuple):
    """A place of the Hub."""

    repo: str  # org/name
    revision: str  # a branch, a tag or a commit
    file: str  # within the repository; "" for the repository


def hub_address(path: str | os.PathLike) -> Address:
    """The parts of hf://org/name[@revision][/file]; a slash in a revision is written %2F.

    Raises:
      ConversionError: of another form.
    """
    text = os.fspath(path)
    match = _ADDRESS.fullmatch(text)
    file = (match[3] or "") if match else ""
    revision = unquote(match[2] or "main") if match else ""
    if match is None or {"..", "."} & {*file.split("/"), *revision.split("/")}:
        raise ConversionError(f"{text}: expected {_FORM}")
    if match[1].startswith(_OTHER_KINDS):
        raise ConversionError(f"{text}: only repositories of models hold checkpoints: {_FORM}")
    return Address(match[1], revision, file)


def fetch(path: str | os.PathLike) -> Path:
    """Brings a checkpoint of the Hub into the Hub's cache on this machine.

    Args:
      path: hf://org/name[@revision][/file].

    Returns:
      Its file, or without one in `path` the directory with the repository's only checkpoint, its
      config.json and its tokenizer. Both belong to the cache and must not be written.

    Raises:
      ConversionError: huggingface_hub is missing; no such repository, revision or file, or no
        access to it; no network and no copy in the cache; several checkpoints; a file that is
        damaged.
    """
    return _Fetch(path).run()


class _Fetch:
    """One call of `fetch`."""

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._address = hub_address(path)
        self._commit = ""  # of the revision, as soon as it is known
        self._offline = False
        try:
            import huggingface_hub.constants
            import huggingface_hub.errors

            self._hub: Any = huggingface_hub
        except ImportError as error:
            raise ConversionError(
                f'{self._path} needs huggingface_hub: pip install "rwkvx-jax[hub]" ({error})'
            ) from error

    def run(self) -> Path:
        names = self._names()
        wanted, described = self._address.file, []
        if not wanted:
            wanted = self._chosen(names)
            described = [
                name
                for name in names
                if name in (CONFIG_FILE, TOKENIZER_FILE)
                or fnmatch.fnmatchcase(name, VOCABULARY_FILES)
            ]
        for name in described:
            self._get(name, names)
        file = self._get(wanted, names)
        if wanted.endswith(INDEX):
            for shard in sorted(set(read_index(file).values())):
                self._get(str(PurePosixPath(wanted).with_name(shard)), names)
        return file if self._address.file else file.parent

    def _chosen(self, names: list[str]) -> str:
        try:
            return checkpoint_among(names, self._path)
        except ConversionError as error:
            if not self._offline:
                raise
            raise ConversionError(
                f"{error} (by its copy in the cache, which may lack files)"
            ) from error

    def _names(self) -> list[str]:
        """All files of the repository; where the Hub can't be reached, those in the cache."""
        repo, revision, _ = self._address
        try:
            timeout = self._hub.constants.HF_HUB_ETAG_TIMEOUT
            info = self._hub.HfApi().model_info(repo, revision=revision, timeout=timeout)
        except Exception as error:  # its HTTP clients raise what derives from Exception alone
            if (refusal := self._refusal(error)) is not None:
                raise ConversionError(f"{self._path}: {refusal}") from error
            names = self._cached_names()
            if not names:
                raise ConversionError(
                    f"{self._path} is not in the cache, and {self._unreachable(error)}"
                ) from error
            self._offline = True
            _log.warning(
                "%s; using the copy of %s in the cache (commit %s)",
                self._unreachable(error),
                self._path,
                self._commit,
            )
            return names
        self._commit = info.sha
        return sorted(sibling.rfilename for sibling in info.siblings)

    def _cached_names(self) -> list[str]:
        repo, revision, _ = self._address
        cache = Path(self._hub.constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
        reference = cache / "refs" / revision
        self._commit = reference.read_text().strip() if reference.is_file() else revision
        snapshot = cache / "snapshots" / self._commit
        found = sorted(file for file in snapshot.rglob("*") if file.is_file())
        return [file.relative_to(snapshot).as_posix() for file in found]

    def _get(self, name: str, names: list[str]) -> Path:
        """A file in the cache, of the commit that was listed and with the content of its hash."""
        if name not in names:
            place = "the copy in the cache" if self._offline else "the repository"
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ConversionError(f"{self._path}: {place} has no file {name}, only {shown}")
        repo, revision, _ = self._address
        try:
            file = self._hub.hf_hub_download(
                repo, name, revision=revision, local_files_only=self._offline
            )
        except Exception as error:
            cause = error.__cause__ or error
            told = self._refusal(error) or self._refusal(cause) or self._unreachable(cause)
            raise ConversionError(f"{self._path}: {name} can't be fetched: {told}") from error
        file = Path(file)
        if file.parents[name.count("/")].name != self._commit:
            raise ConversionError(
                f"{self._path}: {name} comes from another commit than {self._commit}: the "
                "repository changed meanwhile, or the Hub failed; try again"
            )
        _check_content(file)
        return file

    def _refusal(self, error: BaseException) -> str | None:
        """What a definite answer of the Hub means; None for one that says nothing of the place."""
        errors = self._hub.errors
        repo, revision, _ = self._address
        endpoint = self._hub.constants.ENDPOINT
        if isinstance(error, errors.GatedRepoError):
            return f"access is restricted: accept the terms at {endpoint}/{repo} and {_LOG_IN}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{endpoint} has no repository {repo}, or it is private: check the name, or "
                f"{_LOG_IN}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"the repository has no revision {revision!r}"
        if isinstance(error, errors.HFValidationError):
            return f"no name of a repository ({one_line(error)})"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return f"{endpoint} refuses access ({status}): {_LOG_IN}"
        return None

    def _unreachable(self, error: BaseException) -> str:
        endpoint = self._hub.constants.ENDPOINT
        if isinstance(error, self._hub.errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids to ask the Hub"
        return f"{endpoint} can't be reached or failed ({one_line(error)})"


def _check_content(file: Path) -> None:
    """Raises ConversionError if a cached file has not the content that its place is named by.

    The cache keeps contents under their SHA-256, small ones under their hash in Git, and links to
    them; where a file system has no links the hash is not known.
    """
    blob = file.parent / os.readlink(file) if file.is_symlink() else file
    expected = blob.name
    if not re.fullmatch(rf"[0-9a-f]{{{_SHA1}}}|[0-9a-f]{{{_SHA256}}}", expected):
        return
    try:
        if len(expected) == _SHA256:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
        with blob.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror or error}") from error
    if digest.hexdigest() != expected:
        raise ConversionError(
            f"{file} is damaged: its content has another hash than the Hub gave; remove "
            f"{blob.resolve()} and try again"
        )
