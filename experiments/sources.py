"""Where tokens come from: the embedded corpus, your own files, token files, Hugging Face, or made up: passkeys, tasks."""

import glob
import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xattn import ConfigError
from xattn.experiments.data import Corpus, Part
from xattn.experiments.passkey import VOCABULARY, passkey_corpus
from xattn.experiments.record import read_json, say, write_json
from xattn.experiments.schema import DataConfig
from xattn.experiments.tasks import Task, ids_of
from xattn.experiments.tokenise import VOCABULARIES, Tokeniser, encode_part, tokeniser_for

CORPORA = Path(__file__).resolve().parent / "corpora"
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_TOKEN_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")
_PASSKEY_TOKENS = 2_000_000
_OFFLINE = "without a network use data=shakespeare, or data=text with files of your own"


def vocabulary_of(data: DataConfig) -> int | None:
    """How many ids the configured tokens can have; None where only the model's own flag can say.

    Raises:
        ConfigError: a token file's meta.json that is not one.
    """
    if data.source == "passkey":
        return VOCABULARY
    if data.source == "task":
        return ids_of(data.task)
    if data.source != "bin":
        return data.vocab_size if data.tokenizer == "bpe" else VOCABULARIES[data.tokenizer]
    meta = read_json(Path(str(data.path)) / "meta.json")
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ConfigError(f"{data.path}/meta.json: vocab_size {size!r} is no count; write how many ids there are")
    return size


def check_files(data: DataConfig) -> None:
    """Raise ConfigError for files that are not there or cannot be opened: before any work, and not by a worker."""
    if data.source == "text":
        _find(str(data.path))
        if data.val_path is not None:
            _find(data.val_path, name="data.val_path")
    if data.source == "bin":
        _token_files(data)


def load_corpus(data: DataConfig) -> Corpus:
    """Read and tokenise the configured source.

    Raises:
        ConfigError: the source is missing, empty, cannot be decoded, or needs a network that is not there.
    """
    if data.source == "bin":
        return _token_files(data)
    if data.source == "passkey":
        return passkey_corpus(tokens=data.max_train_tokens or _PASSKEY_TOKENS, passage=data.passage_tokens)
    if data.source == "task":
        task, none = Task(config=data.task.settled()), Part(ids=np.zeros(0, dtype=np.int64))
        named = {"name": data.task.name, "tokenizer": data.task.name, "vocabulary": task.vocabulary}
        return Corpus(**named, train=none, val=none, token_bytes=None, task=task)
    if data.source == "shakespeare":
        name, train, val = "Tiny Shakespeare", [(CORPORA / "tinyshakespeare.txt").read_bytes()], None
    elif data.source == "text":
        name, train = str(data.path), read_documents(str(data.path), field=data.text_field)
        val = read_documents(data.val_path, field=data.text_field, name="data.val_path") if data.val_path is not None else None
    else:
        name, train, val = str(data.path), *_hugging_face(data)
    if val is None:
        train, val = split_off(train, data.val_fraction)
    return _tokenised(data, name, train, val)


def read_documents(pattern: str, *, field: str = "text", name: str = "data.path") -> list[bytes]:
    """The documents of a file or a glob: a .jsonl line is one (its `field`), any other file is one; .gz and .xz are read.

    Raises:
        ConfigError: nothing there, not readable, or a line without the field; `name` is the field that named the files.
    """
    documents = []
    for path in _find(pattern, name=name):
        opener = _OPENERS.get(path.suffix, open)
        stem = path.with_suffix("") if path.suffix in _OPENERS else path
        try:
            with opener(path, "rb") as file:
                documents += _json_lines(file, path, field) if stem.suffix == ".jsonl" else [file.read()]
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise _unreadable(name, path, error) from None
    return [document for document in documents if document]


