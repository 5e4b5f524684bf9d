"""VLT's words: a fixed table of vectors instead of a learned embedding."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers.tokenization_python import PythonBackend

TABLE = "word_vectors.safetensors"
# The parts that spaCy's English rules make of such words: do|n't, man|'s, left|-|most, woman|, blue|/|white, 2.5
PARTS = re.compile(
    r"[^\W\d_]+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\.{2,}|\d+(?:[.,:/]\d+)+|\w+|[^\w\s]", re.IGNORECASE
)


class VltTokenizer(PythonBackend):
    """Splits sentences at white space and looks words up, upper and lower case as they are.

    The original asks spaCy 2 (`en_vectors_web_lg`: GloVe of Common Crawl, 300 values): a word's vector is the mean
    over spaCy's tokens of it. `PARTS` are its rules for punctuation and English contractions; its list of single
    exceptions ("cannot", "gonna") is not reproduced.

    Args:
        vocab_file: the table: GloVe text, or safetensors with "words" (uint8, UTF-8 separated by line feeds) and
            "vectors" (words, size) float32; None for an empty one, with which nothing can be read.

    Raises:
        ValueError: when the table is missing, damaged or contradicts itself.
    """

    vocab_files_names = {"vocab_file": TABLE}
    model_input_names = ["input_ids"]

    def __init__(self, vocab_file: str | Path | None = None, **kwargs: object) -> None:
        self.words, self.vectors = read_table(Path(vocab_file)) if vocab_file else ([], np.zeros((0, 0), np.float32))
        self.index = {word: i for i, word in enumerate(self.words)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.index)

    def word_vectors(self, sentences: Sequence[str], max_words: int) -> np.ndarray:
        """(sentences, max_words, size): the vectors of each sentence's first words, then zeros.

        A word's vector is the mean over its parts; one that is not in the table counts as zeros.

        Raises:
            ValueError: when the table is empty.
        """
        if not self.words:
            raise ValueError("this processor has no word vectors: make it with VltTokenizer(FILE), a GloVe text file")
        vectors = np.zeros((len(sentences), max_words, self.vectors.shape[1]), dtype=np.float32)
        for sentence, rows in zip(sentences, vectors):
            for word, row in zip(sentence.split(), rows):
                parts = self._tokenize(word)
                known = [self.index[part] for part in parts if part in self.index]
                row[:] = self.vectors[known].sum(0) / len(parts)
        return vectors

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the table beside the processor."""
        path = Path(save_directory, f"{filename_prefix}-{TABLE}" if filename_prefix else TABLE)
        write_table(path, self.words, self.vectors)
        return (str(path),)

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return PARTS.findall(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.index.get(token, len(self.words))  # one after the last: unknown

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index] if index < len(self.words) else "?"


def read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Words, and their vectors (words, size) float32.

    Raises:
        ValueError: see `VltTokenizer`.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give word vectors as GloVe text or safetensors")
    try:
        words, vectors = (_read_safetensors if path.suffix == ".safetensors" else _read_glove)(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as word vectors ({reason})") from error
    if vectors.ndim != 2 or len(words) != len(vectors) or len(set(words)) != len(words):
        raise ValueError(
            f"{path} holds {len(words)} words, {len(set(words))} of them different, for {vectors.shape} values"
        )
    return words, vectors


def write_table(path: Path, words: Sequence[str], vectors: np.ndarray) -> None:
    """Write words and vectors as safetensors."""
    text = np.frombuffer("\n".join(words).encode(), dtype=np.uint8)
    save_file({"words": text, "vectors": np.ascontiguousarray(vectors, dtype=np.float32)}, path)


def _read_safetensors(path: Path) -> tuple[list[str], np.ndarray]:
    with safe_open(path, "np") as file:  # which compares sizes with the file before it reads
        text, vectors = file.get_tensor("words").tobytes().decode(), file.get_tensor("vectors")
    return text.split("\n") if text else [], vectors.astype(np.float32, copy=False)


def _read_glove(path: Path) -> tuple[list[str], np.ndarray]:
    """Lines `word value value ...`; a word may hold spaces, and of equal words the first one counts."""
    words, rows, size = {}, [], 0
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            size = size or len(line.split()) - 1
            word, *values = line.rstrip().rsplit(" ", size)
            row = np.array(values, dtype=np.float32)
            if len(row) != size or not size:
                raise ValueError(f"line {number} has {len(row)} values instead of {size}")
            if words.setdefault(word, len(rows)) == len(rows):
                rows.append(row)
    return list(words), np.array(rows, dtype=np.float32).reshape(-1, size)


VltTokenizer.register_for_auto_class("AutoTokenizer")
