"""Models that `transformers` makes, imported and scored as the harness scores the originals.

Needs torch and transformers, which the tests do not install.
"""

import json

import numpy as np
import pytest

from gqe_jax.config import MeshConfig
from gqe_jax.evaluation.harness import HarnessModel
from gqe_jax.interop.import_weights import ImportConfig, import_weights
from gqe_jax.runs import restore_run
from tests.gqe_jax import special

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
target_delimiter: " "
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
SIZES = {
    "vocab_size": len(special.VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # logits that differ
    "bos_token_id": special.BOS,
    "eos_token_id": [special.EOS, special.IM_END],
}


@pytest.fixture
def task(tmp_path):
    """The folder of a task of 24 questions, each with three answers of one to three words."""
    rng = np.random.default_rng(0)
    text = lambda count: " ".join(rng.choice(special.WORDS[:-1], count))  # noqa: E731
    documents = [
        {"q": text(5), "choices": [text(count) for count in (1, 2, 3)], "gold": 0}
        for _ in range(24)
    ]
    folder = tmp_path / "task"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "words.yaml").write_text(TASK.format(data=data))
    return folder


def answers(model, folder) -> np.ndarray:
    """The log-likelihood of each answer, by the harness: [document, answer]."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model=model, tasks=["words"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(result["samples"]["words"], key=lambda sample: sample["doc_id"])
    return np.array([[float(answer[0]) for answer in s["filtered_resps"]] for s in samples])


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_an_imported_model_scores_as_the_original(kind, task, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 16} if kind == "Qwen3" else {})
    config = getattr(transformers, f"{kind}Config")(**sizes)
    original = getattr(transformers, f"{kind}ForCausalLM")(config)
    original.save_pretrained(tmp_path / "original")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=special.make_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path / "original")

    import_weights(
        ImportConfig(tmp_path / "original", tmp_path / "run", corpus="stdlib", dtype="float32")
    )
    run = restore_run(tmp_path / "run", mesh=MeshConfig(data=8))
    ours = answers(HarnessModel(run, batch_size=8, max_length=64), task)
    theirs = answers(
        HFLM(pretrained=str(tmp_path / "original"), device="cpu", dtype="float32"), task
    )
    assert theirs.shape == (24, 3)
    assert np.ptp(theirs) > 1
    print(f"{kind}: largest difference {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