def _find(pattern: str, *, name: str = "data.path") -> list[Path]:
    """The files of a path or a glob, each of which can be opened."""
    paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    if not paths:
        raise ConfigError(f"{name}={pattern} matches no file; use the path of a text file or a glob that finds some")
    for path in map(Path, paths):
        try:
            path.open("rb").close()
        except OSError as error:
            raise _unreadable(name, path, error) from None
    return [Path(path) for path in paths]


def _unreadable(name: str, path: Path, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"{name}={path} cannot be read: {why}; use the path of a text file")


def _json_lines(file: Any, path: Path, field: str) -> list[bytes]:
    documents = []
    for number, line in enumerate(file, start=1):
        try:
            documents.append(json.loads(line)[field].encode("utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"line {number} of {path} is no JSON object with a text in '{field}'; use data.text_field=NAME"
            ) from None
    return documents


def split_off(documents: list[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents: the last `fraction` of the bytes, cut inside a document only if there is one."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1.0 - fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    held, wanted = 0, fraction * sum(map(len, documents))
    place = len(documents)
    while place > 1 and held < wanted:
        place -= 1
        held += len(documents[place])
    return documents[:place], documents[place:]


def _tokenised(data: DataConfig, name: str, train: list[bytes], val: list[bytes]) -> Corpus:
    if not any(train) or not any(val):
        raise ConfigError(f"{name} is empty; give a text with something to train and something to judge on")
    folder = _cache(data) / _key(data, train, val)
    try:
        tokeniser = tokeniser_for(data, train, folder)

        def part(label: str, documents: list[bytes]) -> Part:
            if data.tokenizer == "bytes":
                return encode_part(tokeniser, documents, mask=data.document_mask)
            return _cached(tokeniser, documents, folder / label, mask=data.document_mask)

        parts = {"train": part("train", train), "val": part("val", val)}
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"the tokenised text cannot be kept in {folder} ({error.strerror}); use data.cache=FOLDER") from None
    if data.max_train_tokens is not None:
        parts["train"] = _first(parts["train"], data.max_train_tokens)
    return Corpus(
        name=name,
        tokenizer=tokeniser.name,
        vocabulary=tokeniser.vocabulary,
        token_bytes=tokeniser.token_bytes,
        decode=tokeniser.decode,
        encode=tokeniser.encode,
        **parts,
    )


def _first(part: Part, tokens: int) -> Part:
    starts = None if part.starts is None else part.starts[part.starts < tokens]
    return Part(ids=part.ids[:tokens], starts=starts)


def _cached(tokeniser: Tokeniser, documents: list[bytes], path: Path, *, mask: bool) -> Part:
    """Tokens from the cache, or made and put there: a BPE reads half a megabyte a second."""
    starts_path, ids_path = path.with_suffix(".starts.npy"), path.with_suffix(".npy")
    if not ids_path.exists():
        say(f"tokenising {sum(map(len, documents)) / 1e6:.1f} MB ({tokeniser.name}) into {path.parent}")
        made = encode_part(tokeniser, documents, mask=True)
        _save_array(starts_path, np.zeros(0, dtype=np.int64) if made.starts is None else made.starts)
        # Written last: where it exists, the other one does too.
        _save_array(ids_path, made.ids)
    starts = np.load(starts_path)
    return Part(ids=np.load(ids_path, mmap_mode="r"), starts=starts if mask and len(starts) else None)


def _save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npy")
    np.save(temporary, array)
    os.replace(temporary, path)


def _cache(data: DataConfig) -> Path:
    if data.cache is not None:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xattn"


def _key(data: DataConfig, train: list[bytes], val: list[bytes]) -> str:
    digest = hashlib.blake2b(f"{data.tokenizer} {data.vocab_size}".encode(), digest_size=12)
    if data.tokenizer != "bytes":
        for document in [*train, b"\x00val\x00", *val]:
            digest.update(len(document).to_bytes(8, "little") + document)
    return digest.hexdigest()


def _token_files(data: DataConfig) -> Corpus:
    """nanoGPT's train.bin and val.bin (uint16, or what meta.json says), with meta.json {vocab_size, dtype, tokenizer}."""
    folder = Path(str(data.path))
    meta = read_json(folder / "meta.json")
    meta = meta if isinstance(meta, dict) else {}
    # Only plain integers: of a dtype of objects, the bytes of the file would be taken for addresses.
    if meta.get("dtype", "uint16") not in _TOKEN_TYPES:
        raise ConfigError(f"{folder}/meta.json: dtype {meta['dtype']!r} is not known; use one of {', '.join(_TOKEN_TYPES)}")
    kind = np.dtype(meta.get("dtype", "uint16"))
    parts = {}
    for label in ("train", "val"):
        path = folder / f"{label}.bin"
        if not path.is_file() or path.stat().st_size < kind.itemsize:
            raise ConfigError(f"data.path={folder} has no tokens in {label}.bin; write uint16 ids there as nanoGPT does")
        parts[label] = Part(ids=np.memmap(path, dtype=kind, mode="r"))
    if data.max_train_tokens is not None:
        parts["train"] = _first(parts["train"], data.max_train_tokens)
    token_bytes = np.array(meta["token_bytes"]) if "token_bytes" in meta else None
    return Corpus(
        name=folder.name,
        tokenizer=str(meta.get("tokenizer", "unknown")),
        vocabulary=int(meta.get("vocab_size", 0)),
        token_bytes=token_bytes,
        **parts,
    )


def write_token_files(corpus: Corpus, folder: Path) -> None:
    """Write a corpus as train.bin, val.bin and meta.json, to be read again with data.source=bin."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if corpus.vocabulary <= 2**16 else np.uint32
    for label, part in (("train", corpus.train), ("val", corpus.val)):
        part.ids.astype(kind).tofile(folder / f"{label}.bin")
    token_bytes = {} if corpus.token_bytes is None else {"token_bytes": corpus.token_bytes.tolist()}
    meta = {"vocab_size": corpus.vocabulary, "dtype": np.dtype(kind).name, "tokenizer": corpus.tokenizer}
    write_json(folder / "meta.json", meta | token_bytes)


def _hugging_face(data: DataConfig) -> tuple[list[bytes], list[bytes] | None]:
    """Documents of a data set, streamed until there are enough for max_train_tokens."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data.source=hf needs datasets; pip install 'xattn[data]', or {_OFFLINE}") from None
    if data.max_train_tokens is None:
        raise ConfigError("data.source=hf streams, and needs data.max_train_tokens to know when to stop")
    try:
        stream = datasets.load_dataset(data.path, data.hf_config, split="train", streaming=True)
        documents, size, longest = [], 0, 0
        # No tokeniser here makes a token of more than five bytes on average; what is held out comes on top, and it is whole
        # documents: up to one more than its share.
        wanted = data.max_train_tokens * (1 if data.tokenizer == "bytes" else 5)
        for row in stream:
            documents.append(_text_of(row, data))
            size, longest = size + len(documents[-1]), max(longest, len(documents[-1]))
            if size * (1.0 - data.val_fraction) - longest >= wanted:
                break
    except ConfigError:
        raise
    except Exception as error:  # the hub raises a dozen kinds for a missing network, name or permission
        first = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(f"data set {data.path} cannot be had ({type(error).__name__}: {first}); {_OFFLINE}") from None
    return documents, None


def _text_of(row: dict[str, Any], data: DataConfig) -> bytes:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if isinstance(row.get(data.text_field), str):
        return row[data.text_field].encode("utf-8")
    why = f"holds {type(row[data.text_field]).__name__}, not text" if data.text_field in row else "is not there"
    none = f"none of its columns ({', '.join(row)}) is text; use another data set"
    cure = f"use data.text_field={' or '.join(texts)}" if texts else none
    raise ConfigError(f"{data.path}: column '{data.text_field}' {why}; {cure}")
