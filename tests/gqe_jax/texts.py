"""Three hundred short documents, and a corpus of them."""

import json

from gqe_jax.data.prepare import PrepareConfig, prepare

TEXTS = [f"Document {i}: " + "äöü word " * (i % 7 + 1) + "\n" for i in range(300)]
ROWS = b"".join(
    json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS)
)


def write_corpus(tmp_path, name="corpus", **fields):
    source = tmp_path / "texts.jsonl"
    source.write_bytes(ROWS)
    options = {"validation_fraction": 0.2, "processes": 1} | fields
    output = tmp_path / name
    prepare(PrepareConfig((str(source),), output, **options), progress=False)
    return output
