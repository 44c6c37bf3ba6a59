"""A tokenizer of words with BOS and several tokens that end a text, made by `tokenizers`."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

WORDS = ["the", "query", "expert", "of", "Paris", "is", "a", "group", "Q", "A", "\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>"]
VOCABULARY = {text: i for i, text in enumerate([*SPECIAL, *(f"▁{word}" for word in WORDS), "Q"])}
BOS, EOS, IM_END, EOT = (VOCABULARY[text] for text in ("<s>", "</s>", "<|im_end|>", "<|eot_id|>"))


def make_tokenizer(*, bos: bool = True) -> tokenizers.Tokenizer:
    """Words behind spaces, as SentencePiece has them; its decoder drops the first space.

    Args:
      bos: whether the post-processor puts `<s>` before a text.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer


def write(directory: pathlib.Path, *, bos: bool = True, **files) -> pathlib.Path:
    """Writes tokenizer.json and JSON files beside it, and returns the directory."""
    directory.mkdir(exist_ok=True)
    make_tokenizer(bos=bos).save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory
