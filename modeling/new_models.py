"""What every family needs to make a new model: a tokenizer from the training sentences, and checked fields."""

from collections import Counter
from collections.abc import Iterable

from transformers import BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


def refuse_unknown(fields: dict[str, object], config_class: type[PreTrainedConfig]) -> None:
    """Raises ValueError for a field that the configuration does not have."""
    if unknown := sorted(set(fields) - set(config_class.__dataclass_fields__)):
        raise ValueError(f"model: {unknown[0]!r} is not a field of {config_class.__name__}")


def word_tokenizer(sentences: Iterable[str], max_words: int = 4000) -> PreTrainedTokenizerBase:
    """A BERT tokenizer whose vocabulary is the most frequent words and all single characters.

    (The WordPiece trainer of `tokenizers` gives another vocabulary at every run.)
    """
    rules = BertTokenizer().backend_tokenizer
    words = Counter()
    for sentence in sentences:
        pieces = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(sentence))
        words.update(word for word, _ in pieces)
    characters = sorted(set("".join(words)))
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))[:max_words]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *("##" + character for character in characters), *frequent]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
