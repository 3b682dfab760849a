"""Texts to tokens: bytes (nothing to train or install), a byte-level BPE trained on the corpus, or GPT-2's.

Documents end in a separator token, which stands for no bytes of text: byte 0, or <|endoftext|>.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xattn import ConfigError
from xattn.experiments.data import Part
from xattn.experiments.record import say
from xattn.experiments.schema import DataConfig

SEPARATOR = "<|endoftext|>"
VOCABULARIES = {"bytes": 256, "gpt2": 50_257}
_BPE_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Tokeniser:
    """`encode` turns one document into ids, without its separator; `decode` turns ids back into text."""

    name: str
    vocabulary: int
    separator: int
    token_bytes: np.ndarray
    encode: Callable[[bytes], np.ndarray]
    decode: Callable[[np.ndarray], str]


def tokeniser_for(data: DataConfig, train: Iterable[bytes], folder: Path) -> Tokeniser:
    """The configured tokeniser; a BPE is trained on `train` unless `folder` holds one trained before.

    Raises:
        ConfigError: its package is not installed, or its vocabulary cannot be had.
    """
    if data.tokenizer == "bytes":
        return _bytes()
    return _bpe(data, train, folder) if data.tokenizer == "bpe" else _gpt2()


def encode_part(tokeniser: Tokeniser, documents: list[bytes], *, mask: bool) -> Part:
    """All documents in one row, each followed by the separator; a single document stays as it is.

    Args:
        mask: keep where documents start, so that attention and positions can stop there.
    """
    if len(documents) == 1:
        return Part(ids=tokeniser.encode(documents[0]))
    pieces, starts, length = [], [], 0
    separator = np.array([tokeniser.separator])
    for document in documents:
        ids = tokeniser.encode(document)
        pieces += [ids, separator.astype(ids.dtype)]
        starts.append(length)
        length += len(ids) + 1
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint8)
    return Part(ids=ids, starts=np.array(starts, dtype=np.int64) if mask and starts else None)


def _bytes() -> Tokeniser:
    token_bytes = np.ones(256, dtype=np.int64)
    token_bytes[0] = 0
    return Tokeniser(
        name="bytes",
        vocabulary=256,
        separator=0,
        token_bytes=token_bytes,
        encode=lambda text: np.frombuffer(text, dtype=np.uint8),
        decode=lambda ids: bytes(ids.tolist()).decode("utf-8", errors="replace"),
    )


def _bpe(data: DataConfig, train: Iterable[bytes], folder: Path) -> Tokeniser:
    tokenizers = _package("tokenizers", "data.tokenizer=bpe")
    path = folder / _BPE_FILE
    if not path.exists():
        say(f"training a BPE of {data.vocab_size} tokens")
        built = tokenizers.ByteLevelBPETokenizer()
        texts = (text.decode("utf-8", errors="replace") for text in train)
        built.train_from_iterator(
            texts, vocab_size=data.vocab_size, min_frequency=2, special_tokens=[SEPARATOR], show_progress=False
        )
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when whole: another run may be looking for it.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        built.save(str(temporary))
        os.replace(temporary, path)
    loaded = tokenizers.Tokenizer.from_file(str(path))
    vocabulary = loaded.get_vocab()
    # In the byte-level alphabet one character stands for one byte.
    token_bytes = np.zeros(data.vocab_size, dtype=np.int64)
    for token, number in vocabulary.items():
        token_bytes[number] = 0 if token == SEPARATOR else len(token)

    def encode(text: bytes) -> np.ndarray:
        ids = loaded.encode(text.decode("utf-8", errors="replace")).ids
        return np.array(ids, dtype=np.uint16 if data.vocab_size <= 2**16 else np.uint32)

    return Tokeniser(
        name=f"bpe {data.vocab_size}",
        vocabulary=data.vocab_size,
        separator=vocabulary[SEPARATOR],
        token_bytes=token_bytes,
        encode=encode,
        decode=lambda ids: loaded.decode(ids.tolist(), skip_special_tokens=False),
    )


def _gpt2() -> Tokeniser:
    tiktoken = _package("tiktoken", "data.tokenizer=gpt2")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' and the cache's own errors alike mean that there is no vocabulary
        raise ConfigError(
            f"GPT-2's vocabulary cannot be fetched ({type(error).__name__}); without a network use "
            "data.tokenizer=bytes or data.tokenizer=bpe, or point TIKTOKEN_CACHE_DIR at a copy"
        ) from None
    size = VOCABULARIES["gpt2"]
    token_bytes = np.array([len(encoding.decode_single_token_bytes(v)) for v in range(size)], dtype=np.int64)
    token_bytes[encoding.eot_token] = 0
    return Tokeniser(
        name="gpt2",
        vocabulary=size,
        separator=encoding.eot_token,
        token_bytes=token_bytes,
        encode=lambda text: np.array(encoding.encode_ordinary(text.decode("utf-8", errors="replace")), dtype=np.uint16),
        decode=lambda ids: encoding.decode(ids.tolist()),
    )


def _package(name: str, asked: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ConfigError(f"{asked} needs the package {name}; pip install 'xattn[data]', or use bytes") from None
