"""The tokens that begin and end texts, as a tokenizer.json and the files beside it name them.

A directory of Hugging Face's has `config.json`, `generation_config.json` and
`tokenizer_config.json` beside `tokenizer.json`. The directory of an imported run has the same
files, except that `config.json` is the run's; the fields of the original are in `huggingface.json`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gqe_jax.config_json import read_object
from gqe_jax.errors import DataError
from gqe_jax.storage import Location

if TYPE_CHECKING:
    import tokenizers

IMPORTED_FILE = "huggingface.json"
GENERATION_FILE = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
COMPANIONS = (GENERATION_FILE, _TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""Files beside a tokenizer.json that an import keeps and an export writes, unchanged."""
_KEPT = ("bos_token_id", "eos_token_id", "max_position_embeddings")
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens."""

    end_of_document: int
    """Separates the documents of a corpus, and ends a generated text."""
    ends: tuple[int, ...]
    """All tokens that end a generated text."""
    prefix: tuple[int, ...]
    """What the post-processor puts before a text: BOS, or nothing."""
    start: int
    """What precedes the first token of a text where `prefix` is empty: BOS if the tokenizer has
    one, else the end of a document before."""

    @property
    def document_prefix(self) -> tuple[int, ...]:
        """What precedes a document in a corpus: `prefix`, unless the end of the last one serves."""
        return () if self.end_of_document in self.prefix else self.prefix


@contextlib.contextmanager
def library_errors(failure: str, remedy: str) -> Iterator[None]:
    """Raises a DataError for any failure of the tokenizers library.

    The library has no class for its errors, and where its Rust code panics, as with some damaged
    files, what it raises is no `Exception`.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{failure} ({error}); {remedy}") from error


def read_fields(path: Location) -> dict[str, Any]:
    """The fields of a JSON file; none if it does not exist.

    Raises:
      DataError: the file is no JSON object.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    except ValueError as error:
        raise DataError(str(error)) from None


def companions(directory: Location) -> dict[str, bytes]:
    """The files that belong to an imported model, by name, to be copied with its tokenizer.

    Args:
      directory: of a run, or of Hugging Face's.

    Raises:
      DataError: a file names token ids in an invalid way.
    """
    model = read_fields(directory / "config.json")
    model = {name: model[name] for name in _KEPT if name in model}
    model |= read_fields(directory / IMPORTED_FILE)
    for name, values in (
        ("config.json", model),
        (GENERATION_FILE, read_fields(directory / GENERATION_FILE)),
    ):
        for field in ("bos_token_id", "eos_token_id"):
            token_ids(values, field, directory / name)
    length = model.get("max_position_embeddings")
    if length is not None and (type(length) is not int or length < 1):
        raise DataError(
            f"{directory}: max_position_embeddings is {length!r} in config.json or "
            f"{IMPORTED_FILE}; it must be a positive integer, or null"
        )
    paths = (directory / name for name in COMPANIONS)
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    return files | ({IMPORTED_FILE: to_json(model)} if model else {})


def to_json(values: dict[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(values, indent=1) + "\n").encode()


def token_ids(values: dict[str, Any], field: str, path: Location) -> tuple[int, ...]:
    """The ids in a field that holds one, a list, or null.

    Raises:
      DataError: the field holds something else.
    """
    value = values.get(field)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(each) is not int or each < 0 for each in found):
        raise DataError(f"{path}: {field} is {value!r}; it must be a token id, a list, or null")
    return tuple(found)


def special_tokens(
    path: Location, tokenizer: "tokenizers.Tokenizer", end_of_document: str | None
) -> SpecialTokens:
    """The special tokens of a tokenizer.json.

    The end of a document is the token that the user named; else the first `eos_token_id` of the
    model's configuration, or of the generation's; else `eos_token` of the tokenizer's; else a
    common one.

    Args:
      path: the file.
      tokenizer: its content.
      end_of_document: the token that the user named, or None.

    Raises:
      DataError: no token ends a document, or a file beside the tokenizer has an invalid field.
    """
    directory = path.parent
    model_file = directory / IMPORTED_FILE
    if not (model := read_fields(model_file)):
        model_file = directory / "config.json"
        model = read_fields(model_file)  # of a run, it has none of these fields
    generation = read_fields(directory / GENERATION_FILE)
    names = read_fields(directory / _TOKENIZER_CONFIG)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())

    def ids(values: dict[str, Any], field: str, file: Location) -> tuple[int, ...]:
        found = token_ids(values, field, file)
        if found and max(found) > largest:
            raise DataError(
                f"{file}: {field} is {values[field]!r}; the ids of {path} end at {largest}: "
                "correct the field, or copy both files again"
            )
        return found

    of_model = ids(model, "eos_token_id", model_file)
    of_generation = ids(generation, "eos_token_id", directory / GENERATION_FILE)
    of_tokenizer = _known(tokenizer, [_spelling(names, "eos_token", directory)])
    common = _known(tokenizer, _END_OF_DOCUMENT)
    named = () if end_of_document is None else _known(tokenizer, [end_of_document])
    candidates = [*of_model, *of_generation, *of_tokenizer, *common]
    if not (named if end_of_document is not None else candidates):
        wanted = ", ".join(_END_OF_DOCUMENT) if end_of_document is None else end_of_document
        raise DataError(
            f"end_of_document: tokenizer {path} has none of {wanted}; name the token that ends a "
            "document: --end-of-document"
        )
    end = [*named, *candidates][0]
    prefix = _prefix(tokenizer)
    if max(prefix, default=0) > largest:
        raise DataError(
            f"tokenizer {path}: its post-processor adds the id {max(prefix)}; its ids end at "
            f"{largest}: copy it again"
        )
    bos = _known(tokenizer, [_spelling(names, "bos_token", directory)]) or prefix[:1]
    if not names:  # else a tokenizer without `bos_token` has none, whatever the model's file says
        bos = bos or ids(model, "bos_token_id", model_file)
    return SpecialTokens(
        end_of_document=end,
        ends=tuple(dict.fromkeys([end, *(of_generation or of_model or of_tokenizer)])),
        prefix=prefix,
        start=[*bos, *named, *of_tokenizer, end][0],
    )


def _spelling(names: dict[str, Any], field: str, directory: Location) -> str | None:
    """The text of a token in tokenizer_config.json, which has it as a string or an object."""
    value = names.get(field)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{directory / _TOKENIZER_CONFIG}: {field} is {value!r}; it must be a token's text, an "
            "object with its content, or null"
        )
    return text


def _known(tokenizer: "tokenizers.Tokenizer", texts: Iterable[str | None]) -> tuple[int, ...]:
    """The ids of those of the tokens that the tokenizer has."""
    ids = [tokenizer.token_to_id(text) for text in texts if text is not None]
    return tuple(token for token in ids if token is not None)


def _prefix(tokenizer: "tokenizers.Tokenizer") -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    if not tokenizer.num_special_tokens_to_add(is_pair=False):
        return ()
    for text in ("a", *tokenizer.get_vocab(with_added_tokens=True)):
        try:
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            whole = tokenizer.encode(text).ids
        except Exception:  # the library's only class; this text is unknown, another may not be
            continue
        for start in range(len(whole)) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
    return ()
